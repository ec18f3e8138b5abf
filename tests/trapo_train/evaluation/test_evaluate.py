"""Evaluation with a scripted engine: counts, estimators and groups, each against a hand-made value."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import ranks
from trapo_train import cli
from trapo_train.cli import main
from trapo_train.data.dataset import DataConfig
from trapo_train.engines.engine import TransformersEngine
from trapo_train.evaluation.eval_sets import UNNAMED, EvalConfig, EvalSet, group_problems, load_eval_sets
from trapo_train.evaluation.evaluate import engine_calls, evaluate, pass_at_k, standard_error
from trapo_train.models.model import ModelConfig, load_model_and_tokenizer
from trapo_train.models.scratch import ScratchConfig
from trapo_train.parallel.world import World
from trapo_train.records import Completion, ExpertTrace, Problem
from trapo_train.rewards.builtin import REWARDS
from trapo_train.rewards.functions import WeightedSum
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.tasks import PointerChasingConfig, build_tokenizer, pointer_chasing_reward

TOKENIZER = build_tokenizer()


ROLLOUT = RolloutConfig(max_response_tokens=8, paragraph_break="|", top_p=0.95, top_k=7)


FOUND = [parent / "shared" / "data" / "math_eval" for parent in Path(__file__).parents]
MATH_EVAL = next((path for path in FOUND if path.is_dir()), None)


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def problem(index, depth):
    prompt = f"ab?a{index + 1}:"
    return Problem(index, prompt, ids(prompt), "de", (ExpertTrace("#de$", ids("#de$")),), {"depth": depth})


class CyclingEngine:
    """Answers the c-th copy of a prompt right while c is below the number of right answers of that problem."""

    def __init__(self, num_right):
        self.num_right = num_right
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        copies = {}
        completions = []
        for prompt in map(tuple, prompts):
            copy = copies[prompt] = copies.get(prompt, -1) + 1
            index = int(TOKENIZER.decode(list(prompt))[-2]) - 1
            text = "#de$" if copy < self.num_right[index] else "aaaaaaaa"
            completions.append(Completion(ids(text), (0.0,) * len(text), "stop" if "$" in text else "length"))
        return completions


def run(config, num_right=(4, 1, 0), depths=(2, 10, 2), repeats=1):
    engine = CyclingEngine(num_right)
    problems = [problem(i, depth) for i, depth in enumerate(depths) for _ in range(repeats)]
    eval_set = EvalSet.of(problems, config)
    return evaluate(engine, eval_set, pointer_chasing_reward, TOKENIZER, config, ROLLOUT), engine


def test_accuracy_groups_and_lengths():
    metrics, engine = run(EvalConfig(samples_per_prompt=4, group_by="depth", seed=5))
    assert metrics["accuracy"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert metrics["accuracy_stderr"] == pytest.approx(standard_error([1, 0.25, 0]))
    assert metrics["accuracy/depth_2"] == 0.5
    assert metrics["accuracy_stderr/depth_2"] == pytest.approx(0.5)
    assert metrics["accuracy/depth_10"] == 0.25
    assert math.isnan(metrics["accuracy_stderr/depth_10"])
    assert metrics["reward/mean"] == metrics["finished_share"] == pytest.approx(5 / 12)
    assert metrics["completion_tokens_mean"] == pytest.approx((5 * 4 + 7 * 8) / 12)
    assert (metrics["num_problems"], metrics["samples_per_problem"]) == (3, 4)
    [(prompts, params)] = engine.calls
    assert len(prompts) == 12
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 0.95, 7, 5)
    assert params.budgets(12) == [8] * 12


def test_an_evaluation_may_sample_otherwise_than_the_rollouts():
    own = {"top_p": 0.5, "top_k": 0, "max_response_tokens": 20}
    _, engine = run(EvalConfig(temperature=0.6, samples_per_prompt=4, **own))
    [(_, params)] = engine.calls
    assert (params.temperature, params.top_p, params.top_k, params.budgets(12)) == (0.6, 0.5, 0, [20] * 12)
    assert EvalConfig(top_p=0.5).sampling(ROLLOUT) == replace(ROLLOUT, top_p=0.5)


@pytest.mark.parametrize(("pass_at", "names"), [(None, ["pass@2", "pass@4"]), ([1, 3], ["pass@1", "pass@3"])])
def test_pass_at_k_is_reported_for_powers_of_two_or_as_chosen(pass_at, names):
    metrics, _ = run(EvalConfig(samples_per_prompt=4, pass_at=pass_at))
    assert [name for name in metrics if name.startswith("pass")] == names
    by_hand = {"pass@1": 1.25 / 3, "pass@2": 1.5 / 3, "pass@3": (1 + 0.75 + 0) / 3, "pass@4": 2 / 3}
    for name in names:
        assert metrics[name] == pytest.approx(by_hand[name])


def test_equal_rows_are_one_problem_with_more_samples():
    once, engine = run(EvalConfig(samples_per_prompt=4, group_by="depth"))
    repeated, other = run(EvalConfig(samples_per_prompt=2, group_by="depth"), repeats=2)
    assert repeated == {**once, "accuracy_stderr/depth_10": pytest.approx(math.nan, nan_ok=True)}
    assert other.calls == engine.calls
    greedy, engine = run(EvalConfig(temperature=0.0, num_problems=2), num_right=(1, 0, 0), repeats=3)
    assert (greedy["accuracy"], greedy["num_problems"], len(engine.calls[0][0])) == (0.5, 2, 2)


@pytest.mark.parametrize(("num_correct", "k"), itertools.product(range(6), (1, 2, 3, 5)))
def test_pass_at_k_equals_counting_all_draws(num_correct, k):
    draws = list(itertools.combinations([True] * num_correct + [False] * (5 - num_correct), k))
    assert pass_at_k(5, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_standard_error_is_that_of_the_mean():
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
    assert standard_error([1.0, 1.0, 1.0]) == 0.0


def test_greedy_and_num_problems():
    metrics, engine = run(EvalConfig(temperature=0.0, num_problems=2), num_right=(1, 0, 1))
    assert metrics["accuracy"] == 0.5
    assert metrics["num_problems"] == 2
    assert engine.calls[0][1].temperature == 0.0


def test_a_bonus_above_one_counts_as_correct_and_a_partial_reward_does_not():
    config = EvalConfig(samples_per_prompt=2)
    rewards = lambda completions, **columns: [1.1, 0.9] * (len(completions) // 2)  # noqa: E731
    metrics = evaluate(CyclingEngine((0,)), EvalSet.of([problem(0, 1)], config), rewards, TOKENIZER, config, ROLLOUT)
    assert metrics["accuracy"] == 0.5
    assert metrics["reward/mean"] == pytest.approx(1.0)


def test_the_reward_is_told_of_the_responses_as_in_training():
    config, seen = EvalConfig(samples_per_prompt=2), []

    def reward(completions, completion_tokens, finish_reasons, **columns):
        seen.extend(zip(completion_tokens, finish_reasons, strict=True))
        return [0.0] * len(completions)

    evaluate(CyclingEngine((1,)), EvalSet.of([problem(0, 1)], config), reward, TOKENIZER, config, ROLLOUT)
    assert seen == [(4, "stop"), (8, "length")]


def test_accuracy_is_that_of_the_reward_that_says_what_is_correct():
    config = EvalConfig(samples_per_prompt=4)

    def brevity(completions, completion_tokens, **_):
        return [-tokens / 8 for tokens in completion_tokens]

    def silent(completions, **_):
        return [None] * len(completions)

    reward = WeightedSum([("right", pointer_chasing_reward, 1.0), ("brevity", brevity, 0.2), ("silent", silent, 1.0)])

    def found(**settings):
        eval_set = EvalSet.of([problem(0, 1)], config)
        return evaluate(CyclingEngine((3,)), eval_set, reward, TOKENIZER, config, replace(ROLLOUT, **settings))

    assert found()["accuracy"] == 0.0  # no sum reaches 1
    metrics = found(correct_by="right")
    assert (metrics["accuracy"], metrics["pass@2"]) == (0.75, 1.0)
    assert metrics["reward/mean"] == pytest.approx((3 * (1 - 0.2 * 4 / 8) - 0.2) / 4)
    assert found(correct_by="brevity", correct_at=-0.5)["accuracy"] == 0.75
    assert found(correct_by="silent")["accuracy"] == 0.0 and found(correct_by="silent", correct_at=0.0)["accuracy"] == 1.0


def test_groups_are_in_the_order_of_their_values():
    problems = [problem(i, depth) for i, depth in enumerate((10, 9, "deep", 10, None))]
    groups = group_problems(problems, "depth")
    assert groups == {"depth_9": [1], "depth_10": [0, 3], "depth_None": [4], "depth_deep": [2]}
    assert list(groups) == ["depth_9", "depth_10", "depth_None", "depth_deep"]
    assert group_problems(problems, None) == {}
    assert group_problems([problem(0, ["a"]), problem(1, ["a"])], "depth") == {"depth_['a']": [0, 1]}


def test_one_prompt_with_other_answers_in_its_columns_is_another_problem():
    tests = [replace(problem(0, depth), solution=None) for depth in (1, 2, 1)]
    assert EvalSet.of(tests, EvalConfig()).rows == (0, 1)
    assert EvalSet.of([replace(entry, solution="x") for entry in tests], EvalConfig()).rows == (0,)


class OneRank:
    """A rank of several that run one after the other in this process: it stops where they would exchange their answers."""

    class Reached(Exception):
        pass

    def __init__(self, rank, size, parts=None):
        self.rank, self.size, self.parts = rank, size, parts

    def share(self, items):
        return items[self.rank :: self.size]

    attempt = World.attempt

    def gather(self, mine):
        if self.parts is None:
            raise self.Reached(mine)
        return self.parts


@pytest.mark.parametrize(("size", "most"), [(2, 8), (3, 8), (5, 8), (3, 256), (5, 4)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_number_of_ranks_draws_the_same(size, most, temperature):
    scratch = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, initializer_range=0.5)
    model, tokenizer = load_model_and_tokenizer(ModelConfig(scratch=scratch), task_tokenizer=TOKENIZER)
    engine = TransformersEngine(model, tokenizer, seed=0, max_batch_tokens=4096)
    config = EvalConfig(temperature=temperature, responses_per_call=most, samples_per_prompt=1 if temperature == 0 else 3)
    eval_set = EvalSet.of([problem(i, 1) for i in range(9)], config)
    reward = WeightedSum([("length", lambda completions, **_: [len(text) / 8 for text in completions], 1.0)])

    def part(world):
        return evaluate(engine, eval_set, reward, TOKENIZER, config, ROLLOUT, world)

    parts = []
    for rank in range(size):
        with pytest.raises(OneRank.Reached) as reached:
            part(OneRank(rank, size))
        parts.append(reached.value.args[0])
    alone = evaluate(engine, eval_set, reward, TOKENIZER, replace(config, responses_per_call=256), ROLLOUT)
    together = part(OneRank(0, size, parts))
    assert 0 < alone["reward/length"] == pytest.approx(alone["reward/mean"])
    assert together.pop("reward/length") == pytest.approx(alone.pop("reward/length"))  # a mean of the calls' means
    assert together == alone


@pytest.mark.parametrize(
    ("samples", "most", "ranks", "sizes"),
    [
        ((8,) * 30, 256, 1, [30]),
        ((8,) * 30, 256, 8, [4, 4, 4, 3, 4, 4, 4, 3]),  # no rank has none
        ((8,) * 30, 16, 8, [2, 2, 2, 2, 2, 2, 2, 1] * 2),
        ((32,) * 5, 256, 8, [1] * 5),
        ((32,) * 83, 256, 8, [6, 5, 5, 5, 5, 6, 5, 5, 5, 5, 6, 5, 5, 5, 5, 5]),  # two for each
        ((32,) * 112, 100, 3, [3, 3, 3, 3, 3, 3, 3, 2] * 4 + [3, 3, 3, 3, 3, 3, 2]),  # 13 for each
        ((1,) * 1000, 256, 2, [250] * 4),
        ((2, 9, 1, 1, 1), 4, 2, [1, 1, 3]),
    ],
)
def test_calls_are_large_and_leave_no_rank_without_one(samples, most, ranks, sizes):
    calls = list(engine_calls(samples, most, ranks))
    assert [len(call) for call in calls] == sizes
    assert [position for call in calls for position in call] == list(range(len(samples)))


def test_named_sets_with_their_own_number_of_samples():
    data = {
        "easy": DataConfig(task="pointer_chasing", num_problems=3, task_options=PointerChasingConfig(depths=(1,))),
        "hard": DataConfig(task="pointer_chasing", split="test", num_problems=2),
    }
    config = EvalConfig(samples_per_prompt={"easy": 1, "hard": 4}, pass_at=[4], group_by="depth")
    sets = load_eval_sets(data, config, TOKENIZER)
    assert {name: entry.samples for name, entry in sets.items()} == {"easy": (1, 1, 1), "hard": (4, 4)}
    assert list(sets["easy"].groups) == ["depth_1"]
    assert list(load_eval_sets({UNNAMED: data["easy"]}, EvalConfig(), TOKENIZER)) == [UNNAMED]
    assert load_eval_sets({}, EvalConfig(), TOKENIZER) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pass_at": [2, 5], "samples_per_prompt": 4}, "pass_at must be at most 4, the samples of a problem, got 5"),
        ({"group_by": "level"}, r"group_by must name a column of the data set, got 'level'; it has \['depth'\]"),
    ],
)
def test_what_no_set_has_is_refused_before_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        load_eval_sets({UNNAMED: DataConfig(task="pointer_chasing", num_problems=2)}, EvalConfig(**fields), TOKENIZER)
    with pytest.raises(ValueError, match=r"got 'level'; problem 0 has \['depth'\]"):
        group_problems([problem(0, 1)], "level")


TINY = """
output_dir: {tmp}/run
steps: 1
prompts_per_step: 1
reward: math_verify
model:
  scratch: {{hidden_size: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 16, max_position: 4096}}
  tokenizer: {tmp}/tokenizer
