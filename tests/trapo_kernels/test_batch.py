"""The packer's arithmetic: every normaliser is a weight, and totals make any split add up."""

import copy
import pickle
import re
from dataclasses import fields, replace

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors  # what FSDP2 casts inputs with

from tests.trapo_kernels import cases
from trapo_kernels import LossTotals, Role, TokenBatch, aggregate, linear_policy_loss, loss_totals, objectives, silenced_weight
from trapo_kernels.weights import _DIVISORS, AGGREGATIONS

# Sequences 0: 1 ignored, 2 expert, 2 rollout · 1: 3 rollout · 2: 1 expert, 1 rollout
ROLE = torch.tensor([0, 2, 2, 1, 1, 1, 1, 1, 2, 1], dtype=torch.uint8)
SEQUENCE = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
PROMPT = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4, 9, 9])  # sequences 0 and 1 answer one prompt


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("constant", [0] + [1 / (3 * 8)] * 9),
        ("token_mean", [0] + [1 / 9] * 9),
        ("role_mean", [0, 1 / 3, 1 / 3] + [1 / 6] * 5 + [1 / 3, 1 / 6]),
        ("sequence_mean", [0] + [1 / 12] * 4 + [1 / 9] * 3 + [1 / 6] * 2),
        ("sequence_sum", [0] + [1 / 3] * 9),
        ("length", [0] + [1 / 8] * 9),
        ("prompt_mean", [0] + [1 / 14] * 7 + [1 / 4] * 2),
    ],
)
def test_weights(mode, expected):
    torch.testing.assert_close(aggregate(ROLE, SEQUENCE, mode=mode, max_tokens=8, prompt_id=PROMPT), torch.tensor(expected))


def test_every_mode_is_tested_above():
    tested = next(mark for mark in test_weights.pytestmark if mark.name == "parametrize").args[1]
    assert {mode for mode, _ in tested} == set(AGGREGATIONS)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_parts_with_the_totals_of_the_whole_equal_the_whole(mode):
    whole = aggregate(ROLE, SEQUENCE, mode=mode, max_tokens=8, prompt_id=PROMPT)
    parts = [slice(0, 8), slice(8, 10)] if mode == "prompt_mean" else [slice(0, 5), slice(5, 8), slice(8, 10)]
    totals = sum((loss_totals(ROLE[p], SEQUENCE[p]) for p in parts), LossTotals(0, 0, 0))
    assert totals == loss_totals(ROLE, SEQUENCE)
    if mode == "prompt_mean":
        totals = sum((loss_totals(ROLE[p], SEQUENCE[p], PROMPT[p]) for p in parts), LossTotals(0, 0, 0))
        assert totals == loss_totals(ROLE, SEQUENCE, PROMPT)
    split = [aggregate(ROLE[p], SEQUENCE[p], mode=mode, max_tokens=8, totals=totals, prompt_id=PROMPT[p]) for p in parts]
    assert torch.equal(torch.cat(split), whole)


@pytest.mark.parametrize("mode", ["sequence_mean", "sequence_sum", "constant", "prompt_mean", "token_mean"])
def test_padding_with_a_negative_id_is_no_sequence(mode):
    role, sequence = torch.cat([ROLE, ROLE.new_zeros(3)]), torch.cat([SEQUENCE, torch.full((3,), -1)])
    prompt = torch.cat([PROMPT, torch.full((3,), -1)])
    padded = aggregate(role, sequence, mode=mode, max_tokens=8, prompt_id=prompt)
    plain = aggregate(ROLE, SEQUENCE, mode=mode, max_tokens=8, prompt_id=PROMPT)
    assert torch.equal(padded[:-3], plain) and (padded[-3:] == 0).all()


def test_a_sequence_whose_tokens_are_all_ignored_counts_and_padding_does_not():
    role = torch.tensor([1, 0, 0], dtype=torch.uint8)
    for label in (torch.tensor([0, 1, -1]), torch.tensor([1, 0, -1])):
        assert loss_totals(role, label, label) == LossTotals(rollout_tokens=1, sequences=2, prompts=2)


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU's tensors share no memory with numpy")
def test_a_write_that_counts_no_version_is_noticed():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed, whose writes these are")
    hidden, weight, _ = cases.head(4, 6, 20, torch.float32)
    shared = numpy.array([1, 0, 0, 0], numpy.float32)
    b = TokenBatch(torch.arange(4), torch.full((4,), 2, dtype=torch.uint8), None, torch.from_numpy(shared))
    assert b.active_rows.tolist() == [0]
    shared[:] = 1
    assert b.active_rows.tolist() == [0, 1, 2, 3]
    b.weight.data[1] = 0
    losses = [linear_policy_loss(hidden, weight, b, objectives.sft(), backend=backend).loss for backend in ("native", "reference")]
    torch.testing.assert_close(*losses)


