"""Inputs and an independent eager formula per preset, shared by the kernel tests."""

import math
import os
from dataclasses import fields

import pytest
import torch

from trapo_kernels import Role, TokenBatch
from trapo_kernels.backends import native

PRETENDED = os.environ.get("TRAPO_TEST_ON") == "a pretended GPU"  # its device is meta, see conftest.py
DEVICE = "meta" if PRETENDED else "cuda" if torch.cuda.is_available() else "cpu"
CHUNKED = ["torch", "triton", *([] if native.why_not(DEVICE) else ["native"])]
COMPILED = CHUNKED[1:]
# What takes seconds where Triton is interpreted, or a CPU compiles, runs by default on a GPU alone.
SLOW_ON_A_CPU = pytest.mark.skipif(False, reason="no reason") if DEVICE == "cuda" else pytest.mark.slow
QUICK = [name for name in CHUNKED if name != "triton" or DEVICE == "cuda"]  # where interpreted Triton would take minutes
QUICK_BY_DEFAULT = [pytest.param(name, marks=() if name in QUICK else SLOW_ON_A_CPU) for name in CHUNKED]


def backends(dtype):
    """The backends that run with `dtype`; the compiled ones have fp32 statistics."""
    return ["torch"] if dtype == torch.float64 else CHUNKED


