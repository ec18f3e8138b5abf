"""The per-token arithmetic of an objective on [N] vectors: streams, coefficients dL/dlogp and dL/dH, loss and metrics.

Everything here costs O(N), nothing against the [N, V] work, but a launch each on a GPU: few operations on many values. The
compiled kernels repeat only `coefficients`, inside their sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trapo_kernels.batch import TokenBatch
from trapo_kernels.gates import GATES, Clip, Gate, One, Truncate
from trapo_kernels.objective import KL, KL_ESTIMATORS, Objective, Term, k3
from trapo_kernels.roles import Role
from trapo_kernels.sequence import Reduced, Sequences, Tokens

_MAX_PARAMETERS = 3  # of a gate
NUM_SCALARS = 8  # that the compiled backends read of an objective
SELF = float("inf")  # an anchor that stands for the policy itself; no logprob is +inf, and NaN is left to mean trouble


@dataclass(frozen=True)
class Streams:
    """A batch seen through an objective: all that the coefficient of a token needs besides its logprob; tensors are [N].

    `anchor` is what logp is compared with (0 for anchor zero; +inf stands for logp itself: "self"), `signal` =
    weight · scale · (advantage or 1), `advantage` = what chooses the side of a clip (1 where the signal is "one"), `kl_weight` = β
    · the KL's weight on rollout tokens, `grad_entropy` = -entropy_coef · entropy weight.
    """

    role: Tensor  # uint8, IGNORED on rows that cannot contribute, but for silent ones that an op must score without knowing them
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
    kl_weight = ref_logprob = None
    if objective.kl is not None:
        kl_weight = torch.where(role == Role.ROLLOUT, objective.kl.beta * batch.weight_of_kl.to(dtype), 0.0)
        ref_logprob = batch.ref_logprob.to(dtype)
    advantage = torch.zeros_like(weight)
    if batch.advantage is not None:
        advantage = torch.where(weight == 0, 0.0, batch.advantage.to(dtype))  # unread there, NaN included
    anchor, signal = torch.full_like(weight, SELF), torch.zeros_like(weight)
    for code, term in ((Role.EXPERT, objective.expert), (Role.ROLLOUT, objective.rollout)):
        if term is None:
            continue
        mine = role == code
        if term.signal == "one":
            advantage = torch.where(mine, 1.0, advantage)
        signal = torch.where(mine, weight * term.scale * advantage, signal)
        if (compared := _anchor(term, batch, dtype)) is not None:
            anchor = torch.where(mine, compared, anchor)
    grad_entropy = torch.zeros_like(weight)
    if objective.entropy_coef != 0.0:
        grad_entropy = torch.where(active, -objective.entropy_coef * batch.weight_of_entropy.to(dtype), 0.0)
    return Streams(role, anchor, signal, advantage, kl_weight, ref_logprob, grad_entropy)


def streams_from_gradients(grad_logprob: Tensor | None, grad_entropy: Tensor, counted: Tensor) -> tuple[Streams, Objective]:
    """Streams and an objective whose dL/dlogp and dL/dH are these [N], on the rows `counted` [N] bool."""
    grad_entropy = grad_entropy.contiguous()  # that of a sum is one number, expanded
    zero = torch.zeros_like(grad_entropy)
    role = torch.where(counted, Role.EXPERT, Role.IGNORED).to(torch.uint8)
    signal = zero if grad_logprob is None else -grad_logprob.contiguous()
    return Streams(role, zero, signal, zero + 1.0, None, None, grad_entropy), Objective(expert=Term(One()))


def _anchor(term: Term, batch: TokenBatch, dtype: torch.dtype) -> Tensor | float | None:
    """What logp is compared with; None: itself."""
    if term.anchor == "zero":
        return 0.0
    stream = None if term.anchor == "self" else getattr(batch, f"{term.anchor}_logprob")
    return None if stream is None else stream.to(dtype)


def log_ratio(logprob: Tensor, s: Streams) -> Tensor:
    """d = logp - anchor [N], 0 where the anchor is the policy itself, as it is on rows with role IGNORED."""
    return torch.where(s.anchor == SELF, 0.0, logprob - s.anchor)


def coefficients(logprob: Tensor, s: Streams, objective: Objective) -> Tensor:
    """dL/dlogp [N] from explicit slopes; rows with role IGNORED are exact zeros whatever they hold."""
    d = log_ratio(logprob, s)
    slope = _of_own_term(s, objective, lambda term: term.gate.slope(d, s.advantage))
    grad = _zero_where_signal_is_zero(-s.signal * slope, s)
    return grad if objective.kl is None else grad + _kl(objective.kl.slope, logprob, d, s)


def total_loss(logprob: Tensor, entropy: Tensor, s: Streams, objective: Objective) -> Tensor:
    """0-d: Σ token loss + Σ dL/dH · H, summed in fp64 so that the order of tokens does not show."""
    d = log_ratio(logprob, s)
    value = _of_own_term(s, objective, lambda term: term.gate.value(d, s.advantage))
    loss = _zero_where_signal_is_zero(-s.signal * value, s)
    if objective.kl is not None:
        loss = loss + _kl(objective.kl.value, logprob, d, s)
    bonus = torch.where(s.grad_entropy == 0, 0.0, s.grad_entropy * entropy)
    return (loss.sum(dtype=torch.float64) + bonus.sum(dtype=torch.float64)).to(logprob.dtype)


def _of_own_term(s: Streams, objective: Objective, of_term: Callable[[Term], Tensor]) -> Tensor:
    """[N]: every token's value by the term of its role; what a role without a term gets means nothing, its signal is 0."""
    values = [of_term(term) for term in (objective.expert, objective.rollout) if term is not None]
    if len(values) == 2:
        return torch.where(s.role == Role.EXPERT, *values)
    return values[0] if values else torch.zeros_like(s.signal)


def _zero_where_signal_is_zero(x: Tensor, s: Streams) -> Tensor:
    """x [N], 0 where the signal is: an advantage of 0 silences a token however large its ratio is."""
    return torch.where(s.signal == 0, 0.0, x)


def _kl(estimate: Callable[[Tensor, Tensor], Tensor], logprob: Tensor, d: Tensor, s: Streams) -> Tensor:
    """[N]: β · weight · `estimate`(logp - ref, d) of a KL or its slope, 0 where it has no weight."""
    return torch.where(s.kl_weight != 0, s.kl_weight * estimate(logprob - s.ref_logprob, d), 0.0)


def reduced(term: Term, code: Role, logprob: Tensor, entropy: Tensor, batch: TokenBatch) -> Reduced:
    """The term's reduction over the sequences of the tokens with role `code`; `logprob`, `entropy` [N] lose their gradient.

    Every such token takes part, with weight 0 as well: masks and corrections change what a token contributes, not its sequence.
    """
    mine = batch.role == code
    anchor = _anchor(term, batch, logprob.dtype)
    advantage = batch.advantage if term.signal == "advantage" else torch.ones_like(logprob)

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mine, x, 0.0).to(logprob.dtype)

    with torch.no_grad():
        d = torch.zeros_like(logprob) if anchor is None else logprob - anchor
        seen = (logprob, entropy, d, advantage, batch.ref_logprob)
        return term.reduction.applied(Tokens(*map(own, seen), Sequences(batch.sequence_id, mine)))


def mean_of_sequence(x: Tensor, code: Role, batch: TokenBatch) -> Tensor:
    """[N]: the mean of x [N], which loses its gradient, over the tokens with role `code` of each token's sequence."""
    return Sequences(batch.sequence_id, batch.role == code).mean(x.detach()).to(x.dtype)


def gate_inputs(
    logprob: Tensor, entropy: Tensor, s: Streams, batch: TokenBatch, objective: Objective
) -> tuple[Tensor, Tensor | None]:
    """(d [N] of the objective's first layer, reductions applied; [N] bool: where the gradient flows, None where no reduction
    stops it)."""
    d, flows = log_ratio(logprob, s), None
    for code, term in ((Role.EXPERT, objective.expert), (Role.ROLLOUT, objective.rollout)):
        if term is not None and term.reduces(batch.on_policy):
            mine = s.role == code
            of_role = reduced(term, code, logprob, entropy, batch)
            d = torch.where(mine, of_role.log_ratio, d)
            own = of_role.flows | ~mine
            flows = own if flows is None else flows & own
    return d, flows


def metrics(logprob: Tensor, entropy: Tensor, s: Streams, objective: Objective, batch: TokenBatch) -> dict[str, Tensor]:
    """Means per role over the tokens of this batch as 0-d tensors, without a host sync; 0 for a role without tokens. Counts are
    fp32 too: above 2^24 tokens in one call they are rounded, by at most 6e-8 of their value. The metrics of several calls become
    one by `merged_metrics`, which adds counts in fp64.

    For each role, expert and rollout:

        role/count, role/trained_count  tokens, and those of them whose term has a weight: others carry entropy bonus or KL alone
        role/logprob, prob, entropy     means over role/count, in nats but for the probability

    Of its term, means over role/trained_count:

        expert/trsft_weight, expert/share_below_alpha   of TrSFT, the gate Truncate at the anchor "zero": G(d), and share with p < α
        expert/slope                    G(d) of every other gate but One
        role/clip_low, role/clip_high   shares that the gate holds back; of an expert term where its gate clips
        role/clip_dual                  share that the second bound of a Clip for negative advantages holds back, where it has one
        role/ratio, role/ratio_max      r and its maximum, unless the anchor is "zero"; pooled where the term's reduction pools it
        role/kl_old_k1, role/kl_old_k3  estimates of KL(anchor ‖ π) in nats, where the anchor sampled the tokens; likewise, but of
                                        each token's own log-ratio

    Of a KL term, means over rollout/kl_count, the tokens whose KL has a weight, in nats:

        rollout/kl_ref                  the estimate in the loss
        rollout/kl_ref_k1, rollout/kl_ref_k3            of KL(π ‖ π_ref)
    """
    own, (d, flows) = log_ratio(logprob, s), gate_inputs(logprob, entropy, s, batch, objective)
    weighted, prob = batch.weight != 0, logprob.exp()
    means, ratio_max = _Means(), {}
    for code, name, term in ((Role.EXPERT, "expert", objective.expert), (Role.ROLLOUT, "rollout", objective.rollout)):
        mine = s.role == code
        means.over(f"{name}/count", mine, {f"{name}/logprob": logprob, f"{name}/prob": prob, f"{name}/entropy": entropy})
        of_term = {} if term is None else _of_term(term, d, own, s.advantage, flows, name)
        trained = mine & (weighted if term is not None else False)
        means.over(f"{name}/trained_count", trained, {f"{name}/{what}": x for what, x in of_term.items()})
        if "ratio" in of_term:  # the largest; a number in its place lets a batch of no tokens have one
            ratio_max[f"{name}/ratio_max"] = torch.cat([torch.where(trained, of_term["ratio"], 0), d.new_zeros(1)]).max().float()
        if name == "rollout" and objective.kl is not None:
            in_kl = mine & (batch.weight_of_kl != 0)
            d_ref = logprob - s.ref_logprob
            estimates = {"kl_ref": objective.kl.value(d_ref, d), "kl_ref_k1": d_ref, "kl_ref_k3": k3(d_ref)}
            means.over("rollout/kl_count", in_kl, {f"rollout/{what}": x for what, x in estimates.items()})
    return means.reduced() | ratio_max


