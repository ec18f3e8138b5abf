"""What Triton compiles for a call: one kernel whatever the number of tokens, its tiles, its options."""

import importlib

import pytest

from trapo_kernels.backends import triton_ops

fused_scoring = importlib.import_module(f"{triton_ops.__name__}.fused_scoring")  # whose name there is the function's


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 152_064])
@pytest.mark.parametrize("num_rows", [1, 64, 512, 2048, 3072, 8192, 20_000, 32_768])
@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_the_vocabulary_is_split_so_that_all_multiprocessors_work_to_the_end(vocab_size, num_rows, multiprocessors):
    row_blocks, tiles = -(-num_rows // 128), -(-vocab_size // 128)
    size = fused_scoring.tiles_of_split(row_blocks, tiles, multiprocessors)
    splits = -(-tiles // size)
    waves = -(-row_blocks * splits // multiprocessors)
    assert waves * size <= 1.07 * row_blocks * tiles / multiprocessors + 1, "in tiles: of the last program, of all by their number"
    assert splits <= max(multiprocessors, 8), "partial sums take 16 bytes for every row and split"


def test_the_split_of_a_small_vocabulary():
    assert fused_scoring.tiles_of_split(1, 1, 132) == 1
    assert fused_scoring.tiles_of_split(1, 3, 132) == 1
    assert fused_scoring.tiles_of_split(16, 1188, 132) == 36  # 33 · 16 programs are four for each multiprocessor