def test_totals_add_up_with_sum():
    parts = [loss_totals(ROLE, SEQUENCE, PROMPT)] * 2
    assert sum(parts) == sum(parts, LossTotals()) == parts[0] + parts[1]
    assert sum([], LossTotals()) == LossTotals()
    with pytest.raises(TypeError, match="unsupported operand"):
        LossTotals(1) + 3
    with pytest.raises(TypeError, match="loss_totals: role must be torch.uint8, got torch.bool"):
        loss_totals(ROLE > 0, SEQUENCE)
    with pytest.raises(ValueError, match=r"loss_totals: prompt_id must have shape .*, got"):
        loss_totals(ROLE, SEQUENCE, PROMPT[1:])


def test_share_multiplies_and_is_not_counted():
    share = torch.where(ROLE == Role.EXPERT, 0.5, 1.0)
    plain = aggregate(ROLE, SEQUENCE, mode="token_mean")
    torch.testing.assert_close(aggregate(ROLE, SEQUENCE, mode="token_mean", share=share), plain * share)


def test_a_share_over_its_mean_takes_the_mean_over_copies_as_over_one():
    """Sequences 0 and 1 begin with copies of one prefix of 2 expert tokens, sequence 2 with another of 1."""
    role = torch.tensor([2, 2, 1, 2, 2, 1, 2, 1], dtype=torch.uint8)
    mine = role == Role.EXPERT
    share = torch.where(mine & (torch.arange(8) < 6), 0.5, 1.0)
    weight = aggregate(role, mode="role_mean", share=torch.where(mine, share / share[mine].mean(), share))
    torch.testing.assert_close(weight, torch.where(mine, share / 3, 1 / 3))


def test_a_role_without_tokens_and_an_empty_batch_give_no_nan():
    only_rollouts = torch.ones(3, dtype=torch.uint8)
    assert torch.isfinite(aggregate(only_rollouts, torch.zeros(3, dtype=torch.int64), mode="role_mean")).all()
    empty = torch.zeros(0, dtype=torch.uint8)
    assert aggregate(empty, torch.zeros(0, dtype=torch.int64), mode="sequence_mean").shape == (0,)


@pytest.mark.parametrize("mode", ["token_mean", "role_mean", "length", "prompt_mean"])
def test_sequences_are_asked_for_where_a_mode_divides_by_them_and_nowhere_else(mode):
    arguments = {"mode": mode, "max_tokens": 8, "prompt_id": PROMPT}
    assert torch.equal(aggregate(ROLE, **arguments), aggregate(ROLE, SEQUENCE, **arguments))


@pytest.mark.parametrize("mode", ["constant", "sequence_mean", "sequence_sum"])
def test_a_mode_that_divides_by_sequences_needs_them(mode):
    with pytest.raises(ValueError, match=f'mode "{mode}" needs sequence_id .* got None. Pass the sequence of every token'):
        aggregate(ROLE, mode=mode, max_tokens=8)
    with pytest.raises(ValueError, match="got sequences = 0 where this call has 3"):
        aggregate(ROLE, SEQUENCE, mode=mode, max_tokens=8, totals=LossTotals(100, 100))


def test_a_count_of_tokens_at_hand_is_a_total():
    weight = aggregate(ROLE, mode="token_mean", totals=LossTotals(expert_tokens=100))
    torch.testing.assert_close(weight, (ROLE != 0) / 100)


@pytest.mark.parametrize("count", [100, 100.0, "int64", "float32", torch.tensor(100), torch.tensor([100.0])])
def test_a_count_is_a_whole_number_of_any_kind(count):
    if isinstance(count, str):
        count = getattr(pytest.importorskip("numpy", reason="numpy is not installed, whose number this is"), count)(100)
    weight = aggregate(ROLE, mode="token_mean", totals=LossTotals(rollout_tokens=count) + LossTotals(expert_tokens=0))
    torch.testing.assert_close(weight, (ROLE != 0) / 100)