class _Means:
    """Means of [N] vectors over masks of tokens, reduced together: a handful of launches however many there are."""

    def __init__(self):
        self._masks: dict[str, Tensor] = {}
        self._values: dict[str, tuple[str, Tensor]] = {}

    def over(self, count: str, mask: Tensor, values: dict[str, Tensor]) -> None:
        """Ask for the number of tokens `mask` [N] bool as `count`, and for the mean over them of every value [N] by its name."""
        self._masks[count] = mask
        self._values |= {name: (count, x) for name, x in values.items()}

    def reduced(self) -> dict[str, Tensor]:
        """Every count and mean by its name, 0-d fp32; a mean over no tokens is 0."""
        counts = dict(zip(self._masks, torch.stack([*self._masks.values()]).sum(1).float().unbind(), strict=True))
        of_value, values = zip(*self._values.values(), strict=True)
        kept = torch.where(torch.stack([self._masks[count] for count in of_value]), torch.stack(values), 0)
        means = kept.sum(1, dtype=torch.float32) / torch.stack([counts[count] for count in of_value]).clamp(min=1)
        return counts | dict(zip(self._values, means.unbind(), strict=True))


def _of_term(term: Term, d: Tensor, own: Tensor, advantage: Tensor, flows: Tensor | None, role: str) -> dict[str, Tensor]:
    """What is averaged over the tokens of `term`, [N] in the dtype of `d`, which is what its gate sees of the log-ratios `own`."""
    gate = term.gate
    if role == "expert" and isinstance(gate, Truncate) and term.anchor == "zero":
        return {"trsft_weight": gate.slope(d, advantage), "share_below_alpha": (d < math.log(gate.high)).to(d.dtype)}
    out = {}
    if role == "expert" and not isinstance(gate, One):  # whose slope is 1
        out["slope"] = gate.slope(d, advantage)
    if role == "rollout" or type(gate).clipped is not Gate.clipped:
        low, high = gate.clipped(d, advantage)
        positive, negative = advantage > 0, advantage < 0  # at 0 there is nothing to hold back
        if flows is not None:
            low, high = low | (~flows & negative), high | (~flows & positive)
        held = {"clip_low": low & (advantage != 0), "clip_high": high & (advantage != 0)}
        if isinstance(gate, Clip) and gate.dual < math.inf:
            held |= {"clip_high": high & positive, "clip_dual": high & negative}
        out |= {name: share.to(d.dtype) for name, share in held.items()}
    if term.anchor != "zero":  # which stands for no policy: the ratio to it is p
        out["ratio"], out["kl_old_k1"], out["kl_old_k3"] = d.exp(), -own, k3(-own)
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
    parameters += [math.inf, math.inf] if objective.kl is None else [objective.kl.clamp, objective.kl.cap]
    return codes, parameters


def gate_scalars(objective: Objective) -> tuple[list[int], list[float]]:
    """What the compiled backends read of an objective: codes of expert gate, rollout gate and KL; NUM_SCALARS scalars, three per
    gate, then the bounds of the KL."""
    codes, _ = encode(objective)
    gates = [scalar for term in (objective.expert, objective.rollout) for scalar in (term.gate.scalars if term else (0.0,) * 3)]
    return codes, [*gates, *((-math.inf, math.inf) if objective.kl is None else objective.kl.bounds)]


def decode(codes: list[int], parameters: list[float]) -> Objective:
    """The gates and the KL of an encoded objective; anchors, signals and scales live in the streams already."""
    terms: list[Term | None] = [None, None]
    for i, code in enumerate(codes[:2]):
        if code:
            gate = GATES[code]
            terms[i] = Term(gate(*parameters[_MAX_PARAMETERS * i :][: len(fields(gate))]), anchor="old")
    kl = KL(1.0, KL_ESTIMATORS[codes[2] - 1], *parameters[-2:]) if codes[2] else None
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
