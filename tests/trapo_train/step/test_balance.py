"""Which micro-batch a sample goes into: where a search of all of them puts it, without the search."""

import random

import pytest

from tests.trapo_train.step.test_packing import make_sample
from trapo_kernels import Role, objectives
from trapo_train.step.packing import PackingConfig, _balanced, pack


def bins_by_search(lengths: list[int], budget: int, ranks: int) -> list[list[int]]:
    """Into the first bin that has room, or the lightest of as many where none gets too heavy, looking at all of them."""
    fitted: list[list[int]] = []

    def weigh(members: list[int]) -> int:
        return sum(lengths[i] for i in members)

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in order:
        roomy = [members for members in fitted if weigh(members) + lengths[i] <= budget]
        (roomy[0] if roomy else fitted.append([]) or fitted[-1]).append(i)
    fitted += [[] for _ in range(-max(len(fitted), 1) % ranks + (not fitted))]
    even: list[list[int]] = [[] for _ in fitted]
    for i in order:
        min(even, key=weigh).append(i)
    return sorted(even if max(map(weigh, even)) <= budget else fitted, key=weigh, reverse=True)


@pytest.mark.parametrize("seed", range(40))
def test_samples_are_where_a_search_of_all_micro_batches_puts_them(seed):
    draw = random.Random(seed)
    budget = draw.randint(2, 30)
    lengths = [draw.randint(1, draw.choice([budget - 1, budget // 2])) for _ in range(draw.randint(1, 25))]
    samples = [make_sample(index, prompt=1, completion=length) for index, length in enumerate(lengths)]
    packed = pack(samples, PackingConfig(budget), objectives.trapo(), max_response_tokens=30, ranks=seed % 4 + 1)
    samples_of = [b.batch.sequence_id[b.batch.role == Role.ROLLOUT].unique_consecutive().tolist() for b in packed]
    assert samples_of == bins_by_search(lengths, budget, seed % 4 + 1)


class Counted(int):
    """A length that counts how often it is compared."""

    comparisons = 0

    def __le__(self, other):
        Counted.comparisons += 1
        return int(self) <= other


def test_samples_that_fill_a_micro_batch_each_are_not_compared_with_all_of_them():
    lengths = [Counted(9 + i % 8) for i in range(2048)]
    assert len(_balanced(list(range(2048)), lengths, max_tokens=16, ranks=8)) == 2048
    assert 2048 <= Counted.comparisons <= 2048 * 12  # the depth of the tree; a search of all is 2048² / 2
