"""All ranks train on the same problems, and a run that resumes on those that it began with, whatever a reward says by then."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, Lock

import datasets
import pytest

from tests.trapo_train.test_train import EVALUATED, build_config, exported, rows, train_to_end
from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.data import dataset as problems_of
from trapo_train.data.dataset import DataConfig, load_problems
from trapo_train.evaluation.eval_sets import EvalConfig, load_eval_sets
from trapo_train.parallel.world import World
from trapo_train.rewards.functions import RewardError
from trapo_train.schema import UserError
from trapo_train.tasks import build_tokenizer
from trapo_train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENIZER = build_tokenizer()
ROWS = [{"prompt": "ab|", "solution": "bc", "expert": expert} for expert in (["ab", "bc"], ["cd"], ["bc", "de", "ef"])]
REJECTED = {(0, 0), (1, 0), (2, 1), (2, 2)}


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a file and returns what reads it."""

    def write(name, rows):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return DataConfig(path=str(tmp_path / name), on_rejected_expert="drop")

    return write


def on_ranks(*loads):
    """What each of these gives, or raises, all called at once with the world of their rank."""
    together, turn, values = Barrier(len(loads), timeout=60), Lock(), [None] * len(loads)

    def call(rank):
        world = World.alone()
        world.rank, world.size = rank, len(loads)

        def gather(value):
            values[rank] = value
            turn.release()
            together.wait()
            found = list(values)
            together.wait()
            turn.acquire()
            return found

        world.gather = gather
        with turn:  # threads of one process, as ranks are not, would read into one cache of datasets at once
            try:
                return loads[rank](world=world)
            except Exception as error:  # what a rank raises is what its test looks at
                return error

    with ThreadPoolExecutor(len(loads)) as threads:
        return list(threads.map(call, range(len(loads))))


def test_ranks_share_the_traces_that_the_reward_judges_and_drop_the_same(write):
    data, asked = write("rows.jsonl", ROWS), []

    def judge(completions, solution, **columns):
        asked.append(list(completions))
        return [float(completion == truth) for completion, truth in zip(completions, solution, strict=True)]

    found = on_ranks(*[partial(load_problems, data, TOKENIZER, judge)] * 4)
    assert sorted(asked) == [["ab", "de"], ["bc"], ["bc", "ef"], ["cd"]]
    alone = load_problems(data, TOKENIZER, judge)
    for problems in [alone, *found]:
        assert problems.rejected == REJECTED and problems.traces == [1, 0, 1]
        assert (problems.report.experts, problems.report.dropped_experts, problems.report.without_expert) == (6, 4, 1)
        assert problems.fingerprint == alone.fingerprint
    assert [[expert.text for expert in problem.experts] for problem in alone] == [["bc$"], [], ["bc$"]]


def test_a_reward_that_judges_traces_is_told_what_it_is_told_of_samples(write):
    told = []

    def judge(completions, completion_tokens, finish_reasons, thoughts_open, **columns):
        told.extend(zip(completions, completion_tokens, finish_reasons, thoughts_open, strict=True))
        return [1.0] * len(completions)

    load_problems(write("rows.jsonl", ROWS), TOKENIZER, judge)
    assert told[0] == ("ab", 3, "expert", False)


@pytest.mark.parametrize("change", [{"solution": "bd"}, {"level": 1}])
def test_ranks_that_read_other_problems_are_named_on_all(change, write):
    data, stale = write("rows.jsonl", ROWS), write("stale.jsonl", [ROWS[0], ROWS[1] | change, ROWS[2]])
    short = write("short.jsonl", ROWS[:2])
    errors = on_ranks(*(partial(load_problems, each, TOKENIZER, None) for each in (data, stale, data, short)))
    assert {type(error) for error in errors} == {UserError}
    for error in errors:
        assert "read the same problems in the same order, got others on ranks [1, 3], [3, 2] of them, than on rank 0" in str(error)
    errors = on_ranks(*(partial(load_eval_sets, {"own": each}, EvalConfig(), TOKENIZER) for each in (data, stale)))
    assert all("got others on ranks [1], [3] of them" in str(error) for error in errors)


