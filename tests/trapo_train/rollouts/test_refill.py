"""Dynamic sampling: problems that teach nothing are replaced, as often as allowed, and the run stays exact."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from tests.trapo_train.parallel.test_parallel import ranks_train
from tests.trapo_train.test_train import StopAfter, build_config, exported, rows, train_to_end
from trapo_kernels import objectives
from trapo_train import trainer as trainer_module
from trapo_train.data.dataset import ProblemOrder
from trapo_train.metrics import Mean
from trapo_train.records import Problem, Sample
from trapo_train.reports.display import Reporter
from trapo_train.reports.metrics_log import read_metrics
from trapo_train.rewards.builtin import Overlong
from trapo_train.rewards.functions import RewardError
from trapo_train.rollouts.refill import sample_with_refill, teaches
from trapo_train.rollouts.rollout import RolloutResult, chain_results
from trapo_train.step.advantages import AdvantageConfig
from trapo_train.train import Trainer, run

DAPO = objectives.dapo()


@pytest.fixture
def configure(tmp_path):
    return partial(build_config, tmp_path)


def make_sample(index=0, reward=0.0, prefix=0, completion=3, **fields):
    problem = Problem(index, "", (1,))
    return Sample(
        problem,
        1,
        0.0,
        (1,) * prefix,
        (1,) * completion,
        (-0.5,) * completion,
        "stop",
        **{"reward": reward, "verdict": reward, "correct": reward >= 1} | fields,
    )


@pytest.mark.parametrize(
    ("expected", "objective", "fields"),
    [
        (False, DAPO, {}),
        (True, DAPO, {"advantage": 0.5}),
        (False, DAPO, {"advantage": 0.5, "masked": True}),
        (False, DAPO, {"advantage": 0.5, "prefix": 3, "completion": 0}),  # dapo trains no expert token
        (True, objectives.trapo(), {"prefix": 3}),
        (False, objectives.trapo(), {"prefix": 3, "prefix_weight": 0.0}),
        (True, objectives.trapo(), {"prefix": 3, "masked": True}),
        (False, objectives.trapo(entropy_coef=0.1), {}),  # a bonus alone teaches nothing
        (False, objectives.grpo(beta=0.1), {}),
        (False, objectives.luffy(), {"prefix": 3}),  # weighs its expert tokens by their advantage
        (True, objectives.luffy(), {"prefix": 3, "completion": 0, "advantage": -0.5}),
        (True, objectives.srft(), {"prefix": 3}),  # a layer of SFT beside it
        (False, objectives.sft(), {"advantage": 0.5}),
        (True, replace(objectives.sft(), plus=DAPO), {"advantage": 0.5}),
    ],
)
def test_what_teaches(expected, objective, fields):
    assert teaches([make_sample(), make_sample(**fields)], objective) == expected


class Sampler:
    """Two samples of every problem, with rewards that differ where it is among `teaching`."""

    def __init__(self, teaching):
        self.teaching, self.rounds = teaching, []

    def __call__(self, positions):
        self.rounds.append(list(positions))
        groups = [[make_sample(i, 1.0), make_sample(i, 0.0 if i in self.teaching else 1.0)] for i in positions]
        metrics = {
            "rollout/tokens_per_s": 100.0 * len(self.rounds), "time/reward_s": 2.0, "rollout/engine_steps": 2.0 ** len(self.rounds),
            "rollout/rows_in_flight": float(len(self.rounds)), "reward/none_count": 1.0,
            "reward/one": Mean(0.5, 2 * len(positions)),
        }  # fmt: skip
        deferred = tuple(k for k, i in enumerate(positions) if i not in self.teaching)
        return RolloutResult(groups, metrics, float(len(self.rounds)), groups, deferred)


def refilled(teaching, *, problems=20, wanted=4, rounds=3, order=None, objective=DAPO):
    order = order or ProblemOrder(problems, seed=0)
    sampler = Sampler(teaching)
    taken, result = sample_with_refill(order.next(wanted), sampler, order, rounds, AdvantageConfig(), objective)
    return sampler, taken, result, order


def test_what_teaches_nothing_is_replaced_until_enough_teach():
    order = ProblemOrder(20, seed=0).next(20)
    teaching = {order[i] for i in (0, 2, 5, 6)}
    sampler, taken, result, _ = refilled(teaching)
    assert sampler.rounds == [order[:4], order[4:6], order[6:7]]  # 2 of 4 teach, 1 of the next 2, the next one
    assert taken == order[:7]
    assert [group[0].problem.index for group in result.groups] == [order[i] for i in (0, 2, 5, 6)]
    assert [group[0].problem.index for group in result.sampled] == taken
    assert [taken[i] for i in result.deferred] == [order[i] for i in (1, 3, 4)]


LENGTHS = (40, 60, 90, 100)


@pytest.mark.parametrize(
    ("kept", "verdicts", "center", "objective", "fields"),
    [
        (False, (0, 0, 0, 0), "mean", DAPO, {}),
        (False, (1, 1, 1, 1), "mean", DAPO, {}),
        (True, (0, 0, 1, 0), "mean", DAPO, {}),
        (False, (0, 0, 0, 0), "none", DAPO, {}),
        (True, (1, 1, 1, 1), "none", DAPO, {}),  # compared with nothing: right answers teach
        (True, (0, 0, 0, 0), "mean", objectives.trapo(), {"prefix": 3}),  # its expert tokens
        (False, (0, 0, 0, 0), "mean", objectives.luffy(), {"prefix": 3}),
    ],
)
def test_a_length_penalty_makes_no_problem_of_equal_answers_teach(kept, verdicts, center, objective, fields):
    penalties = Overlong(100, 40)(LENGTHS)
    pairs = zip(verdicts, penalties, strict=True)
    group = [make_sample(0, verdict + penalty, verdict=float(verdict), **fields) for verdict, penalty in pairs]
    sampled, order = RolloutResult([group], {}, 1.0, [group], ()), ProblemOrder(1, seed=0)
    _, result = sample_with_refill(order.next(1), lambda positions: sampled, order, 1, AdvantageConfig(center=center), objective)
    assert result.groups == [group] * kept
    assert [s.reward for s in group] == [v + p for v, p in zip(verdicts, penalties, strict=True)]
    assert len({s.advantage for s in group}) == 3  # of what is kept: by the whole reward


def test_the_metrics_are_those_of_all_that_was_sampled():
    order = ProblemOrder(20, seed=0).next(20)
    _, _, result, _ = refilled({order[i] for i in (0, 2, 5, 6)})
    metrics = result.metrics
    assert metrics["num_samples"] == 14 and metrics["response_tokens"] == 42
    assert metrics["reward/mean"] == 10 / 14
    assert metrics["reward/equal_share"] == metrics["reward/all_correct_share"] == 3 / 7
    assert (metrics["time/reward_s"], metrics["rollout/engine_steps"], metrics["reward/none_count"]) == (6.0, 14.0, 3.0)
    # rounds of 1, 2 and 3 seconds
    assert metrics["rollout/tokens_per_s"] == pytest.approx((100 * 1 + 200 * 2 + 300 * 3) / 6)
    assert metrics["rollout/rows_in_flight"] == (1 * 2 + 2 * 4 + 3 * 8) / 14  # by the engine's steps, which resume exactly
    assert metrics["reward/one"] == 0.5 and metrics["reward/one"].count == 14
    assert result.seconds == 6.0


def test_the_metrics_of_rounds_are_of_samples_that_were_not_kept_as_well():
    group = [make_sample(0, 1.0), make_sample(0, 0.0)]
    rounds = [RolloutResult([kept], {"reward/none_count": 0.0}, 1.0, [group]) for kept in ([], group)]
    assert chain_results(rounds).metrics["num_samples"] == 4


def test_the_rounds_are_limited_and_what_is_missing_then_stays_missing():
    sampler, taken, result, _ = refilled(set(), rounds=2)
    assert [len(positions) for positions in sampler.rounds] == [4, 4, 4] and len(taken) == 12
    assert result.groups == [] and len(result.sampled) == 12
    sampler, taken, result, _ = refilled(set(range(20)), rounds=2)
    assert len(sampler.rounds) == 1 and len(result.groups) == 4


def test_without_rounds_everything_stays_as_it_is():
    sampler, taken, result, _ = refilled(set(), rounds=0)
    assert len(sampler.rounds) == 1 and len(result.groups) == 4 == len(taken)
    assert all(sample.advantage == 0 for group in result.groups for sample in group)


@pytest.mark.parametrize("before", range(10))
def test_no_problem_is_sampled_twice_in_a_step_whatever_epoch_ends_in_it(before):
    order = ProblemOrder(10, seed=3)
    for _ in range(before):
        order.next(1)
    sampler, taken, _, _ = refilled(set(), order=order, wanted=3, rounds=9)
    assert sorted(taken) == list(range(10))
    assert [len(positions) for positions in sampler.rounds] == [3, 3, 3, 1]  # all that there are
    epochs = [order.next(1)[0] for _ in range(30 - before)]
    assert sorted(epochs[-10:]) == list(range(10))  # and every epoch still visits each once


def test_more_problems_in_a_step_than_there_are_leave_none_to_refill_with():
    sampler, _, result, _ = refilled(set(), problems=3, wanted=5)
    assert len(sampler.rounds) == 1 and result.groups == []


def test_what_teaches_is_said_by_the_advantages_of_the_run():
    """Rewards that are not centred teach where all are equal, too."""
    order = ProblemOrder(8, seed=0)
    taken, result = sample_with_refill(order.next(2), Sampler(set()), order, 1, AdvantageConfig(center="none"), DAPO)
    assert len(taken) == len(result.groups) == 2


def test_expert_tokens_teach_without_any_advantage():
    order = ProblemOrder(8, seed=0)

    def sample(positions):
        groups = [[make_sample(i), make_sample(i, prefix=2)] for i in positions]
        return RolloutResult(groups, {}, 1.0, groups)

    for objective, kept in ((objectives.trapo(), 2), (DAPO, 0)):
        taken, result = sample_with_refill(order.next(2), sample, order, 0, AdvantageConfig(), objective)
        assert len(result.groups) == 2 == len(taken)
        sampled = replace(result, metrics={"rollout/tokens_per_s": 1.0})

        def again(positions, sampled=sampled):
            return sampled

        taken, result = sample_with_refill(taken, again, order, 1, AdvantageConfig(), objective)
        assert len(result.groups) == kept
        assert [s.prefix_weight for group in result.groups for s in group] == [1.0, 1.0] * kept


def fickle(prompts, completions, **columns):
    """A reward by which about half of the problems teach something in a group of 2."""
    return [float(sum(map(ord, completion)) % 4 == 0) for completion in completions]


REFILL = (
    f"reward={__name__}:fickle", "plan={name: grpo, num_samples: 2, refill: 2}", "objective={name: dapo}",
    "packing.aggregation=token_mean", "model.scratch.initializer_range=0.5", "data.num_problems=7", "rollout.max_response_tokens=6",
)  # fmt: skip


@pytest.mark.parametrize("stop_step", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_refilled_run_resumes_to_the_same_bits(configure, stop_step):
    whole = configure("whole", *REFILL)
    train_to_end(whole)
    recorded = rows(whole)
    sampled = [row["rollout/groups_sampled"] for row in recorded]
    trained = [row["rollout/groups_trained"] for row in recorded]
    assert max(sampled) > 3 and all(count <= 3 for count in trained) and any(trained)
    assert all(row["num_samples"] == 2 * count for row, count in zip(recorded, sampled, strict=True))
    assert [row["epoch"] for row in recorded] == [pytest.approx(sum(sampled[: i + 1]) / 7) for i in range(6)]  # borders included
    stopped = configure("stopped", *REFILL)
    run(stopped, StopAfter(stopped.output_dir, stop_step))
    resumed = configure("stopped", *REFILL, "checkpoint.resume=true")
    train_to_end(resumed)
    assert exported(resumed) == exported(whole)
    assert rows(resumed) == recorded


def test_the_loss_is_that_of_the_groups_that_teach_alone(configure):
    """What is packed has neither a token nor a share of a denominator of the groups left out."""
    trainer = Trainer(configure("run", *REFILL))
    for _ in range(3):
        metrics = trainer.train_step()
        tokens = sum(len(sample.completion_ids) for group in trainer.last_groups for sample in group)
        weights = [float(weight) for batch in trainer.last_micro_batches for weight in batch.batch.weight if weight]
        assert metrics["loss_tokens"] == len(weights) == tokens  # every token of these groups has an advantage
        assert weights == pytest.approx([1 / tokens] * tokens)
    trainer.close()


def test_an_error_in_a_later_round_leaves_everything_as_it_was(configure, monkeypatch):
    trainer = Trainer(configure("run", *REFILL, "reward='tests.trapo_train.test_train:silent'"))
    state = trainer.order.state_dict(), trainer.engine.state_dict()
    real, calls = trainer_module.run_plans, []

    def failing(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise RewardError("not today")
        return real(*arguments)

    monkeypatch.setattr(trainer_module, "run_plans", failing)
    with pytest.raises(RewardError, match="not today"):
        trainer.train_step()
    assert (trainer.order.state_dict(), trainer.engine.state_dict()) == state and trainer.step == 0
    trainer.train_step()
    assert [problem.index for problem in calls[2]] == [problem.index for problem in calls[0]]
    trainer.close()


def test_unsolved_problems_of_every_round_are_deferred_and_steps_on_their_traces_need_no_refill(configure):
    plan = "plan={name: relift, num_samples: 2, refill: 1, buffer_size: 5}"
    config = configure("run", plan, "objective={name: relift}", "steps=3", "checkpoint.every=0")
    train_to_end(config)
    found = [(row["rollout/groups_sampled"], row["rollout/groups_trained"], row["deferred"]) for row in rows(config)]
    assert found == [(6, 0, 6), (5, 5, 1), (6, 0, 7)]  # nothing is solved; 5 traces; of the next 6 problems one waits already


def test_a_step_that_trains_nothing_is_said_once_in_a_row(configure):
    config = configure("run", *REFILL, "reward='tests.trapo_train.test_train:silent'", "steps=3")
    with Reporter(config.output_dir) as reporter:
        run(config, reporter)
    events = [row["text"] for row in read_metrics(config.output_dir) if row["kind"] == "event"]
    assert [text for text in events if "nothing" in text] == [
        "step 1: nothing was trained, every problem's rewards were equal",
        "3 of 3 steps trained nothing: every problem's rewards were equal",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("plan.refill=-1",), "refill of 'paper' must be at least 0, got -1"),
        (("plan.refill=1", "advantage.normalise=batch"), r"plan\.refill must be 0 with advantage\.normalise=batch, got 1"),
    ],
)
def test_bad_refills_are_refused(configure, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure("bad", *overrides)


@pytest.mark.slow
def test_ranks_refill_alike_on_every_rank(tmp_path):
    ranks_train(2, tmp_path, *REFILL, "steps=4")
    recorded = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert len(recorded) == 4 and any(row["rollout/groups_sampled"] % 2 for row in recorded)  # a rank without a problem, too
    assert all(row["num_samples"] == 2 * row["rollout/groups_sampled"] for row in recorded)
