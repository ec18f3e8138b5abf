"""Batches from the padded tensors [B, T] of RL frameworks: what a hand would have flattened, and the losses that they write."""

import inspect
import re
import textwrap
from dataclasses import fields, replace

import pytest
import torch

import trapo_kernels
from tests.trapo_kernels import cases
from trapo_kernels import LossTotals, Role, TokenBatch, aggregate, corrections, linear_policy_loss, objectives
from trapo_kernels.weights import AGGREGATIONS

B, T, D, V = 5, 7, 6, 40


def _padded():
    """Sequences of 7, 3, 0, 5 and 1 loss tokens, the fourth with a hole; padding holds NaN, and -100 for a target."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([7, 3, 0, 6, 1])[:, None]
    mask[3, 2] = False

    def draw():
        return torch.where(mask, -4 * torch.rand(B, T, generator=generator), torch.nan)

    target = torch.where(mask, torch.randint(V, (B, T), generator=generator), -100)
    streams = {name: draw() for name in ("old_logprob", "ref_logprob", "rollout_logprob")}
    streams["advantage"] = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.25])
    return {name: x.to(cases.DEVICE) for name, x in {"target": target, "mask": mask, **streams}.items()}


def _same(one, other):
    for field in fields(TokenBatch):
        x, y = getattr(one, field.name), getattr(other, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or (x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())), field.name


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_it_is_the_batch_flattened_by_hand(mode):
    given, prompt, share = _padded(), torch.tensor([3, 3, 3, 8, 8], device=cases.DEVICE), torch.rand(B, T, device=cases.DEVICE)
    b = TokenBatch.from_padded(**given, aggregation=mode, max_tokens=9, prompt_id=prompt, share=share)
    role = given["mask"].to(torch.uint8).flatten()
    sequence, answered = (x.repeat_interleave(T) for x in (torch.arange(B, device=cases.DEVICE), prompt))
    weight = aggregate(role, sequence, mode=mode, max_tokens=9, prompt_id=answered, share=share.flatten())
    logprobs = {name: given[name].flatten() for name in ("old_logprob", "ref_logprob", "rollout_logprob")}
    advantage = given["advantage"].repeat_interleave(T)
    _same(b, TokenBatch(given["target"].flatten(), role, advantage, weight, **logprobs, sequence_id=sequence))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_what_the_docstring_calls_equivalent_is(dtype):
    given = _padded()
    given = {name: given[name] for name in ("target", "mask", "old_logprob")} | {"aggregation": "sequence_mean"}
    given |= {"advantage": torch.rand(B, T, device=cases.DEVICE), "mask": given["mask"].to(dtype)}
    text = inspect.cleandoc(TokenBatch.from_padded.__doc__)
    snippet = textwrap.dedent(re.search(r"Equivalent to[^\n]*:\n\n((?: {4}.*\n)+)", text)[1])
    names = vars(trapo_kernels) | {"torch": torch} | given
    with torch.device(cases.DEVICE):
        exec(snippet, names)
    _same(TokenBatch.from_padded(**given), names["batch"])


def _head():
    hidden, weight, _ = cases.head(B * (T + 1), D, V)
    return hidden.detach().view(B, T + 1, D).requires_grad_(), weight


def _plain_grpo(hidden, weight, target, mask, old_logprob, ref_logprob, advantage, beta=0.04, epsilon=0.2, factor=None):
    """As TRL writes it: the mean over sequences of their token means."""
    log_p = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    logprob = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    ratio = torch.exp(logprob - old_logprob.nan_to_num())
    of_token = -torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantage[:, None])
    of_token = of_token if factor is None else of_token * factor.nan_to_num()
    d = ref_logprob.nan_to_num() - logprob
    of_token = of_token + beta * (d.exp() - d - 1)
    return ((of_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def _close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)  # weights are fp32


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("how", ["at once", "with totals", "by rows"])
def test_grpo_over_padded_tensors_however_they_are_split(how, backend):
    given, (hidden, weight) = _padded(), _head()
    given.pop("rollout_logprob")
    expected = _plain_grpo(hidden, weight, **given)
    totals = LossTotals(rollout_tokens=given["mask"].sum(), sequences=B)
    parts = [slice(0, B)] if how == "at once" else [slice(0, 2), slice(2, 3), slice(3, B)]
    whole = TokenBatch.from_padded(**given, aggregation="sequence_mean")
    loss = 0.0
    for part in parts:
        if how == "by rows":
            batch = whole.rows(slice(part.start * T, part.stop * T))
        else:
            some = {name: x[part] for name, x in given.items()}
            batch = TokenBatch.from_padded(**some, aggregation="sequence_mean", totals=None if how == "at once" else totals)
        flat = hidden[part, :-1].flatten(0, 1)
        loss = loss + linear_policy_loss(flat, weight, batch, objectives.grpo(beta=0.04), backend=backend).loss
    _close([loss, *cases.gradients(loss, (hidden, weight))], [expected, *cases.gradients(expected, (hidden, weight))])


@pytest.mark.parametrize("n", [44.6667, 5])
def test_a_normaliser_that_is_no_count_of_the_step_divides_the_mask(n):
    """As TRL's dapo has it: the items of a generation over ranks and steps, and the error of totals says."""
    given, (hidden, weight) = _padded(), _head()
    logprob = (hidden[:, :-1] @ weight.T).log_softmax(-1).gather(-1, given["target"].clamp(min=0)[..., None])[..., 0]
    ratio, mask, a = torch.exp(logprob - given["old_logprob"].nan_to_num()), given["mask"], given["advantage"][:, None]
    expected = -(torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * mask).sum() / n
    role, a = mask.to(torch.uint8).flatten(), given["advantage"].repeat_interleave(T)
    batch = TokenBatch(given["target"].flatten(), role, a, weight=mask.flatten() / n, old_logprob=given["old_logprob"].flatten())
    out = linear_policy_loss(hidden[:, :-1].flatten(0, 1), weight, batch, objectives.dapo())
    _close([out.loss, *cases.gradients(out.loss, (hidden, weight))], [expected, *cases.gradients(expected, (hidden, weight))])
    if cases.DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"weight=mask / n"):
            TokenBatch.from_padded(**given, aggregation="token_mean", totals=LossTotals(rollout_tokens=torch.tensor(n)))


