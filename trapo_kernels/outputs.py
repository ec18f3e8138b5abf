"""What the public functions return."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

# Tensor where one was asked for; Tensor | None where the call alone does not say.
Entropy = TypeVar("Entropy", bound=Tensor | None, covariant=True)
GivenEntropy = TypeVar("GivenEntropy", bound=Tensor | None)  # of a parameter, which may not be covariant


class LogprobOutput(NamedTuple, Generic[Entropy]):
    """Nats, fp32 (fp64 for fp64 inputs), in the shape of target; zeros where target is -100. logsumexp carries no gradient."""

    logprob: Tensor
    entropy: Entropy
    logsumexp: Tensor


class PolicyLossOutput(NamedTuple, Generic[Entropy]):
    """loss: 0-d, differentiable. logprob, entropy [N] nats, detached; no entropy, and none in the metrics, where `policy_loss` got
    none. metrics: 0-d tensors (see `terms.metrics`). passes: 1 when the gradients came from the forward sweep, 2 when the loss was
    built on `linear_logprob`."""

    loss: Tensor
    logprob: Tensor
    entropy: Entropy
    metrics: dict[str, Tensor]
    passes: int
