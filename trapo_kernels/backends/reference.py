"""The definition of correct, in plain PyTorch: full logits, log_softmax, potentials, autograd. Meant to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from trapo_kernels import terms
from trapo_kernels.backends.logits import LogitTransform, savable, statistics_dtype
from trapo_kernels.batch import TokenBatch
from trapo_kernels.objective import Objective, Term
from trapo_kernels.roles import IGNORE_INDEX, Role


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    logits_dtype: torch.dtype,
) -> Tensor:
    """[N, V] in fp32 (fp64 for fp64 inputs), rounded to `logits_dtype` on the way when that is lower.

    Hidden states of rows with target -100 are replaced by zeros first: 0 · NaN in dWeight would still be NaN.
    """
    exact = statistics_dtype(hidden)
    rows = torch.where((target != IGNORE_INDEX)[:, None], hidden, 0).to(exact)  # once: each cast rounds a gradient of its own
    with torch.autocast(hidden.device.type, enabled=False):
        logits = rows @ _rounded_in_value(weight, hidden.dtype).to(exact).T
        if lora_a is not None:
            logits = logits + (rows @ lora_a.T) @ lora_b.to(exact).T
    if logits_dtype != torch.float32:
        logits = _rounded_in_value(logits, logits_dtype)
    return logits if bias is None else logits + bias.to(exact)


def logprob_and_entropy(logits: Tensor, target: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy, logsumexp [N] of logits [N, V] in fp32 or fp64; zeros where target is -100."""
    counted = target != IGNORE_INDEX
    z = torch.where(counted[:, None], logits, 0.0)
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.column(z)
    log_p = torch.log_softmax(z, dim=-1)
    inside = (target >= 0) & (target < z.shape[1])
    logprob = log_p.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    logprob = torch.where(inside, logprob, torch.nan)  # outside the vocabulary, which is refused on a CPU (see checks.target)
    # A masked column has p = 0 and log p = -inf; it adds nothing to the entropy and receives no gradient.
    possible = log_p > -torch.inf
    entropy = -(log_p.exp() * torch.where(possible, log_p, 0.0)).sum(-1)
    logsumexp = torch.logsumexp(z, dim=-1).detach()
    return tuple(torch.where(counted, value, 0.0) for value in (logprob, entropy, logsumexp))


def policy_loss(logprob: Tensor, entropy: Tensor, batch: TokenBatch, objective: Objective) -> Tensor:
    """0-d: Σ w (-a V(d)) + β Σ w_K KL - entropy_coef Σ w_H H, differentiable in logprob and entropy through the potentials."""
    loss = logprob.new_zeros(())
    entropy, weight, active = entropy.to(logprob.dtype), savable(batch.weight).to(logprob.dtype), batch.active
    for layer in objective.layers:
        for code, term in ((Role.EXPERT, layer.expert), (Role.ROLLOUT, layer.rollout)):
            if term is not None:
                mine = active & (batch.role == code) & (weight != 0)
                loss = loss + term_loss(logprob, entropy, batch, term, code, mine)
        if layer.kl is not None and layer.kl.beta:
            loss = loss + layer.kl.beta * kl_loss(logprob, entropy, batch, layer)
        if layer.entropy_coef:
            entropy_weight = savable(batch.weight_of_entropy).to(logprob.dtype)
            loss = loss - layer.entropy_coef * (torch.where(active, entropy_weight, 0.0) * torch.where(active, entropy, 0.0)).sum()
    return loss


def term_loss(logprob: Tensor, entropy: Tensor, batch: TokenBatch, term: Term, code: Role, mine: Tensor) -> Tensor:
    """0-d: Σ -weight · scale · signal · V(d) over the tokens `mine` [N] bool, those with role `code` and a weight."""
    logp = torch.where(mine, logprob, 0.0)
    d = torch.where(mine, log_ratio(logp, batch, term), 0.0)
    signal = savable(batch.advantage).to(logp.dtype) if term.signal == "advantage" else torch.ones_like(logp)
    amount = savable(batch.weight).to(logp.dtype) * term.scale * signal
    if term.reduces(batch.on_policy):
        pooled = terms.reduced(term, code, logprob, entropy, batch)
        d = pooled.log_ratio + torch.where(pooled.flows, _nothing(logp), 0.0)  # pooled in value, logp's in gradient
        amount = amount * pooled.factor
    d = torch.where(amount == 0, 0.0, d)  # an advantage of 0 keeps the loss at 0 however large the ratio is
    return -torch.where(mine, amount * term.gate.value(d, signal), 0.0).sum()


def kl_loss(logprob: Tensor, entropy: Tensor, batch: TokenBatch, layer: Objective) -> Tensor:
    """0-d: Σ kl_weight · KL over the rollout tokens whose KL has a weight; a pooled ratio of it is that of silent ones, too."""
    term, rollout = layer.rollout, batch.role == Role.ROLLOUT
    weight = savable(batch.weight_of_kl).to(logprob.dtype)
    mine = rollout & (weight != 0)
    logp = torch.where(mine, logprob, 0.0)
    d_ref = torch.where(mine, logp - batch.ref_logprob.to(logp.dtype), 0.0)
    if not layer.pools_kl:
        d = torch.zeros_like(logp) if term is None else torch.where(mine, log_ratio(logp, batch, term), 0.0)
        return torch.where(mine, weight * layer.kl.value(d_ref, d), 0.0).sum()
    pooled = terms.reduced(term, Role.ROLLOUT, logprob, entropy, batch)
    kl = torch.where(mine, weight * layer.kl.value(d_ref, pooled.log_ratio), 0.0)
    # The ratio is a factor of every KL of its sequence: each of n tokens moves them all, by a share of 1/n, which may be infinite.
    share = terms.mean_of_sequence(kl, Role.ROLLOUT, batch)
    return (kl + torch.where(rollout & pooled.flows, _nothing(share * torch.where(rollout, logprob, 0.0)), 0.0)).sum()


def log_ratio(logprob: Tensor, batch: TokenBatch, term: Term) -> Tensor:
    """d = logprob - anchor; for "self", and for "old" without old_logprob, zero in value with the gradient of logprob."""
    if term.anchor == "zero":
        return logprob
    anchor = None if term.anchor == "self" else getattr(batch, f"{term.anchor}_logprob")
    if anchor is None:
        return _nothing(logprob)
    return logprob - anchor.to(logprob.dtype)


def _rounded_in_value(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as `dtype` holds it, such as master weights in GEMMs of 16 bits; its gradient is not rounded."""
    if x.dtype == dtype:
        return x
    return torch.where(x.isfinite(), x + (x.to(dtype).to(x.dtype) - x).detach(), x)


def _nothing(x: Tensor) -> Tensor:
    """0 with the gradient of x: x - x.detach(), where x is -inf too. In forward mode not there: torch.compile cannot trace a
    `Function` with a tangent."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.where(x.isfinite(), x - x.detach(), 0.0) if forward_mode else _Nothing.apply(x)


class _Nothing(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is saved: the derivative is 1."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad
