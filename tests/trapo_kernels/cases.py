"""Inputs and an independent eager formula per preset, shared by the kernel tests."""

import math

import torch

from trapo_kernels import Role, TokenBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNKED = ["torch", "triton"]


def backends(dtype):
    """The backends that run with `dtype`; Triton's statistics are fp32."""
    return ["torch"] if dtype == torch.float64 else CHUNKED


def head(num_rows, hidden_size, vocab_size, dtype=torch.float64, scale=1.0, seed=0):
    """hidden [N, D], weight [V, D], bias [V] that require grad; logits have standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, factor=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * factor
        return values.to(DEVICE, dtype).requires_grad_()

    return draw(num_rows, hidden_size, factor=scale), draw(vocab_size, hidden_size, factor=hidden_size**-0.5), draw(vocab_size)


def batch(num_rows, vocab_size, dtype=torch.float64, roles=(0, 1, 2), seed=1, with_ref=True, **changes):
    """A TokenBatch of mixed roles, advantages of both signs, off-policy anchors and its own entropy weights."""
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
    } | changes
    return TokenBatch(**{k: v if v is None else v.to(DEVICE) for k, v in streams.items()})


def eager_statistics(hidden, weight, target, bias=None, temperature=1.0, softcap=None):
    """logprob and entropy by the textbook, in the dtype of the inputs."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(1, target.clamp(min=0)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _clipped(logp, b, low, high):
    ratio = (logp - b.old_logprob).exp()
    return -torch.minimum(ratio * b.advantage, ratio.clamp(1 - low, 1 + high) * b.advantage)


def _ratio(logp, b):
    return -b.advantage * (logp - b.old_logprob).exp()


def _trsft(logp, alpha=0.1):
    # p/α below α, 1 + log(p/α) above; written with clamps because torch.where has a NaN gradient at p = 0
    return -(logp.exp().clamp(max=alpha) / alpha + (logp - math.log(alpha)).clamp(min=0))


def _kl(logp, b):
    return torch.exp(b.ref_logprob - logp) - (b.ref_logprob - logp) - 1


# The published loss per token: (expert, rollout); None where the method has no such tokens.
PUBLISHED = {
    "trapo": (lambda logp, b: _trsft(logp), _ratio),
    "sft": (lambda logp, b: -logp, None),
    "trsft": (lambda logp, b: _trsft(logp), None),
    "dft": (lambda logp, b: -logp.exp(), None),  # DFT reports -sg(p)·logp; the gradient, -∇p, is that of -p
    "grpo": (None, lambda logp, b: _clipped(logp, b, 0.2, 0.2)),
    "dr_grpo": (None, lambda logp, b: _clipped(logp, b, 0.2, 0.2)),
    "dapo": (None, lambda logp, b: _clipped(logp, b, 0.2, 0.28)),
    "luffy": (lambda logp, b: -b.advantage * logp.exp() / (logp.exp() + 0.1), _ratio),
}


def eager_loss(name, logprob, entropy, b, entropy_coef=0.0, beta=0.0):
    """Σ w · published loss + β Σ w · k3 on rollouts - entropy_coef Σ w_H · H, over tokens that are not ignored."""
    total = logprob.new_zeros(())
    for role, formula in zip((Role.EXPERT, Role.ROLLOUT), PUBLISHED[name], strict=True):
        if formula is not None:
            total = total + (b.weight * formula(logprob, b))[b.role == role].sum()
    if beta:
        total = total + beta * (b.weight * _kl(logprob, b))[b.role == Role.ROLLOUT].sum()
    return total - entropy_coef * (b.entropy_weight * entropy)[b.role != Role.IGNORED].sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def error(actual, expected):
    """Largest absolute difference, in fp64."""
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
