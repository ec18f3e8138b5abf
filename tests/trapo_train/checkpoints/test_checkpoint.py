"""Checkpoints: whole or not there, refused when damaged, never running code."""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from trapo_train.checkpoints import checkpoint, tensor_files
from trapo_train.checkpoints.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointStore,
    compare_fingerprints,
)
from trapo_train.parallel.world import RankError, World
from trapo_train.random_states import rng_state

FINGERPRINT = {"config": {"seed": 1, "optimizer": {"learning_rate": 0.1}}, "data": "abc"}


def make_state(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((3, 2), value)}, "step": 7, "rates": (0.1, None, "x"), "rng": rng_state()}


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_load_returns_what_was_saved(store):
    assert store.load(FINGERPRINT) is None
    store.save(5, make_state(1.0), FINGERPRINT)
    store.save(10, make_state(2.0), FINGERPRINT)
    step, state = store.load(FINGERPRINT)
    assert step == 10
    assert torch.equal(state["model"]["weight"], torch.full((3, 2), 2.0))
    assert state["rates"] == (0.1, None, "x")


@pytest.mark.parametrize(("file_bytes", "files"), [(2**31, 1), (58, 2), (1, 4)])
def test_tensors_come_back_in_place(store, monkeypatch, file_bytes, files):
    monkeypatch.setattr(tensor_files, "FILE_BYTES", file_bytes)
    saved = {
        "matrix": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "step": torch.tensor(7.0),
        "transposed": torch.randn(4, 3).T,
    }
    store.save(5, make_state(), FINGERPRINT, saved)
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    views = dict(live)
    assert len(list((store.path(5) / "tensors").iterdir())) == files
    store.load_tensors(5, live)
    for name, tensor in saved.items():
        assert torch.equal(views[name], tensor), name


def test_tensors_are_saved_without_pinned_memory_where_cuda_is(store, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the loader that copies ahead, into pinned memory")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store.save(1, {}, FINGERPRINT, {"weight": torch.ones(2)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3)}, r"step_00000001 does not fit this model.*weight"),
        ({"other": torch.zeros(2)}, "does not fit.*other"),
    ],
)
def test_tensors_of_another_model_are_refused(store, tensors, message):
    store.save(1, make_state(), FINGERPRINT, {"weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=message):
        store.load_tensors(1, tensors)


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 3, 10):
        store.save(step, make_state(), FINGERPRINT)
    assert store.steps() == [3, 10]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, keep_best=True)
    kept = []
    for step, score in enumerate((0.1, 0.5, None, 0.5, float("nan"), 0.2, 0.3, 0.7, 0.1), start=1):
        store.save(step, make_state(), FINGERPRINT, score=score)
        kept.append((store.best(), store.steps()))
    assert kept[2] == (2, [2, 3]) and kept[3] == (4, [3, 4])  # the later of equals
    assert kept[6] == (4, [4, 6, 7]) and kept[7:] == [(8, [7, 8]), (8, [8, 9])]
    assert store.load(FINGERPRINT)[0] == 9  # a run goes on from the newest
    store.rate(9, 0.9)  # evaluated only after it was saved
    assert store.best() == 9 and store.load(FINGERPRINT)[0] == 9
    store.rate(9, 0.1)
    assert store.best() == 8
    (store.path(8) / "manifest.json").write_text("torn")
    assert store.best() == 9
    assert CheckpointStore(tmp_path / "none", keep=1).best() is None


def test_a_checkpoint_rated_later_takes_the_place_of_the_best_and_knows_its_evaluation(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=True)
    store.save(1, {}, {}, score=0.5)
    store.save(2, {"kept": 1, "last": None}, {})
    assert store.steps() == [1, 2]
    store.rate(2, 0.9, {"last": {"accuracy": 0.9, "accuracy_stderr": math.nan}})
    assert store.steps() == [2]
    state = store.load({})[1]
    assert state["kept"] == 1 and state["last"]["accuracy"] == 0.9 and math.isnan(state["last"]["accuracy_stderr"])


