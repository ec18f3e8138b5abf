"""The per-token arithmetic of an objective on [N] vectors: streams, coefficients dL/dlogp and dL/dH, loss and metrics.

Everything here costs O(N), nothing against the [N, V] work; the compiled kernels repeat only `coefficients`, inside their sweep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trapo_kernels.batch import TokenBatch
from trapo_kernels.gates import GATES, Gate, One, Truncate
from trapo_kernels.objective import KL, KL_ESTIMATORS, Objective, Term
from trapo_kernels.roles import Role
from trapo_kernels.sequence import Reduced, Sequences, Tokens

_MAX_PARAMETERS = 3  # of a gate
SELF = float("inf")  # an anchor that stands for the policy itself; no logprob is +inf, and NaN is left to mean trouble


@dataclass(frozen=True)
class Streams:
    """A batch seen through an objective: all that the coefficient of a token needs besides its logprob; tensors are [N].

    `anchor` is what logp is compared with (0 for anchor zero; +inf stands for logp itself: "self", and weight 0), `signal` =
    weight · scale · (advantage or 1), `advantage` = what chooses the side of a clip (1 where the signal is "one"), `kl_weight` = β
    · the KL's weight on rollout tokens, `grad_entropy` = -entropy_coef · entropy weight.
    """

    role: Tensor  # uint8, IGNORED on rows that cannot contribute
    anchor: Tensor
    signal: Tensor
    advantage: Tensor
    kl_weight: Tensor | None
    ref_logprob: Tensor | None
    grad_entropy: Tensor


def streams(batch: TokenBatch, objective: Objective, dtype: torch.dtype = torch.float32) -> Streams:
    """Fold scales, anchors and normalisers of `objective` into per-token vectors of `dtype`."""
    active = batch.active
    role = torch.where(active, batch.role, Role.IGNORED)
    weight = batch.weight.to(dtype)
    advantage = torch.zeros_like(weight)
    if batch.advantage is not None:
        advantage = torch.where(weight == 0, 0.0, batch.advantage.to(dtype))  # unread there, NaN included
    anchor, signal = torch.zeros_like(weight), torch.zeros_like(weight)
    for code, term in ((Role.EXPERT, objective.expert), (Role.ROLLOUT, objective.rollout)):
        if term is None:
            continue
        mine = role == code
        amount = weight * term.scale
        if term.signal == "one":
            advantage = torch.where(mine, 1.0, advantage)
        signal = torch.where(mine, amount * advantage, signal)
        anchor = torch.where(mine, _anchor(term, batch, weight), anchor)
    entropy_weight = batch.weight_of_entropy.to(dtype)
    kl_weight = ref_logprob = None
    unread = weight == 0  # by its term
    if objective.kl is not None:
        kl_weight = torch.where(role == Role.ROLLOUT, objective.kl.beta * batch.weight_of_kl.to(dtype), 0.0)
        ref_logprob = batch.ref_logprob.to(dtype)
        if "old_logprob" in objective.kl.reads:
            unread = unread & (kl_weight == 0)
    anchor = torch.where(unread, SELF, anchor)  # d = 0, so that 0 · r stays 0 whatever r would be
    return Streams(
        role=role,
        anchor=anchor,
        signal=signal,
        advantage=advantage,
        kl_weight=kl_weight,
        ref_logprob=ref_logprob,
        grad_entropy=torch.where(active & (objective.entropy_coef != 0.0), -objective.entropy_coef * entropy_weight, 0.0),
    )


def given_gradients(grad_logprob: Tensor | None, grad_entropy: Tensor, counted: Tensor) -> tuple[Streams, Objective]:
    """Streams and an objective whose dL/dlogp and dL/dH are these [N], on the rows `counted` [N] bool."""
    grad_entropy = grad_entropy.contiguous()  # that of a sum is one number, expanded
    zero = torch.zeros_like(grad_entropy)
    role = torch.where(counted, Role.EXPERT, Role.IGNORED).to(torch.uint8)
    signal = zero if grad_logprob is None else -grad_logprob.contiguous()
    return Streams(role, zero, signal, zero + 1.0, None, None, grad_entropy), Objective(expert=Term(One()))


def _anchor(term: Term, batch: TokenBatch, like: Tensor) -> Tensor:
    if term.anchor == "zero":
        return torch.zeros_like(like)
    stream = None if term.anchor == "self" else getattr(batch, f"{term.anchor}_logprob")
    return torch.full_like(like, SELF) if stream is None else stream.to(like.dtype)


@dataclass(frozen=True)
class Coefficients:
    """What a token's logprob amounts to under an objective; tensors are [N]."""

    loss: Tensor  # without the entropy bonus
    grad_logprob: Tensor
    log_ratio: Tensor  # d
    slope: Tensor  # G(d), before signal and weight
    clipped_low: Tensor
    clipped_high: Tensor