def _factor(kind, given):
    """ρ of the sampler, [B] or [B, T], as frameworks have it: NaN in the padding, and 0 on tokens that a mask takes out."""
    log_ratio = torch.linspace(-1.5, 1.5, B * T, device=cases.DEVICE).view(B, T)
    role, old, sampled = given["mask"].to(torch.uint8).flatten(), given["old_logprob"], given["old_logprob"] - log_ratio
    if kind == "[B]":
        return torch.tensor([0.5, 2.0, 0.0, 0.0, 1.5], device=cases.DEVICE)
    limit = {"cap": 1.3} if kind == "tis" else {"high": 1.3}
    factor = getattr(corrections, kind)(role, old.flatten(), sampled.flatten(), **limit).view(B, T)
    return torch.where(given["mask"], factor, torch.nan)


@pytest.mark.parametrize("kind", ["tis", "icepop", "[B]"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_correction_is_in_the_weight_alone_as_the_trainer_has_it(mode, kind):
    given, prompt, share = _padded(), torch.tensor([3, 3, 3, 8, 8], device=cases.DEVICE), torch.rand(B, T, device=cases.DEVICE)
    factor, options = _factor(kind, given), {"aggregation": mode, "max_tokens": 9, "prompt_id": prompt, "share": share}
    plain = TokenBatch.from_padded(**given, **options)
    of_token = (factor if factor.ndim == 2 else factor[:, None].expand(B, T)).flatten()
    by_hand = replace(plain, weight=plain.weight * of_token.nan_to_num(), kl_weight=plain.weight, entropy_weight=plain.weight)
    _same(TokenBatch.from_padded(**given, **options, correction=factor), by_hand)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["tis", "icepop", "[B]"])
def test_a_correction_leaves_kl_and_entropy_bonus_as_trl_and_verl_write_them(kind, backend):
    given, (hidden, weight) = _padded(), _head()
    given.pop("rollout_logprob")
    factor, mask = _factor(kind, given), given["mask"]
    plain = _plain_grpo(hidden, weight, **given, beta=0.3, factor=factor if factor.ndim == 2 else factor[:, None])
    log_p = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = plain - 0.1 * ((entropy * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    b = TokenBatch.from_padded(**given, aggregation="sequence_mean", correction=factor)
    objective = objectives.grpo(beta=0.3, entropy_coef=0.1)
    out = linear_policy_loss(hidden[:, :-1].flatten(0, 1), weight, b, objective, backend=backend)
    _close([out.loss, *cases.gradients(out.loss, (hidden, weight))], [expected, *cases.gradients(expected, (hidden, weight))])
    assert out.metrics["rollout/kl_count"] == mask.sum()


def test_a_token_of_factor_0_is_skipped_where_neither_kl_nor_bonus_reads_it():
    given = _padded()
    b = TokenBatch.from_padded(**given, aggregation="token_mean", correction=_factor("[B]", given))
    assert torch.equal(b.active.view(B, T), given["mask"])
    alone = replace(b, kl_weight=None, entropy_weight=None)
    kept = torch.tensor([True, True, False, False, True], device=cases.DEVICE)[:, None]
    assert torch.equal(alone.active.view(B, T), given["mask"] & kept)


def test_expert_tokens_are_trained_as_cross_entropy_does():
    given, (hidden, weight) = _padded(), _head()
    b = TokenBatch.from_padded(given["target"], given["mask"], aggregation="token_mean", role=Role.EXPERT)
    out = linear_policy_loss(hidden[:, :-1].flatten(0, 1), weight, b, objectives.sft())
    logits = (hidden[:, :-1] @ weight.T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, given["target"].flatten())
    _close([out.loss, *cases.gradients(out.loss, (hidden, weight))], [expected, *cases.gradients(expected, (hidden, weight))])


def test_roles_may_differ_from_token_to_token():
    given = _padded()
    role = (1 + torch.arange(B * T, device=cases.DEVICE).view(B, T) % 2).to(torch.uint8)
    b = TokenBatch.from_padded(given["target"], given["mask"], aggregation="role_mean", role=role)
    assert torch.equal(b.role.view(B, T), torch.where(given["mask"], role, Role.IGNORED))


@pytest.mark.skipif(cases.DEVICE != "cpu", reason="a GPU is not asked what a mask holds")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": torch.zeros(T, dtype=torch.int64)},
            r"target must be a tensor of shape \[B, T\], got torch\.int64 \[7\]",
        ),
        (
            {"mask": None},
            r"mask must be a tensor of shape \[B, T\] = \[5, 7\] on cpu, as target is, got NoneType\. Pass the loss mask",
        ),
        ({"mask": torch.ones(B, T + 1)}, r"mask must be .*, got torch\.float32 \[5, 8\] on cpu\. Cut it to the tokens"),
        ({"mask": torch.full((B, T), 2)}, r"mask must hold 0 and 1, got 2\. Pass mask != 0; a factor"),
        ({"mask": torch.full((B, T), torch.nan)}, r"mask must hold 0 and 1, got nan"),
        (
            {"advantage": torch.ones(T)},
            r"advantage must be .* \[B\] = \[5\] or \[B, T\] = \[5, 7\] on cpu.*got .*\[7\]",
        ),
        (
            {"advantage": torch.ones(B, 1)},
            r"advantage must be .*got torch\.float32 \[5, 1\] on cpu\. Drop its last axis with advantage\.squeeze\(1\)\.$",
        ),
        ({"prompt_id": torch.zeros(B, 1, dtype=torch.int64)}, r"Drop its last axis with prompt_id\.squeeze\(1\)\.$"),
        ({"old_logprob": torch.ones(B, 1)}, r"old_logprob must be .*\. Cut it to the tokens"),
        ({"advantage": [1.0] * B}, r"advantage must be a tensor of .* got list\. Make it a tensor, torch\.as_tensor\(advantage"),
        ({"old_logprob": torch.ones(B)}, r"old_logprob must be a tensor of shape \[B, T\] = \[5, 7\] on cpu"),
        ({"prompt_id": torch.zeros(B, T, dtype=torch.int64)}, r"prompt_id must be a tensor of shape \[B\] = \[5\] on cpu"),
        ({"role": Role.IGNORED}, r"role must be one of 1, 2, got 0"),
        ({"role": torch.ones(B, dtype=torch.uint8)}, r"role must be a tensor of shape \[B, T\] = \[5, 7\]"),
        ({"role": torch.ones(B, T, dtype=torch.int64)}, r"role must be torch\.uint8, got torch\.int64\. Convert it"),
        ({"aggregation": "mean"}, r"aggregation must be one of 'constant', .*, got 'mean'"),
        ({"aggregation": "constant"}, r'aggregate: mode "constant" needs an integer max_tokens > 0, got None'),
        ({"old_logprob": torch.ones(B, T, requires_grad=True)}, r"old_logprob is a constant of the loss.*Detach it"),
        (
            {"correction": corrections.tis(torch.ones(B * T, dtype=torch.uint8), torch.zeros(B * T), torch.zeros(B * T))},
            r"correction must be .*got .* \[35\] on cpu\. Restore its axes with correction\.reshape\(target\.shape\)\.$",
        ),
        ({"old_logprob": torch.ones(B * T)}, r"Restore its axes with old_logprob\.reshape\(target\.shape\)\.$"),
        ({"old_logprob": torch.ones(B * T, device="meta")}, r"old_logprob\.reshape\(target\.shape\)\.to\(target\.device\)\.$"),
        ({"prompt_id": torch.zeros(B * T, dtype=torch.int64)}, r"prompt_id must be .*\. Cut it to the tokens"),
        ({"correction": torch.ones(T)}, r"correction must be a tensor of shape \[B\] = \[5\] or \[B, T\] = \[5, 7\] on cpu"),
        (
            {"correction": torch.ones(B, dtype=torch.bfloat16)},
            r"from_padded: correction must be torch\.float32 .*got torch\.bfloat16\. Convert it",
        ),
        ({"correction": torch.full((B, T), torch.nan)}, r"weight must be finite, got nan at row 0"),
        ({"advantage": torch.ones(B, dtype=torch.int64)}, r"advantage must be torch\.float32 .*got torch\.int64\. Convert it"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TokenBatch.from_padded(**({**_padded(), "aggregation": "token_mean"} | changes))