@pytest.mark.parametrize("rated", [False, True], ids=["saved with its score", "rated later"])
def test_a_score_that_is_not_finite_is_none(tmp_path, rated):
    store = CheckpointStore(tmp_path, keep=1, keep_best=True)
    store.save(1, {}, {}, score=None if rated else math.nan)
    if rated:
        store.rate(1, math.nan)
    store.save(2, {}, {}, score=0.5)
    store.save(3, {}, {}, score=0.1)
    assert store.best() == 2 and store.steps() == [2, 3]


def test_every_file_and_directory_is_on_disk_before_the_checkpoint_takes_its_name(store, monkeypatch):
    synced, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda source, target: synced.append("rename") or rename(source, target))
    path = store.save(1, {}, {}, {"weight": torch.ones(2)})
    before, after = synced[: synced.index("rename")], synced[synced.index("rename") + 1 :]
    assert {part.stat().st_ino for part in (path, *path.rglob("*"))} <= set(before)  # a rename changes no inode
    assert after == [store.directory.stat().st_ino]  # where the new name is
    store.rate(1, 0.5)
    assert synced[-1] == (path / "manifest.json").stat().st_ino


def test_tied_tensors_stay_tied(store):
    weight = torch.ones(4)
    store.save(1, {"a": weight, "b": weight}, FINGERPRINT)
    _, state = store.load(FINGERPRINT)
    assert state["a"].data_ptr() == state["b"].data_ptr()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / "state.pt", 100), "state.pt has 100 of .* bytes"),
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not readable"),
        (lambda path: flip_byte(path / "state.pt"), "state.pt does not match its SHA-256"),
        (lambda path: os.truncate(only_shard(path), 100), "tensors/.*safetensors has 100 of .* bytes"),
        (lambda path: only_shard(path).unlink(), "tensors/.*safetensors is missing"),
        (lambda path: flip_byte(only_shard(path)), "tensors/.*safetensors does not match its SHA-256"),
    ],
)
def test_damaged_checkpoint_is_refused_and_the_intact_one_offered(store, damage, message):
    store.save(5, make_state(1.0), FINGERPRINT, {"weight": torch.ones(64)})
    path = store.save(10, make_state(2.0), FINGERPRINT, {"weight": torch.zeros(64)})
    damage(path)
    with pytest.raises(CheckpointError, match=f"{message}.*Delete {path} to resume from step 5, which is intact"):
        store.load(FINGERPRINT)
    shutil.rmtree(path)
    assert store.load(FINGERPRINT)[0] == 5


def only_shard(path):
    (shard,) = (path / "tensors").iterdir()
    return shard


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_when_none_is_intact_it_says_so(store):
    for step in (1, 2):
        os.truncate(store.save(step, make_state(), FINGERPRINT) / "state.pt", 10)
    with pytest.raises(CheckpointError, match="There is no intact one before it"):
        store.load(FINGERPRINT)