def test_what_one_rank_cannot_read_or_judge_is_raised_on_all(write):
    def judge(completions, **columns):
        if "cd" in completions:
            raise ValueError("not this one")
        return [1.0] * len(completions)

    data = write("rows.jsonl", ROWS)
    errors = on_ranks(*[partial(load_problems, data, TOKENIZER, judge)] * 2)
    assert all(isinstance(error, RewardError) and "not this one" in str(error) for error in errors)
    other = write("other.jsonl", [{"solution": "bc"}])
    errors = on_ranks(*(partial(load_problems, each, TOKENIZER, None) for each in (data, other)))
    assert all("has no column 'prompt'" in str(error) for error in errors)


def test_a_rank_that_has_too_little_memory_for_the_data_ends_all(write, monkeypatch):
    def read(reader, reward, verifier, correct_by, world, progress, real=problems_of._read):
        if world.rank == 1:
            raise MemoryError("of this rank")
        return real(reader, reward, verifier, correct_by, world, progress)

    monkeypatch.setattr(problems_of, "_read", read)
    errors = on_ranks(*[partial(load_problems, write("rows.jsonl", ROWS), TOKENIZER, None)] * 2)
    assert [repr(error) for error in errors] == ["MemoryError('of this rank')"] * 2


ASKED, VERDICTS = [], [1.0, 0.0]


def moody(prompts, completions, finish_reasons, **columns):
    """Judges the traces of all 8 problems, before a run, by what VERDICTS are by then; a step has fewer."""
    if set(finish_reasons) != {"expert"} or len(completions) < 8:
        return [float(len(completion) % 2) for completion in completions]
    ASKED.append(len(completions))
    return [VERDICTS[i % len(VERDICTS)] for i in range(len(completions))]


@pytest.mark.slow
def test_a_run_resumes_with_the_traces_that_it_began_with(tmp_path, monkeypatch):
    settings = ("reward=tests.trapo_train.data.test_shared_data:moody", "data.on_rejected_expert=drop")
    whole, config = (build_config(tmp_path, name, *settings, "steps=4") for name in ("whole", "run"))
    train_to_end(whole)
    train_to_end(build_config(tmp_path, "run", *settings, "steps=2"))
    monkeypatch.setattr("tests.trapo_train.data.test_shared_data.VERDICTS", [0.0, 0.0, 1.0])
    ASKED.clear()
    train_to_end(build_config(tmp_path, "run", *settings, "steps=4", "checkpoint.resume=true"))
    assert not ASKED and rows(config) == rows(whole) and exported(config) == exported(whole)
    kept = Path(config.output_dir) / "rejected_experts.json"
    assert kept.read_bytes() == (Path(whole.output_dir) / "rejected_experts.json").read_bytes()
    kept.unlink()
    with pytest.raises(UserError, match=r"which .*rejected_experts\.json says, got FileNotFoundError.* Put the file back"):
        train_to_end(build_config(tmp_path, "run", *settings, "steps=6", "checkpoint.resume=true"))


def test_a_run_that_kept_all_traces_is_not_resumed_by_one_that_drops_some_and_no_file_is_asked_for(tmp_path):
    settings = ("reward=tests.trapo_train.data.test_shared_data:moody",)
    train_to_end(build_config(tmp_path, "run", *settings, "steps=1", "checkpoint.every=1"))
    ASKED.clear()
    with pytest.raises(CheckpointError, match=r"data\.on_rejected_expert was 'keep', is 'drop'"):
        train_to_end(build_config(tmp_path, "run", *settings, "steps=2", "data.on_rejected_expert=drop", "checkpoint.resume=true"))
    assert not ASKED