@pytest.mark.parametrize("field", [field.name for field in fields(LossTotals)])
@pytest.mark.parametrize(
    "count", [None, 30.5, -1, float("nan"), float("inf"), "30", torch.tensor(30.5), torch.tensor(-1), torch.tensor([1, 2])], ids=str
)
def test_a_count_that_is_none_is_refused(count, field):
    got = re.escape(repr(count))
    rule, remedy = rf"^LossTotals: {field} must be a whole number ≥ 0, got {got}\.", "Pass the count .*totals=None.*weight=mask / n"
    with pytest.raises(ValueError, match=f"{rule} {remedy}"):
        LossTotals(**{field: count})


def test_unknown_mode_and_missing_length_are_refused():
    with pytest.raises(ValueError, match="mode must be one of .*got 'mean'"):
        aggregate(ROLE, SEQUENCE, mode="mean")
    for mode in ("constant", "length"):
        with pytest.raises(ValueError, match=f'mode "{mode}" needs an integer max_tokens > 0, got None'):
            aggregate(ROLE, SEQUENCE, mode=mode)
    with pytest.raises(ValueError, match="needs an integer max_tokens > 0, got nan"):
        aggregate(ROLE, SEQUENCE, mode="length", max_tokens=float("nan"))
    with pytest.raises(ValueError, match=r"share must have shape \[N\]"):
        aggregate(ROLE, SEQUENCE, mode="token_mean", share=torch.ones(len(ROLE), 1))
    with pytest.raises(ValueError, match=r"sequence_id must have shape \[N\]"):
        aggregate(ROLE, SEQUENCE[:2], mode="token_mean")
    with pytest.raises(ValueError, match="needs prompt_id .* got None"):
        aggregate(ROLE, SEQUENCE, mode="prompt_mean")
    with pytest.raises(ValueError, match="totals must count all micro-batches and ranks.*got prompts = 0 where this call has"):
        aggregate(ROLE, SEQUENCE, mode="prompt_mean", prompt_id=PROMPT, totals=loss_totals(ROLE, SEQUENCE))
    with pytest.raises(ValueError, match="totals must count all .* got tokens = 0 where"):
        aggregate(ROLE, SEQUENCE, mode="token_mean", totals=LossTotals(0, 0, 0))
    with pytest.raises(ValueError, match=r"A normaliser n that is no such count goes into the weight: .*weight=mask / n\)\.$"):
        aggregate(ROLE, SEQUENCE, mode="token_mean", totals=LossTotals(rollout_tokens=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["token_mean", "role_mean", "sequence_mean", "prompt_mean", "constant"])
def test_weights_do_not_depend_on_the_default_dtype(mode, dtype):
    role = torch.tensor([1, 2], dtype=torch.uint8).repeat(40000)
    arguments = {"mode": mode, "prompt_id": torch.arange(80000) // 600, "max_tokens": torch.tensor(300)}
    expected = aggregate(role, torch.arange(80000) // 300, **arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        weight = aggregate(role, torch.arange(80000) // 300, **arguments, share=torch.ones(80000, dtype=torch.float64))
    finally:
        torch.set_default_dtype(before)
    assert weight.dtype == torch.float32 and torch.equal(weight, expected) and weight.min() > 0


def test_active_rows_are_found_once_and_move_with_the_batch():
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0])
    b = TokenBatch(
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([0, 1, 1, 2], dtype=torch.uint8),
        torch.ones(4),
        weight,
        entropy_weight=torch.tensor([1.0, 0.0, 0.0, 0.5]),
    )
    assert b.active_rows.tolist() == [1, 3]
    assert b.to(cases.DEVICE).active_rows.tolist() == [1, 3]
    assert b.to(cases.DEVICE).silent_rows.tolist() == b.silent_rows.tolist() == (b.role.bool() & ~b.active).nonzero()[:, 0].tolist()


def test_what_casts_or_replaces_fields_makes_a_batch_of_its_own():
    """FSDP2 rebuilds a dataclass from all of its fields when it casts the inputs of a forward."""
    b = TokenBatch(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.uint8), torch.ones(2), torch.tensor([0.0, 1.0]))
    same = _apply_to_tensors(lambda x: x, b)
    assert same is not b and torch.equal(same.active_rows, b.active_rows)
    assert replace(b, weight=torch.ones(2)).active_rows.tolist() == [0, 1]
    with pytest.raises(TypeError, match="advantage must be torch.float32 .*got torch.bfloat16. If FSDP's mixed precision cast it"):
        _apply_to_tensors(lambda x: x.bfloat16() if x.is_floating_point() else x, b)