def head(num_rows, hidden_size, vocab_size, dtype=torch.float64, scale=1.0, seed=0):
    """hidden [N, D], weight [V, D], bias [V] that require grad; logits have standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, factor=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * factor
        return values.to(DEVICE, dtype).requires_grad_()

    return draw(num_rows, hidden_size, factor=scale), draw(vocab_size, hidden_size, factor=hidden_size**-0.5), draw(vocab_size)


def batch(num_rows, vocab_size, dtype=torch.float64, roles=(0, 1, 2), seed=1, with_ref=True, device=None, **changes):
    """A TokenBatch of mixed roles, advantages of both signs, off-policy anchors and its own entropy weights; on DEVICE."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(num_rows, generator=generator, dtype=torch.float64)

    streams = {
        "target": torch.randint(vocab_size, (num_rows,), generator=generator),
        "role": torch.tensor(roles, dtype=torch.uint8)[torch.randint(len(roles), (num_rows,), generator=generator)],
        "advantage": (draw() * 4 - 2).to(dtype),
        "weight": (draw() + 0.1).to(dtype) / num_rows,
        "old_logprob": (-6 * draw()).to(dtype),
        "ref_logprob": (-6 * draw()).to(dtype) if with_ref else None,
        "entropy_weight": draw().to(dtype) / num_rows,
        "rollout_logprob": (-6 * draw()).to(dtype),
        "sequence_id": 7 * torch.randint(max(1, num_rows // 7), (num_rows,), generator=generator) - 3,
    } | changes
    return TokenBatch(**{k: v if v is None else v.to(DEVICE if device is None else device) for k, v in streams.items()})


def eager_statistics(hidden, weight, target, bias=None, temperature=1.0, softcap=None, grad_dtype=None):
    """logprob and entropy by the textbook, in the dtype of the inputs; dLogits rounded to `grad_dtype`, as 16-bit GEMMs take it."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if grad_dtype is not None:
        logits.register_hook(lambda grad: grad.to(grad_dtype).to(grad.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(1, target.clamp(min=0)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def whole_sequences(b, num_parts):
    """`num_parts` lists of row indices that cover the batch in a random order and split no sequence."""
    labels = b.sequence_id.unique()
    labels = labels[torch.randperm(len(labels), device=labels.device)]
    return [torch.isin(b.sequence_id, part).nonzero().squeeze(1) for part in labels.tensor_split(num_parts)]


def subset(b, rows):
    """The batch of some rows [M] int64; `active_rows` is found anew."""
    streams = {field.name: getattr(b, field.name) for field in fields(b)}
    return TokenBatch(**{name: value if value is None else value[rows] for name, value in streams.items()})


# The published loss per token as f(logp, b, entropy, mine): potentials where a paper writes a stop-gradient weight, with the same
# gradient (see SURROGATES). What pools over a sequence loops over the sequences of the tokens `mine`.


def _clipped(logp, b, low=0.2, high=0.2):
    ratio = (logp - b.old_logprob).exp()
    return -torch.minimum(ratio * b.advantage, ratio.clamp(1 - low, 1 + high) * b.advantage)


def _clip(low=0.2, high=0.2):
    return lambda logp, b, *_: _clipped(logp, b, low, high)


def _ratio(logp, b, *_):
    return -b.advantage * (logp - b.old_logprob).exp()


def _sft(logp, *_):
    return -logp


def _trsft(logp, *_, alpha=0.1):
    # p/α below α, 1 + log(p/α) above; written with clamps because torch.where has a NaN gradient at p = 0
    return -(logp.exp().clamp(max=alpha) / alpha + (logp - math.log(alpha)).clamp(min=0))


def _capped(log_ratio, cap):
    """∫ min(r, cap) d log r: r below the cap, its logarithm above."""
    return log_ratio.clamp(max=math.log(cap)).exp() + cap * (log_ratio - math.log(cap)).clamp(min=0)


def _shaped(log_ratio, b, gamma=0.1):
    return -b.advantage * log_ratio.exp() / (log_ratio.exp() + gamma)


def _sapo(logp, b, *_):
    ratio, tau = (logp - b.old_logprob).exp(), torch.where(b.advantage >= 0, 1.0, 1.05 * torch.ones_like(logp))
    return -b.advantage * 4 * torch.sigmoid(tau * (ratio - 1)) / tau


def _kl(logp, b):
    return torch.exp(b.ref_logprob - logp) - (b.ref_logprob - logp) - 1


def _per_sequence(f, like, b, mine):
    """f(rows) for the tokens `mine` of every sequence, put together [N]; f gets a boolean mask."""
    out = torch.zeros_like(like)
    for label in b.sequence_id[mine].unique():
        rows = mine & (b.sequence_id == label)
        out = torch.where(rows, f(rows), out)
    return out


def _iw_sft(logp, b, entropy, mine):
    def weight(rows):
        return (logp - b.ref_logprob)[rows].sum().exp().clamp(max=16.0)

    return -_per_sequence(weight, logp, b, mine).detach() * logp


def _gspo(logp, b, entropy, mine):
    d = logp - b.old_logprob
    pooled = _per_sequence(lambda rows: d[rows].mean().exp(), logp, b, mine).detach()
    ratio = pooled * (logp - logp.detach()).exp()  # s of GSPO-token
    return -torch.minimum(ratio * b.advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * b.advantage)


def _gmpo(logp, b, entropy, mine, clip=0.4):
    sign = torch.where(b.advantage >= 0, 1.0, -1.0).to(logp.dtype)
    signed = sign * (logp - b.old_logprob)
    bounded = sign * torch.minimum(signed, signed.clamp(-clip, clip))
    pooled = _per_sequence(lambda rows: bounded[rows].mean().exp(), logp, b, mine).detach()
    return -b.advantage * pooled * torch.where(signed <= clip, (logp - logp.detach()).exp(), 1.0)


def _prefix_rft(logp, b, entropy, mine):
    def top(rows):
        keep = math.ceil(0.2 * int(rows.sum()))
        return rows & (entropy >= entropy[rows].sort(descending=True).values[keep - 1])

    return _per_sequence(lambda rows: top(rows).to(logp.dtype), logp, b, mine).detach() * _clipped(logp, b)


def _srft_expert(logp, b, entropy, mine):
    factor = _per_sequence(lambda rows: 0.5 * torch.exp(-entropy[rows].mean()), logp, b, mine).detach()
    return -factor * logp + _shaped(logp, b)


def _srft_rollout(logp, b, entropy, mine):
    factor = _per_sequence(lambda rows: 0.1 * torch.exp(entropy[rows].mean()), logp, b, mine).detach()
    return -torch.where(b.advantage > 0, factor, 1.0) * b.advantage * logp


# (expert, rollout); None where the method has no such tokens.
PUBLISHED = {
    "trapo": (_trsft, _ratio),
    "sft": (_sft, None),
    "trsft": (_trsft, None),
    "dft": (lambda logp, *_: -logp.exp(), None),
    "iw_sft_token": (lambda logp, b, *_: -_capped(logp - b.ref_logprob, 16.0), None),
    "iw_sft": (_iw_sft, None),
    "psft": (lambda logp, b, *_: -(logp - b.old_logprob).exp().clamp(max=1.2), None),
    "ppo": (None, _clip()),
    "grpo": (None, _clip()),
    "dr_grpo": (None, _clip()),
    "dapo": (None, _clip(0.2, 0.28)),
    "cispo": (None, lambda logp, b, *_: -b.advantage * _capped(logp - b.old_logprob, 5.0)),
    "sapo": (None, _sapo),
    "rloo": (None, lambda logp, b, *_: -b.advantage * logp),
    "reinforce_pp": (None, _clip()),
    "gspo": (None, _gspo),
    "gmpo": (None, _gmpo),
    "luffy": (lambda logp, b, *_: _shaped(logp, b), _ratio),
    "exgrpo": (lambda logp, b, *_: _shaped(logp - b.rollout_logprob, b), _clip()),
    "prefix_rft": (_prefix_rft, _clip()),
    "chord_mu": (lambda logp, *_: -0.1 * logp, lambda logp, b, *_: 0.9 * _clipped(logp, b)),
    "chord_phi": (
        lambda logp, *_: -0.1 * (logp.exp() - (2 * logp).exp() / 2),
        lambda logp, b, *_: 0.9 * _clipped(logp, b),
    ),
    "srft": (_srft_expert, _srft_rollout),
    "uft": (lambda logp, *_: -0.001 * logp, _clip()),
    "relift": (_sft, _ratio),
    "hpt": (_sft, _ratio),
    "reft": (_sft, _clip()),
}

# As the papers or their code write them, with a stop-gradient weight: another value, the same gradient.
SURROGATES = {
    "trapo": (lambda logp, *_: -logp.exp() / logp.exp().detach().clamp(min=0.1), _ratio),
    "trsft": (lambda logp, *_: -logp.exp() / logp.exp().detach().clamp(min=0.1), None),
    "dft": (lambda logp, *_: -logp.exp().detach() * logp, None),
    "iw_sft_token": (lambda logp, b, *_: -(logp - b.ref_logprob).exp().clamp(max=16.0).detach() * logp, None),
    "cispo": (None, lambda logp, b, *_: -(logp - b.old_logprob).exp().clamp(max=5.0).detach() * b.advantage * logp),
    "chord_phi": (
        lambda logp, *_: -0.1 * (logp.exp() * (1 - logp.exp())).detach() * logp,
        lambda logp, b, *_: 0.9 * _clipped(logp, b),
    ),
}


def eager_loss(name, logprob, entropy, b, entropy_coef=0.0, beta=0.0, formulas=PUBLISHED):
    """Σ w · published loss + β Σ w_K · k3 on rollouts - entropy_coef Σ w_H · H, over tokens that are not ignored."""
    total = logprob.new_zeros(())
    for role, formula in zip((Role.EXPERT, Role.ROLLOUT), formulas[name], strict=True):
        if formula is not None:
            mine = b.role == role
            total = total + (b.weight * formula(logprob, b, entropy, mine))[mine].sum()
    if beta:
        kl_weight = b.weight if b.kl_weight is None else b.kl_weight
        total = total + beta * (kl_weight * _kl(logprob, b))[b.role == Role.ROLLOUT].sum()
    return total - entropy_coef * (b.entropy_weight * entropy)[b.role != Role.IGNORED].sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def error(actual, expected):
    """Largest absolute difference, in fp64."""
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def check_as_close_as_eager(found, eager, exact):
    """Each result's error against fp64 is at most twice that of eager PyTorch in fp32, or of fp32 itself."""
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        floor = 4e-7 * max(1e-2, truth.abs().max().item())
        assert error(ours, truth) <= 2 * error(theirs, truth) + floor