def test_a_start_without_a_checkpoint_asks_again(tmp_path, monkeypatch):
    settings = (f"reward={__name__}:moody", "data.on_rejected_expert=drop", "steps=1", "checkpoint.every=0")
    config = build_config(tmp_path, "run", *settings, "checkpoint.resume=true")
    kept = Path(config.output_dir) / "rejected_experts.json"
    train_to_end(config)
    before = json.loads(kept.read_text())
    monkeypatch.setattr("tests.trapo_train.data.test_shared_data.VERDICTS", [0.0, 1.0])
    shutil.rmtree(Path(config.output_dir) / "model")  # beside which nothing starts anew
    train_to_end(config)
    assert before and json.loads(kept.read_text()) and json.loads(kept.read_text()) != before


def _images(directory, shade):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image.new("RGB", (8, 8), (shade, 0, 0)).save(directory / "image.png")
    png = {"bytes": (directory / "image.png").read_bytes(), "path": None}
    kinds = {"prompt": datasets.Value("string"), "solution": datasets.Value("string"), "image": datasets.Image()}
    kinds |= {"images": datasets.List(datasets.Image()), "parts": {"image": datasets.Image()}}
    columns = {"prompt": ["ab|"], "solution": ["bc"], "image": [png], "images": [[png]], "parts": [{"image": png}]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(directory / f"{shade}.parquet")
    return DataConfig(path=str(directory / f"{shade}.parquet"), num_problems=1), png


def test_data_with_images_is_the_same_at_every_start_and_their_bytes_reach_the_reward(tmp_path):
    data, png = _images(tmp_path, 1)
    problems, again = (load_problems(data, TOKENIZER, None) for _ in range(2))
    assert problems[0].columns == {"image": png, "images": [png], "parts": {"image": png}}
    assert problems.fingerprint == again.fingerprint
    assert problems.fingerprint != load_problems(_images(tmp_path, 2)[0], TOKENIZER, None).fingerprint


def test_a_folder_of_images_is_the_same_data_wherever_it_lies_and_other_data_with_another_image(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

    def load(name, shade):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / "a.png")
        row = {"file_name": "a.png", "prompt": "ab|", "solution": "bc", "notes": [{"bytes": None, "path": "a.png"}]}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        return load_problems(DataConfig(path=str(folder)), TOKENIZER, None)

    here = load("here", 1)
    png = {"bytes": (tmp_path / "here" / "a.png").read_bytes(), "path": "a.png"}
    assert here[0].columns == {"image": png, "notes": [{"bytes": None, "path": "a.png"}]}
    assert here.fingerprint == load("there", 1).fingerprint
    assert here.fingerprint != load("here", 2).fingerprint
    problems = load("gone", 1)
    (tmp_path / "gone" / "a.png").unlink()
    with pytest.raises(UserError, match=r"row 0: a file of the dataset must be readable, got .*gone/a\.png'\. Put it there"):
        problems.at([0])[0]  # not from the cache


def test_a_checkpoint_of_other_data_is_refused_whatever_was_rejected(tmp_path):
    settings = ("reward=tests.trapo_train.data.test_shared_data:moody", "data.on_rejected_expert=drop", "steps=2")
    train_to_end(build_config(tmp_path, "run", *settings))
    with pytest.raises(CheckpointError, match=r"data was '\w+', is '\w+'"):
        train_to_end(build_config(tmp_path, "run", *settings, "data.seed=5", "checkpoint.resume=true"))


@pytest.mark.parametrize("section", ["pointer_chasing, split train", "pointer_chasing, split test"])
def test_a_trainer_compares_its_problems_and_those_held_out_with_other_ranks(section, tmp_path, monkeypatch):
    alone = World.attempt

    def attempt(self, action, *kinds):
        (told,) = alone(self, action, *kinds)
        differs = hasattr(told, "fingerprint") and told.problems == (8 if section.endswith("train") else 4)
        return [told, told._replace(fingerprint="other")] if differs else [told]

    monkeypatch.setattr(World, "attempt", attempt)
    with pytest.raises(UserError, match=rf"{section}: all ranks must read the same problems .* on ranks \[1\]"):
        Trainer(build_config(tmp_path, "run", *EVALUATED))