def log_ratio(logprob: Tensor, s: Streams) -> Tensor:
    """d = logp - anchor [N], 0 where the anchor is the policy itself and on rows with role IGNORED."""
    return torch.where((s.anchor == SELF) | (s.role == Role.IGNORED), 0.0, logprob - s.anchor)


def coefficients(logprob: Tensor, s: Streams, objective: Objective, d: Tensor | None = None) -> Coefficients:
    """Loss and dL/dlogp of every token from explicit slopes; rows with role IGNORED are exact zeros whatever they hold. `d` [N] is
    what the gates see, where that is not `log_ratio`."""
    counted = s.role != Role.IGNORED
    logprob = torch.where(counted, logprob, 0.0)
    d = log_ratio(logprob, s) if d is None else d
    muted = s.signal == 0  # an advantage of 0: 0 · V and 0 · G are 0 however large the ratio is
    heard = torch.where(muted, 0.0, d)
    zero = torch.zeros_like(d)
    value, slope, low, high = zero, zero, zero.bool(), zero.bool()
    for code, term in ((Role.EXPERT, objective.expert), (Role.ROLLOUT, objective.rollout)):
        if term is None:
            continue
        mine = s.role == code
        gate_low, gate_high = term.gate.clipped(d, s.advantage)
        value = torch.where(mine, term.gate.value(heard, s.advantage), value)
        slope = torch.where(mine, term.gate.slope(d, s.advantage), slope)
        low, high = torch.where(mine, gate_low, low), torch.where(mine, gate_high, high)
    loss = torch.where(counted, -s.signal * value, 0.0)
    grad = torch.where(counted & ~muted, -s.signal * slope, 0.0)
    if objective.kl is not None:
        rollout = (s.role == Role.ROLLOUT) & (s.kl_weight != 0)
        d_ref = torch.where(rollout, logprob - s.ref_logprob, 0.0)
        loss = loss + torch.where(rollout, s.kl_weight * objective.kl.value(d_ref, d), 0.0)
        grad = grad + torch.where(rollout, s.kl_weight * objective.kl.slope(d_ref, d), 0.0)
    return Coefficients(loss, grad, d, slope, low, high)


def reduced(term: Term, logprob: Tensor, entropy: Tensor, d: Tensor, batch: TokenBatch, mine: Tensor) -> Reduced:
    """The term's reduction over the sequences of its tokens `mine` [N] bool; `logprob`, `entropy`, `d` [N] lose their gradient.

    A token with weight 0 takes no part: it is pooled into no ratio and counts in no quantile.
    """
    mine = mine & (batch.weight != 0)
    advantage = batch.advantage if term.signal == "advantage" else torch.ones_like(d)

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mine, x, 0.0).to(d.dtype)

    with torch.no_grad():
        sequences = Sequences(batch.sequence_id, mine)
        seen = (logprob.detach(), entropy.detach(), d.detach(), advantage, batch.ref_logprob)
        return term.reduction.applied(Tokens(*map(own, seen), sequences))