def test_a_batch_whose_tensors_were_written_to_finds_its_active_rows_anew():
    """As where one batch is filled again and again."""
    weight = torch.tensor([1.0, 0.0, 1.0])
    b = TokenBatch(torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 1], dtype=torch.uint8), torch.ones(3), weight)
    assert b.active_rows.tolist() == [0, 2]
    weight.fill_(1.0)
    assert b.active_rows.tolist() == [0, 1, 2]
    b.role[0] = Role.IGNORED
    assert b.active_rows.tolist() == [1, 2]
    bonus = replace(b, weight=torch.zeros(3), entropy_weight=torch.tensor([0.0, 1.0, 0.0]))
    assert bonus.active_rows.tolist() == [1]
    bonus.entropy_weight.fill_(1.0)
    assert bonus.active_rows.tolist() == [1, 2]
    told = b.with_active_rows(torch.tensor([1, 2]))
    told.weight[2] = 0.0
    assert told.active_rows.tolist() == [1]
    with torch.inference_mode():
        inference = TokenBatch(b.target * 0, b.role + 0, b.advantage + 0, weight + 0)
        assert inference.active_rows.tolist() == [1]
        inference.weight.fill_(1.0)
        assert inference.active_rows.tolist() == [1, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_batch_notices_writes_as_well(copied):
    """Its tensors begin to count their writes anew."""
    role, weight = torch.zeros(3, dtype=torch.uint8), torch.zeros(3)
    role[:], weight[1:] = Role.EXPERT, 1.0
    again = copied(TokenBatch(torch.zeros(3, dtype=torch.int64), role, torch.ones(3), weight))
    assert again.active_rows.tolist() == [1, 2]
    again.weight.fill_(1.0)
    assert again.active_rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("cut", ["slices", "indices"])
@pytest.mark.parametrize("name", ["trapo", "grpo", "gspo"])  # one pass, and two that pool over sequences
def test_losses_and_gradients_of_rows_add_up_to_those_of_the_whole(name, cut):
    hidden, weight, _ = cases.head(60, 6, 40)
    objective, sequence = objectives.PRESETS[name](entropy_coef=0.1), torch.arange(60, device=cases.DEVICE) // 12
    b = cases.batch(60, 40, sequence_id=sequence, kl_weight=torch.rand(60, dtype=torch.float64))
    b = replace(b, weight=torch.where(sequence == 2, 0.0, b.weight))
    parts = [slice(0, 24), slice(24, 24), slice(24, 60)] if cut == "slices" else cases.whole_sequences(b, 3)
    whole = linear_policy_loss(hidden, weight, b, objective).loss
    loss = sum(linear_policy_loss(hidden[part], weight, b.rows(part), objective).loss for part in parts)
    for ours, expected in zip(
        [loss, *cases.gradients(loss, (hidden, weight))], [whole, *cases.gradients(whole, (hidden, weight))], strict=True
    ):
        assert cases.error(ours, expected) < 1e-14


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked which rows are active")
@pytest.mark.parametrize("index", [slice(2, 8), slice(None, None, 3), torch.tensor([9, 0, 4, 5])], ids=str)
def test_rows_find_what_is_active_and_scored_among_them(index):
    row = torch.arange(10)
    b = cases.batch(10, 40, roles=(1, 2), weight=(row % 2).double(), entropy_weight=None, scored_rows=torch.tensor([8, 0, 4]))
    part, old = b.rows(index), row[index]
    assert torch.equal(part.target, b.target[index]) and torch.equal(part.old_logprob, b.old_logprob[index])
    assert old[part.active_rows].tolist() == [i for i in old.tolist() if i % 2]
    assert old[part.scored_rows].tolist() == [i for i in old.tolist() if i in (0, 4, 8)]
    assert old[part.silent_rows].tolist() == [i for i in old.tolist() if i in (2, 6)]
    assert part.entropy_weight is None


@pytest.mark.parametrize("index", [3, [3], torch.tensor([True] * 10), torch.tensor([[3]]), torch.tensor([3.0])], ids=str)
def test_rows_are_a_slice_or_indices(index):
    with pytest.raises(TypeError, match=r"^TokenBatch.rows: index must be a slice or int64 of shape \[M\] on .*, got .*Pass slice"):
        cases.batch(10, 40).rows(index)


def test_rows_backwards_are_indices():
    b = cases.batch(10, 40)
    with pytest.raises(ValueError, match=r"^TokenBatch.rows: a slice must have a step of at least 1, got -1\. Pass the rows as"):
        b.rows(slice(None, None, -1))
    assert torch.equal(b.rows(torch.arange(10, device=cases.DEVICE).flip(0)).target, b.target.flip(0))


@pytest.mark.parametrize("non_blocking", [True, False])
def test_a_batch_moves_as_a_tensor_does(non_blocking):
    b = cases.batch(10, 40, device="cpu")
    there = b.to(cases.DEVICE, non_blocking=non_blocking)
    assert there.target.device.type == cases.DEVICE and torch.equal(there.to("cpu", non_blocking=True).target, b.target)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_mode_divides_by_the_totals_that_it_asks_for_and_no_other(mode):
    arguments = {"mode": mode, "max_tokens": 8, "prompt_id": PROMPT}
    plain = loss_totals(ROLE, SEQUENCE, PROMPT)
    for field in fields(LossTotals):
        more = replace(plain, **{field.name: 2 * getattr(plain, field.name)})
        changed = not torch.equal(aggregate(ROLE, SEQUENCE, **arguments, totals=more), aggregate(ROLE, SEQUENCE, **arguments))
        counts = {field.name, "tokens"} if field.name.endswith("tokens") else {field.name}
        assert changed == bool(counts & set(_DIVISORS[mode])), field.name


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_a_silenced_weight_changes_no_gradient(name):
    hidden, weight, _ = cases.head(62, 6, 40)
    b = cases.batch(62, 40, kl_weight=torch.rand(62, dtype=torch.float64))
    b = replace(b, advantage=torch.where(b.advantage.abs() < 1, 0.0, b.advantage))
    for objective in (objectives.PRESETS[name](entropy_coef=0.1), objectives.PRESETS[name](entropy_coef=0.0)):
        silenced = replace(b, weight=silenced_weight(b.role, b.weight, b.advantage, objective))
        grads = [
            cases.gradients(linear_policy_loss(hidden, weight, batch, objective).loss, (hidden, weight)) for batch in (b, silenced)
        ]
        for ours, expected in zip(*grads, strict=True):
            assert cases.error(ours, expected) < 1e-14


@pytest.mark.parametrize(
    ("objective", "kept"),
    [
        (objectives.trapo(), [1, 3, 4]),
        (objectives.luffy(), [1, 4]),
        (objectives.grpo(), [1, 3, 4]),
        (objectives.grpo(beta=0.1), [0, 1, 3, 4]),
        (objectives.sft(), [0, 1, 3, 4]),
    ],
    ids=["trapo", "luffy", "grpo", "grpo with a KL", "sft"],
)
def test_tokens_without_advantage_are_silenced_where_nothing_else_trains_them(objective, kept):
    role = torch.tensor([1, 1, 0, 2, 2], dtype=torch.uint8, device=cases.DEVICE)
    advantage = torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0], device=cases.DEVICE)
    weight = silenced_weight(role, (role > 0).float(), advantage, objective)
    assert weight.nonzero().squeeze(1).tolist() == kept