data: {math}
plan: {{name: grpo}}
eval_data:
  aime: {aime}
  math: {math}
evaluation: {{num_problems: 1}}
rollout: {{max_response_tokens: 4}}
"""


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.slow
@pytest.mark.skipif(MATH_EVAL is None, reason="the published evaluation sets are not there: shared/data/math_eval")
def test_the_published_math_sets_as_named_sets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra [math])")
    common = {"solution_column": "reward_model.ground_truth", "max_prompt_tokens": 4096}
    data = {name: DataConfig(path=str(MATH_EVAL / f"{name}.parquet"), **common) for name in ("aime", "math")}
    tokenizer = byte_tokenizer()
    config = EvalConfig(num_problems=3)
    sets = load_eval_sets(data, config, tokenizer)
    assert {name: entry.samples for name, entry in sets.items()} == {"aime": (32, 32, 32), "math": (1, 1, 1)}
    problems = [entry.problems[row] for entry in sets.values() for row in entry.rows]
    answers = {problem.prompt_ids: problem.solution for problem in problems}

    class Knowing:
        """Gives the true answer to every second response."""

        def generate(self, prompts, params):
            texts = [f"\\boxed{{{answers[tuple(prompt)]}}}" if i % 2 == 0 else "no idea" for i, prompt in enumerate(prompts)]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            return [Completion(tuple(i), (0.0,) * len(i), "stop") for i in ids]

    rollout = RolloutConfig(max_response_tokens=64)
    found = {name: evaluate(Knowing(), entry, REWARDS["math_verify"], tokenizer, config, rollout) for name, entry in sets.items()}
    assert (found["aime"]["accuracy"], found["aime"]["pass@2"]) == (0.5, pytest.approx(1 - 0.5 * 15 / 31))
    assert found["math"]["accuracy"] == pytest.approx(2 / 3)

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sections = {
        name: f"{{path: {entry.path}, solution_column: reward_model.ground_truth, max_prompt_tokens: 4096}}"
        for name, entry in data.items()
    }
    file = tmp_path / "run.yaml"
    file.write_text(TINY.format(tmp=tmp_path, **sections))
    assert main(["eval", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:6] for line in lines if line[1:2] == ["aime"]] == [["aime", "│", "1", "│", "32"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": -1}, "every must be at least 0, got -1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or from 1e-6 to 1e6, got -1.0"),
        ({"temperature": 1e-40}, "temperature must be 0 or from 1e-6 to 1e6, got 1e-40"),
        ({"seed": -1}, "seed must be at least 0 and below 2.63, got -1"),
        ({"seed": 2**63}, "seed must be at least 0 and below 2.63, got 9223372036854775808"),
        ({"top_p": 0.0}, "top_p must be null or in .* got 0.0"),
        ({"top_k": -1}, "top_k must be null or at least 0, got -1"),
        ({"max_response_tokens": 0}, "max_response_tokens must be null or at least 1, got 0"),
        ({"num_problems": 0}, "num_problems must be .* got 0"),
        ({"temperature": 0.0, "samples_per_prompt": 2}, "must be 1 at temperature 0, got 2"),
    ],
)
def test_config_refuses_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**fields)


@pytest.mark.slow
def test_ranks_print_the_table_that_one_process_prints(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    sets = {name: f"{{task: pointer_chasing, split: test, num_problems: {count}}}" for name, count in (("aime", 6), ("math", 9))}
    text = TINY.format(tmp=tmp_path, **sets).replace("reward: math_verify", "reward: pointer_chasing")
    text = text.replace(f"tokenizer: {tmp_path}/tokenizer", "tokenizer: null").replace("num_problems: 1}", "responses_per_call: 4}")
    file.write_text(text)
    options = ["evaluation.samples_per_prompt=3", "evaluation.group_by=depth"]
    assert cli.main(["eval", str(file), *options]) == 0
    table = capsys.readouterr().out
    assert "aime depth 3" in table
    for size in (2, 3):
        assert ranks.run(size, tmp_path / f"log_{size}", "eval", file, *options).count(table) == 1