def test_a_state_with_code_in_it_is_not_run(store):
    path = store.save(1, make_state(), FINGERPRINT)

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(store.directory / "attacked"),))

    torch.save({"model": Attack()}, path / "state.pt")
    digest = checkpoint._digest(path / "state.pt")
    manifest = (path / "manifest.json").read_text()
    old = json.loads(manifest)
    old["files"]["state.pt"] = digest
    (path / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(pickle.UnpicklingError):
        store.load(FINGERPRINT)
    assert not (store.directory / "attacked").exists()


def test_different_run_is_refused_with_the_differences(store):
    store.save(1, make_state(), FINGERPRINT)
    other = {"config": {"seed": 1, "optimizer": {"learning_rate": 0.2}}, "data": "abd"}
    with pytest.raises(CheckpointError) as error:
        store.load(other)
    assert "config.optimizer.learning_rate was 0.1, is 0.2; data was 'abc', is 'abd'" in str(error.value)


def test_fingerprints_compare_missing_keys_too():
    assert compare_fingerprints({"a": 1}, {"a": 1, "b": {"c": 2}}) == ["b was None, is {'c': 2}"]
    assert compare_fingerprints({"a": {"x": 1}}, {"a": {"x": 1}}) == []


def test_a_failed_save_leaves_the_last_one(store, monkeypatch):
    store.save(1, make_state(), FINGERPRINT)

    def full_disk(state, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved.*The last one is .*step_00000001"):
        store.save(2, make_state(), FINGERPRINT)
    assert store.steps() == [1]
    assert store.load(FINGERPRINT)[0] == 1
    assert [path.name for path in store.directory.iterdir()] == ["step_00000001"]


def test_a_rank_that_is_lost_while_saving_is_no_fault_of_the_disk(store, monkeypatch):
    store.save(1, make_state(), FINGERPRINT)

    def lost(action, *kinds):
        raise RuntimeError(
            "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
        )

    monkeypatch.setattr(store._ranks, "size", 2)
    monkeypatch.setattr(store._ranks, "gather", lambda value: [value])
    monkeypatch.setattr(store._ranks, "attempt", lost)
    with pytest.raises(RankError, match=r"^parallel: rank 0 has lost another rank: .* Timed out .* checkpoint\.resume=true"):
        store.save(2, make_state(), FINGERPRINT)
    assert store.steps() == [1] and [path.name for path in store.directory.iterdir()] == ["step_00000001"]


def test_an_old_one_that_cannot_be_deleted_is_told_and_the_new_one_is_saved(store, monkeypatch):
    for step in (1, 2):
        store.save(step, make_state(), FINGERPRINT)

    def busy(path, *arguments, **options):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        assert store.save(3, make_state(), FINGERPRINT) == store.path(3)
    assert "step_00000001 could not be deleted" in store.undeleted and "resource busy" in store.undeleted
    assert store.steps() == [1, 2, 3] and store.load(FINGERPRINT)[0] == 3
    store.save(4, make_state(), FINGERPRINT)
    assert store.undeleted is None and store.steps() == [3, 4]


def test_a_save_killed_before_the_rename_is_invisible_and_cleaned_up(store, monkeypatch):
    store.save(1, make_state(), FINGERPRINT)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync_directory", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.save(2, make_state(), FINGERPRINT)
    assert len(list(store.directory.iterdir())) == 2
    assert store.load(FINGERPRINT)[0] == 1
    store.save(3, make_state(), FINGERPRINT)
    assert sorted(path.name for path in store.directory.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_step_is_saved_once(store):
    store.save(1, make_state(), FINGERPRINT)
    with pytest.raises(CheckpointError, match="exists already"):
        store.save(1, make_state(), FINGERPRINT)


def test_a_step_that_another_rank_sees_a_checkpoint_of_is_not_saved(tmp_path):
    world = World.alone()
    world.gather = lambda mine: [mine, True]
    with pytest.raises(CheckpointError, match="step_00000001 exists already"):
        CheckpointStore(tmp_path, keep=2, world=world).save(1, make_state(), FINGERPRINT)


def test_a_model_that_scored_as_high_before_training_was_not_better(store):
    for step, before, better in ((1, 0.5, False), (2, 0.6, True)):
        store.save(step, {}, {}, score=0.5, score_before=before)
        assert (store.better_before() is not None) == better


def test_a_state_that_could_not_be_loaded_again_is_not_saved(store):
    with pytest.raises(CheckpointError, match="must be plain values and tensors"):
        store.save(1, {"chooser": collections.deque([1])}, FINGERPRINT)
    assert store.steps() == []


@pytest.mark.parametrize(("fields", "message"), [({"every": -1}, "every must be"), ({"keep": 0}, "keep must be")])
def test_config_checks_its_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**fields)