def test_what_reads_no_advantage_silences_nothing_without_one_and_what_reads_it_says_so():
    role, weight = torch.tensor([1, 0, 2], dtype=torch.uint8, device=cases.DEVICE), torch.ones(3, device=cases.DEVICE)
    assert torch.equal(silenced_weight(role, weight, None, objectives.sft()), weight)
    with pytest.raises(TypeError, match=r"advantage must be a tensor .*, got NoneType\. Pass one value per token\.$"):
        silenced_weight(role, weight, None, objectives.grpo())
    with pytest.raises(ValueError, match=r"silenced_weight: weight must have shape .*, got"):
        silenced_weight(role, weight[1:], weight, objectives.grpo())
    with pytest.raises(TypeError, match=r"silenced_weight: role must be torch\.uint8, got torch\.bool"):
        silenced_weight(role > 0, weight, weight, objectives.grpo())


@pytest.mark.parametrize(
    ("given", "kind"), [("grpo", r"str\. Pass objectives\.grpo"), (objectives.grpo, r"function\. Pass what it returns, grpo")]
)
def test_what_is_no_objective_is_refused_by_its_kind(given, kind):
    role, weight = torch.tensor([1], dtype=torch.uint8), torch.ones(1)
    with pytest.raises(TypeError, match=rf"objective must be an Objective, got {kind}\(\)\.$"):
        silenced_weight(role, weight, weight, given)


@pytest.mark.parametrize("role", ["Rollout", "rollout", Role.IGNORED])
def test_only_roles_that_train_live_by_something(role):
    assert objectives.grpo().lives_by_advantage(Role.ROLLOUT) and not objectives.grpo().lives_by_advantage(Role.EXPERT)
    with pytest.raises(ValueError, match=r"role must be one of 1, 2, got "):
        objectives.grpo().lives_by_advantage(role)