def evaluated(
    logprob: Tensor, entropy: Tensor, s: Streams, batch: TokenBatch, objective: Objective
) -> tuple[Coefficients, Streams]:
    """Coefficients of the objective's first layer and the streams as its gates see them, reductions applied; for the metrics."""
    d, signal, flows = log_ratio(logprob, s), s.signal, torch.ones_like(s.role, dtype=torch.bool)
    for code, term in ((Role.EXPERT, objective.expert), (Role.ROLLOUT, objective.rollout)):
        if term is not None and term.reduces(batch.on_policy):
            mine = s.role == code
            of_role = reduced(term, logprob, entropy, d, batch, mine)
            d = torch.where(mine, of_role.log_ratio, d)
            signal = torch.where(mine, signal * of_role.factor, signal)
            flows = flows & (of_role.flows | ~mine)
    s = replace(s, signal=signal)
    c = coefficients(logprob, s, objective, d)
    low, high = c.clipped_low | (~flows & (s.advantage < 0)), c.clipped_high | (~flows & (s.advantage >= 0))
    return replace(c, grad_logprob=torch.where(flows, c.grad_logprob, 0.0), clipped_low=low, clipped_high=high), s


def total_loss(c: Coefficients, s: Streams, entropy: Tensor) -> Tensor:
    """0-d: Σ token loss + Σ dL/dH · H, summed in fp64 so that the order of tokens does not show."""
    bonus = torch.where(s.grad_entropy == 0, 0.0, s.grad_entropy * entropy)
    return (c.loss.double().sum() + bonus.double().sum()).to(c.loss.dtype)


def metrics(
    logprob: Tensor, entropy: Tensor, c: Coefficients, s: Streams, objective: Objective, batch: TokenBatch
) -> dict[str, Tensor]:
    """Means per role over the tokens of this batch as 0-d tensors, without a host sync; 0 for a role without tokens.

    Keys, for role in (expert, rollout): `role/count`, `role/logprob`, `role/prob`, `role/entropy` in nats. Of TrSFT on expert
    tokens, the gate `Truncate` at the anchor "zero": `expert/trsft_weight` = mean G(d), and `expert/share_below_alpha`. Of any
    other term: `role/clip_low` and `role/clip_high`, of an expert one where its gate clips; `expert/slope` = mean G(d), where that
    is not 1; unless the anchor is "zero" `role/ratio`, `role/ratio_max`, and `role/kl_old_k1` and `_k3`, estimates of
    KL(anchor ‖ π) from the ratio where the anchor sampled the tokens. With a KL term `rollout/kl_ref`, the estimate in the loss,
    and `rollout/kl_ref_k1` and `_k3`, of KL(π ‖ π_ref), means over the `rollout/kl_count` tokens whose KL has a weight. What
    describes a term is a mean over its `role/trained_count` tokens with a weight; the others carry entropy bonus or KL alone.
    """
    out: dict[str, Tensor] = {}
    for code, name, term in ((Role.EXPERT, "expert", objective.expert), (Role.ROLLOUT, "rollout", objective.rollout)):
        mine = s.role == code
        trained = mine & (batch.weight != 0)
        out[f"{name}/count"], out[f"{name}/trained_count"] = mine.sum().float(), trained.sum().float()
        out[f"{name}/logprob"], out[f"{name}/prob"] = _mean(logprob, mine), _mean(logprob.exp(), mine)
        out[f"{name}/entropy"] = _mean(entropy, mine)
        if term is not None:
            out |= {f"{name}/{what}": value for what, value in _of_term(c, trained, term, name).items()}
        if name == "rollout" and objective.kl is not None:
            in_kl = mine & (batch.weight_of_kl != 0)
            d_ref, d = (torch.where(in_kl, x, 0.0) for x in (logprob - s.ref_logprob, c.log_ratio))
            out["rollout/kl_count"], out["rollout/kl_ref"] = in_kl.sum().float(), _mean(objective.kl.value(d_ref, d), in_kl)
            out["rollout/kl_ref_k1"], out["rollout/kl_ref_k3"] = _mean(d_ref, in_kl), _mean(torch.expm1(-d_ref) + d_ref, in_kl)
    return out


def _mean(x: Tensor, over: Tensor) -> Tensor:
    """0-d fp32: the mean of x [N] over the tokens `over` [N] bool, 0 of none."""
    return torch.where(over, x, 0).sum(dtype=torch.float32) / over.sum().clamp(min=1)


