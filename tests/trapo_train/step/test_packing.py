"""Packing: budgets, positions, roles and weights; that gradients do not depend on the split is in test_model.py."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from trapo_kernels import KL, Objective, Role, objectives
from trapo_kernels.weights import AGGREGATIONS
from trapo_train.records import Problem, Sample
from trapo_train.step.packing import PackingConfig, check_prompt_training, pack
from trapo_train.step.updates import split_groups

MAX_RESPONSE = 16


def make_sample(
    index: int = 0, prompt: int = 3, prefix: int = 0, completion: int = 4, advantage: float = 0.5, weight: float = 1.0
) -> Sample:
    generator = random.Random(f"{index}/{prompt}/{prefix}/{completion}")
    draw = lambda count: tuple(generator.randrange(11) for _ in range(count))  # noqa: E731
    return Sample(
        problem=Problem(index=index, prompt="", prompt_ids=draw(prompt)),
        micro_group=1,
        prefix_ratio=0.0,
        prefix_ids=draw(prefix),
        completion_ids=draw(completion),
        completion_logprobs=tuple(-1.0 - 0.1 * i for i in range(completion)),
        finish_reason="stop",
        prefix_weight=weight,
        advantage=advantage,
    )


def mixed_samples() -> list[Sample]:
    return [
        make_sample(0, prompt=3, completion=5, advantage=0.75),
        make_sample(0, prompt=3, completion=2, advantage=-0.25),
        make_sample(0, prompt=3, prefix=4, completion=3, advantage=0.5, weight=0.5),
        make_sample(0, prompt=3, prefix=7, completion=0, advantage=0.0),
        make_sample(1, prompt=5, completion=6, advantage=0.0),
        make_sample(1, prompt=5, prefix=2, completion=6, advantage=0.0, weight=0.0),
        make_sample(2, prompt=1, completion=1, advantage=-1.0),
        make_sample(2, prompt=1, completion=9, advantage=1.0),
    ]


def one(samples, objective, aggregation="constant", max_tokens=1000):
    (micro_batch,) = pack(samples, PackingConfig(max_tokens, aggregation), objective, max_response_tokens=MAX_RESPONSE)
    return micro_batch


def test_positions_score_the_next_token():
    micro_batch = one([make_sample(prompt=3, prefix=2, completion=2)], objectives.trapo())
    sample = make_sample(prompt=3, prefix=2, completion=2)
    tokens = [*sample.problem.prompt_ids, *sample.prefix_ids, *sample.completion_ids]
    assert micro_batch.input_ids.tolist() == [tokens[:-1]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert micro_batch.loss_positions.tolist() == [2, 3, 4, 5]
    assert micro_batch.batch.target.tolist() == tokens[3:]
    assert micro_batch.batch.role.tolist() == [Role.EXPERT, Role.EXPERT, Role.ROLLOUT, Role.ROLLOUT]
    torch.testing.assert_close(micro_batch.batch.rollout_logprob, torch.tensor([0.0, 0.0, -1.0, -1.1]))


def test_positions_start_anew_in_every_segment():
    micro_batch = one([make_sample(prompt=2, prefix=1, completion=3), make_sample(prompt=3, completion=2)], objectives.trapo())
    assert micro_batch.segment_lengths == (5, 4)
    assert micro_batch.position_ids.tolist() == [[*range(5), *range(4)]]


def test_every_loss_token_of_a_packed_row_points_at_its_own_token():
    samples = mixed_samples()
    for micro_batch in pack(samples, PackingConfig(24), objectives.trapo(), max_response_tokens=MAX_RESPONSE):
        starts = [0]
        for length in micro_batch.segment_lengths:
            starts.append(starts[-1] + length)
        ends = set(starts[1:])
        assert starts[-1] == micro_batch.input_ids.shape[1] <= 24
        for position, target in zip(micro_batch.loss_positions.tolist(), micro_batch.batch.target.tolist(), strict=True):
            if position + 1 not in ends:  # inside a sequence the next input is the target
                assert micro_batch.input_ids[0, position + 1] == target


def test_row_is_sorted_by_length():
    micro_batch = one(mixed_samples(), objectives.trapo())
    assert list(micro_batch.segment_lengths) == sorted(micro_batch.segment_lengths, reverse=True)


def test_constant_weights_and_prefix_shares():
    samples = [make_sample(prefix=2, completion=2, weight=0.5), make_sample(prefix=2, completion=1, weight=0.5)]
    batch = one(samples, objectives.trapo()).batch
    unit = 1 / (2 * MAX_RESPONSE)
    expected = torch.where(batch.role == Role.EXPERT, 0.5 * unit, unit)
    torch.testing.assert_close(batch.weight, expected)
    torch.testing.assert_close(batch.entropy_weight, torch.full((7,), unit))  # the bonus does not share


@pytest.mark.parametrize("aggregation", ["token_mean", "role_mean", "sequence_mean"])
def test_weights_of_a_plain_mean_sum_to_one(aggregation):
    samples = [make_sample(completion=5, advantage=1.0), make_sample(completion=2, advantage=2.0)]
    batch = one(samples, objectives.dr_grpo(), aggregation).batch
    assert float(batch.weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("copies", [1, 2, 8])
@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("aggregation", ["token_mean", "role_mean", "prompt_mean"])
def test_copies_of_a_prefix_count_as_one_in_a_mean_over_tokens(aggregation, mini_batches, copies):
    """As in UFT, whose samples all start from one hint: on two ranks, the weights of every update still sum to 1."""
    hints = {0: 5, 1: 2, 2: 3, 3: 7}
    groups = [[make_sample(i, prefix=n, completion=4, weight=1 / copies)] * copies for i, n in hints.items()]
    for samples in split_groups(groups, mini_batches):
        config = PackingConfig(30, aggregation)
        batches = [m.batch for m in pack(samples, config, objectives.uft(), max_response_tokens=MAX_RESPONSE, ranks=2)]
        role, weight = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("role", "weight"))
        expert, rollout = (float(weight[role == code].sum()) for code in (Role.EXPERT, Role.ROLLOUT))
        assert len(batches) % 2 == 0 and (role == Role.EXPERT).sum() == sum(len(s.prefix_ids) for s in samples)
        if aggregation == "role_mean":
            assert (expert, rollout) == pytest.approx((1.0, 1.0))
        else:
            assert expert + rollout == pytest.approx(1.0)
        if aggregation == "token_mean":
            tokens = sum(hints[i] for i in {s.problem.index for s in samples})
            assert expert == pytest.approx(tokens / (tokens + 4 * len(samples)))


def test_a_mean_over_expert_tokens_does_not_know_how_often_a_trace_was_copied():
    """Two copies of six tokens beside a trace of three: nine tokens, as if there were one copy."""
    copied = [make_sample(0, prefix=6, completion=0, weight=0.5)] * 2
    for aggregation in ("token_mean", "role_mean"):
        batch = one([*copied, make_sample(1, prefix=3, completion=0)], objectives.sft(), aggregation).batch
        torch.testing.assert_close(batch.weight, torch.where(batch.sequence_id < 2, 0.5 / 9, 1 / 9))


def test_the_order_of_samples_changes_no_bit_of_a_mean_over_tokens():
    samples = [make_sample(copies, prefix=1 + copies, completion=2, weight=1 / copies) for copies in (3, 7, 11, 13, 17)]
    orders = [random.Random(seed).sample(samples, len(samples)) for seed in range(50)]
    found = {tuple(one(order, objectives.trapo(), "token_mean").batch.weight.sort().values.tolist()) for order in orders}
    assert len(found) == 1


def test_zero_advantage_counts_but_is_dropped():
    samples = [make_sample(completion=4, advantage=1.0), make_sample(completion=4, advantage=0.0)]
    batch = one(samples, objectives.dr_grpo(), "token_mean").batch
    assert len(batch) == 4
    torch.testing.assert_close(batch.weight, torch.full((4,), 1 / 8))


def test_zero_advantage_keeps_its_entropy_bonus():
    batch = one([make_sample(completion=4, advantage=0.0)], objectives.trapo(entropy_coef=0.01)).batch
    assert batch.weight.tolist() == [0.0] * 4
    torch.testing.assert_close(batch.entropy_weight, torch.full((4,), 1 / MAX_RESPONSE))


def test_zero_advantage_keeps_its_kl():
    for objective in (objectives.grpo(beta=0.1), Objective(expert=objectives.sft().expert, plus=objectives.grpo(beta=0.1))):
        batch = one([make_sample(completion=4, advantage=0.0)], objective).batch
        torch.testing.assert_close(batch.weight, torch.full((4,), 1 / MAX_RESPONSE))


def test_a_bonus_of_a_second_layer_has_its_weights():
    added = Objective(expert=objectives.sft().expert, plus=objectives.dr_grpo(entropy_coef=0.1))
    batch = one([make_sample(prefix=2, completion=3, advantage=0.0)], added).batch
    torch.testing.assert_close(batch.entropy_weight, torch.full((5,), 1 / MAX_RESPONSE))


def test_prefix_without_trsft_is_in_neither_loss():
    sample = make_sample(prefix=3, completion=2, advantage=1.0, weight=0.0)
    assert one([sample], objectives.trapo(entropy_coef=0.0)).batch.role.tolist() == [Role.ROLLOUT] * 2
    batch = one([sample], objectives.trapo(entropy_coef=0.01), "token_mean").batch
    assert batch.weight.tolist() == [0.0] * 3 + [0.5] * 2
    torch.testing.assert_close(batch.entropy_weight, torch.full((5,), 0.2))


def test_a_role_without_a_term_enters_no_loss_and_no_denominator():
    sample = make_sample(prefix=3, completion=2, advantage=1.0)
    on_rollouts = one([sample], objectives.dr_grpo(), "token_mean").batch
    assert on_rollouts.role.tolist() == [Role.ROLLOUT] * 2
    assert on_rollouts.weight.tolist() == [0.5] * 2
    on_expert = one([sample], objectives.sft(), "token_mean").batch
    assert on_expert.role.tolist() == [Role.EXPERT] * 3
    torch.testing.assert_close(on_expert.weight, torch.full((3,), 1 / 3))


def test_demonstration_with_zero_advantage_is_silent_under_luffy_only():
    sample = make_sample(prefix=5, completion=0, advantage=0.0)
    for objective in (objectives.luffy(), replace(objectives.luffy(), kl=KL(0.1))):  # which is of rollouts
        assert one([sample], objective).batch.weight.tolist() == [0.0]
    assert len(one([sample], objectives.trapo()).batch) == 5


def test_nothing_to_learn_gives_one_empty_micro_batch():
    micro_batch = one([make_sample(advantage=0.0)], objectives.dr_grpo())
    assert micro_batch.batch.role.tolist() == [Role.IGNORED]
    assert micro_batch.batch.weight.tolist() == [0.0]
    assert one([], objectives.dr_grpo()).segment_lengths == (1,)


def tokens_of(samples, ranks: int, max_tokens: int) -> list[int]:
    """Tokens of each micro-batch; an empty one has 1."""
    packed = pack(samples, PackingConfig(max_tokens), objectives.trapo(), max_response_tokens=4096, ranks=ranks)
    return [sum(micro_batch.segment_lengths) for micro_batch in packed]


@pytest.mark.parametrize(("ranks", "problems", "max_tokens"), [(8, 8, 32768), (8, 16, 16384), (3, 16, 8192)])
def test_ranks_that_run_side_by_side_get_equally_many_tokens(ranks, problems, max_tokens):
    draw = random.Random(0)
    samples = [
        make_sample(index, prompt=100, completion=min(4096, 1 + int(draw.expovariate(1 / 1500))))
        for index in range(problems)
        for _ in range(8)
    ]
    tokens = tokens_of(samples, ranks, max_tokens)
    rounds = [tokens[start : start + ranks] for start in range(0, len(tokens), ranks)]
    assert {len(together) for together in rounds} == {ranks}
    assert max(tokens) <= max_tokens
    assert len(rounds) == -(-len(tokens_of(samples, 1, max_tokens)) // ranks)  # not one more than it takes
    assert sum(tokens) / (ranks * sum(map(max, rounds))) > 0.98  # first fit alone: 0.43, 0.85 and 0.99


def test_what_fits_only_first_fit_stays_within_the_budget():
    lengths = [5, 5, 4, 4, 3, 3, 3]  # into the lightest of 3: 8, 8 and 11; first fit: 9, 9 and 9
    samples = [make_sample(prompt=1, completion=length) for length in lengths]
    packed = pack(samples, PackingConfig(9), objectives.trapo(), max_response_tokens=MAX_RESPONSE, ranks=3)
    assert [sum(micro_batch.segment_lengths) for micro_batch in packed] == [9, 9, 9]


def test_every_rank_gets_a_micro_batch():
    assert tokens_of([make_sample(completion=4)], ranks=4, max_tokens=100) == [6, 1, 1, 1]
    assert tokens_of([], ranks=4, max_tokens=100) == [1, 1, 1, 1]


def test_bad_samples_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"one of problem 7 has 13 \(prompt 3, response 10\).*max_tokens to at least 13"):
        one([make_sample(7, completion=10)], objectives.trapo(), max_tokens=12)
    assert one([make_sample(7, completion=9)], objectives.trapo(), max_tokens=12).segment_lengths == (11,)
    with pytest.raises(ValueError, match="problem 4 has 0"):
        one([make_sample(4, prompt=0)], objectives.trapo())


def test_config_checks_its_fields():
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1"):
        PackingConfig(max_tokens=0)
    with pytest.raises(ValueError, match="aggregation must be one of constant, length"):
        PackingConfig(aggregation="mean")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation_weighs_as_it_says(aggregation):
    samples = [
        make_sample(0, completion=5, advantage=1.0),
        make_sample(0, completion=2, advantage=2.0),
        make_sample(1, prefix=3, completion=4, advantage=1.0),
    ]
    batch = one(samples, objectives.trapo(), aggregation).batch
    lengths, prompts = {0: 5, 1: 2, 2: 7}, {0: 7, 1: 7, 2: 7}
    for role, sequence, weight in zip(batch.role.tolist(), batch.sequence_id.tolist(), batch.weight.tolist(), strict=True):
        expected = {
            "constant": 1 / (3 * MAX_RESPONSE),
            "length": 1 / MAX_RESPONSE,
            "token_mean": 1 / 14,
            "role_mean": 1 / 3 if role == Role.EXPERT else 1 / 11,
            "sequence_mean": 1 / (3 * lengths[sequence]),
            "sequence_sum": 1 / 3,
            "prompt_mean": 1 / (2 * prompts[sequence]),
        }
        assert weight == pytest.approx(expected[aggregation])


def test_sequence_ids_name_the_samples_and_none_is_split():
    samples = mixed_samples()
    seen: list[int] = []
    for micro_batch in pack(samples, PackingConfig(24), objectives.trapo(), max_response_tokens=MAX_RESPONSE):
        ids = micro_batch.batch.sequence_id.unique().tolist()
        assert len(ids) == len(micro_batch.segment_lengths)
        for number in ids:
            response = (*samples[number].prefix_ids, *samples[number].completion_ids)
            assert micro_batch.batch.target[micro_batch.batch.sequence_id == number].tolist() == list(response)
        seen += ids
    assert sorted(seen) == list(range(len(samples)))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_sequences_and_prompts_without_a_trained_token_enter_no_denominator(aggregation):
    """Whole traces under an objective for rollouts, and unguided samples under one for expert tokens, change no weight."""
    rollouts = [make_sample(0, completion=5, advantage=1.0), make_sample(0, prefix=2, completion=2, advantage=-1.0)]
    traces = [make_sample(1, prefix=6, completion=0), make_sample(2, prefix=3, completion=0)]
    for objective, trained, other in ((objectives.dr_grpo(), rollouts, traces), (objectives.sft(), traces, rollouts[:1])):
        alone, among = (one(samples, objective, aggregation).batch for samples in (trained, trained + other))
        assert torch.equal(among.weight.sort().values, alone.weight.sort().values)
    bonus = objectives.dr_grpo(entropy_coef=0.1)  # which is of all response tokens
    batch = one(rollouts + traces, bonus, aggregation).batch
    assert len(batch) == 18
    if aggregation in ("sequence_mean", "prompt_mean", "token_mean"):
        assert float(batch.weight.sum()) == pytest.approx(1.0)
    every = torch.ones(4)
    weight = {  # of a token of each sequence: 5 and 2 + 2 tokens of one problem, 6 and 3 of two more
        "constant": every / (4 * MAX_RESPONSE),
        "length": every / MAX_RESPONSE,
        "sequence_mean": 1 / (4 * torch.tensor([5.0, 4.0, 6.0, 3.0])),
        "sequence_sum": every / 4,
        "prompt_mean": 1 / (3 * torch.tensor([9.0, 9.0, 6.0, 3.0])),
    }.get(aggregation, every / 18)
    torch.testing.assert_close(batch.entropy_weight, weight[batch.sequence_id])


def test_a_second_layer_trains_its_roles_too():
    sample = make_sample(prefix=3, completion=2, advantage=0.0)
    batch = one([sample], objectives.srft()).batch  # SFT trains the demonstration whatever its advantage
    assert batch.role.tolist() == [Role.EXPERT] * 3
    added = Objective(expert=objectives.luffy().expert, plus=objectives.dr_grpo())
    both = one([make_sample(prefix=3, completion=2, advantage=1.0)], added).batch
    assert both.role.tolist() == [Role.EXPERT] * 3 + [Role.ROLLOUT] * 2
    assert one([sample], added).batch.role.tolist() == [Role.IGNORED]


def test_expert_tokens_without_the_logprobs_that_an_objective_needs_are_refused():
    with pytest.raises(ValueError, match="objective exgrpo compares expert tokens with rollout_logprob.*such as luffy"):
        one([make_sample(), make_sample(prefix=3)], objectives.exgrpo())
    with pytest.raises(ValueError, match="compares expert tokens with rollout_logprob"):
        one([make_sample(prefix=3)], Objective(expert=objectives.sft().expert, plus=objectives.exgrpo()))
    assert len(one([make_sample()], objectives.exgrpo()).batch) == 4


def test_train_on_prompt_scores_every_token_but_the_first():
    sample = make_sample(prompt=3, prefix=4, completion=0, weight=0.5)
    config = PackingConfig(aggregation="token_mean", train_on_prompt=True)
    (micro_batch,) = pack([sample], config, objectives.sft(), max_response_tokens=MAX_RESPONSE)
    tokens = [*sample.problem.prompt_ids, *sample.prefix_ids]
    expert = micro_batch.batch.role == Role.EXPERT
    assert micro_batch.loss_positions[expert].tolist() == list(range(6))
    assert micro_batch.batch.target[expert].tolist() == tokens[1:]
    torch.testing.assert_close(micro_batch.batch.weight[expert], torch.full((6,), 1 / 6))


def test_prompts_are_not_trained_beside_a_layer_that_weighs_by_advantages():
    both = Objective(expert=objectives.sft().expert, plus=Objective(expert=objectives.luffy().expert))
    with pytest.raises(ValueError, match="weighs expert tokens by the advantage"):
        check_prompt_training(PackingConfig(train_on_prompt=True), both)
    check_prompt_training(PackingConfig(), both)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_masked_completion_carries_nothing_and_counts_nowhere(aggregation):
    samples = [
        make_sample(0, completion=5, advantage=1.0),
        replace(make_sample(0, completion=9, advantage=-1.0), masked=True, completion_logprobs=(float("nan"),) * 9),
        replace(make_sample(1, prefix=3, completion=6, advantage=2.0, weight=0.5), masked=True),
    ]
    batch = one(samples, objectives.trapo(entropy_coef=0.1), aggregation).batch
    assert sorted(batch.role.tolist()) == [Role.ROLLOUT] * 5 + [Role.EXPERT] * 3
    assert batch.rollout_logprob.isfinite().all()
    bonus = {  # of a rollout token and an expert token
        "constant": (1 / (2 * MAX_RESPONSE),) * 2,
        "length": (1 / MAX_RESPONSE,) * 2,
        "token_mean": (1 / 8,) * 2,
        "role_mean": (1 / 8,) * 2,  # all response tokens are one role to the bonus
        "sequence_mean": (1 / 10, 1 / 6),
        "sequence_sum": (1 / 2,) * 2,
        "prompt_mean": (1 / 10, 1 / 6),
    }[aggregation]
    weight = {  # before the copy's share of 1/2, by which its three tokens count, too, where tokens are averaged
        "token_mean": (1 / 6.5,) * 2,
        "role_mean": (1 / 5, 1 / 1.5),
        "prompt_mean": (1 / 10, 1 / 3),
    }.get(aggregation, bonus)
    expert = batch.role == Role.EXPERT
    torch.testing.assert_close(batch.weight, torch.where(expert, 0.5 * weight[1], weight[0]))
    torch.testing.assert_close(batch.entropy_weight, torch.where(expert, bonus[1], bonus[0]))


def test_a_step_of_masked_completions_is_an_empty_one():
    micro_batch = one([replace(make_sample(prompt=1, completion=30), masked=True)] * 2, objectives.trapo(), max_tokens=8)
    assert (micro_batch.segment_lengths, micro_batch.batch.role.tolist()) == ((1,), [Role.IGNORED])


def test_a_run_can_choose_every_aggregation_of_the_kernels():
    assert set(get_args(get_type_hints(PackingConfig)["aggregation"])) == set(AGGREGATIONS)
