"""One optimizer step: micro-batches in, new weights and metrics out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from trapo_kernels import Objective
from trapo_train.micro_batch import MicroBatch
from trapo_train.models.model import policy_forward
from trapo_train.parallel.world import World
from trapo_train.step.tally import Tally


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is not finite, or weights that are to be saved are not."""


def optimizer_step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    temperature: float,
    max_grad_norm: float,
    world: World | None = None,
) -> dict[str, Any]:
    """Accumulate the gradients of all micro-batches, clip them, and update the weights once.

    A step whose gradient norm is not finite leaves weights and optimizer state alone and reports
    "skipped_step" = 1; one without a loss token leaves them alone as well; the schedule goes on. The metrics reach the host in one
    transfer at the end.

    Args:
        temperature: > 0, the sampling temperature of the rollouts.
        max_grad_norm: L2 norm that gradients are scaled down to; 0 never clips.
        world: the ranks that run this step together, each on its own micro-batches, equally many; None for a single process.
            FSDP averages gradients over the ranks, so that each rank's loss is multiplied by their number.

    Returns: loss, grad_norm (before clipping), learning_rate, loss_tokens, micro_batches, loss_passes (2 where the objective
        needs the logprobs of whole sequences first, else 1), skipped_step; and for each role that has tokens, entropy/<role>
        in nats and the kernel's metrics (see `linear_policy_loss`), TrSFT's under trsft/. They are means over the tokens that
        carry a gradient: without an entropy bonus rollouts of advantage 0 are left out.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    ranks = 1 if world is None else world.size
    tally = Tally()
    passes = 1
    # All are uploaded, a few MiB each, before the first pass: no copy stands between two of them.
    for number, micro_batch in enumerate([micro_batch.to(device) for micro_batch in micro_batches]):
        if isinstance(model, FSDPModule):  # replicas (HSDP) meet once, with the whole sum
            model.set_requires_all_reduce(number == len(micro_batches) - 1)
        out = policy_forward(model, micro_batch, objective, temperature)
        (out.loss if ranks == 1 else out.loss * ranks).backward()
        tally.add(out, micro_batch, objective)
        passes = max(passes, out.passes)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    if ranks > 1:
        # With a vocabulary-parallel head every rank has seen the tokens of all ranks already.
        tally = tally.on_cpu() if world.vocab_parallel_head else Tally.merged(world.gather(tally.on_cpu()))
    metrics = tally.result({"grad_norm": grad_norm.cpu() if ranks > 1 else grad_norm})
    finite = math.isfinite(metrics["grad_norm"])  # a loss may overflow alone, as a KL k3_corrected far from its reference does
    learning_rate = optimizer.param_groups[0]["lr"]
    if finite and metrics["loss_tokens"]:  # without a token the momentum alone would move the weights
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _advance(scheduler)
    return metrics | {
        "learning_rate": learning_rate,
        "micro_batches": len(micro_batches),
        "loss_passes": passes,
        "skipped_step": int(not finite),
    }


def _advance(scheduler: LRScheduler) -> None:
    """The next learning rate; without torch's warning where the first update is left out, whose rate is used up all the same."""
    if scheduler.last_epoch:  # torch looks at the first step alone, and leaving catch_warnings rearms every warning shown once
        scheduler.step()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        scheduler.step()