def _of_term(c: Coefficients, trained: Tensor, term: Term, role: str) -> dict[str, Tensor]:
    """The metrics that describe `term` on its tokens `trained` [N] bool."""
    if role == "expert" and isinstance(term.gate, Truncate) and term.anchor == "zero":
        below = c.log_ratio < math.log(term.gate.high)
        return {"trsft_weight": _mean(c.slope, trained), "share_below_alpha": _mean(below.float(), trained)}
    out = {}
    if role == "expert" and not isinstance(term.gate, One):  # whose slope is 1
        out["slope"] = _mean(c.slope, trained)
    if role == "rollout" or type(term.gate).clipped is not Gate.clipped:
        out["clip_low"], out["clip_high"] = _mean(c.clipped_low.float(), trained), _mean(c.clipped_high.float(), trained)
    if term.anchor != "zero":  # which stands for no policy: the ratio to it is p
        ratio, d = c.log_ratio.exp(), torch.where(trained, c.log_ratio, 0.0)
        out["ratio"] = _mean(ratio, trained)
        out["ratio_max"] = torch.cat([torch.where(trained, ratio, 0), ratio.new_zeros(1)]).max().float()
        out["kl_old_k1"], out["kl_old_k3"] = _mean(-d, trained), _mean(torch.expm1(d) - d, trained)
    return out


def encode(objective: Objective) -> tuple[list[int], list[float]]:
    """An objective as plain numbers, the only form that passes through a `torch.library` op."""
    codes: list[int] = []
    parameters: list[float] = []
    for term in (objective.expert, objective.rollout):
        codes.append(0 if term is None else term.gate.code)
        values = [] if term is None else [getattr(term.gate, field.name) for field in fields(term.gate)]
        parameters += values + [0.0] * (_MAX_PARAMETERS - len(values))
    codes.append(0 if objective.kl is None else 1 + KL_ESTIMATORS.index(objective.kl.estimator))
    parameters.append(math.inf if objective.kl is None else objective.kl.clamp)
    return codes, parameters


def gate_scalars(objective: Objective) -> tuple[list[int], list[float]]:
    """What the compiled backends read of an objective: codes of expert gate, rollout gate and KL; three scalars per gate, then the
    clamp of the KL."""
    codes, parameters = encode(objective)
    terms = (objective.expert, objective.rollout)
    return codes, [scalar for term in terms for scalar in (term.gate.scalars if term else (0.0,) * 3)] + parameters[-1:]


def decode(codes: list[int], parameters: list[float]) -> Objective:
    """The gates and the KL of an encoded objective; anchors, signals and scales live in the streams already."""
    terms: list[Term | None] = [None, None]
    for i, code in enumerate(codes[:2]):
        if code:
            gate = GATES[code]
            terms[i] = Term(gate(*parameters[_MAX_PARAMETERS * i :][: len(fields(gate))]), anchor="old")
    kl = KL(1.0, KL_ESTIMATORS[codes[2] - 1], parameters[-1]) if codes[2] else None
    return Objective(expert=terms[0], rollout=terms[1], kl=kl)


_STREAM_NAMES = [field.name for field in fields(Streams)]
NUM_STREAMS = len(_STREAM_NAMES)
GRAD_ENTROPY = _STREAM_NAMES.index("grad_entropy")


def pack(s: Streams) -> list[Tensor]:
    """The streams as the tensor list of a `torch.library` op; an absent one is an empty matrix, which one of no tokens is not."""
    values = [getattr(s, name) for name in _STREAM_NAMES]  # torch 2.11 cannot compile vars(s).values()
    return [s.role.new_empty(0, 0) if value is None else value.contiguous() for value in values]


def unpack(tensors: list[Tensor]) -> Streams:
    """The way back from `pack`."""
    s = dict(zip(_STREAM_NAMES, tensors, strict=True))
    for name in ("kl_weight", "ref_logprob"):
        s[name] = None if s[name].dim() == 2 else s[name]
    return Streams(**s)
