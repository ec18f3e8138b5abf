"""A head whose parameters FSDP2 has sharded over ranks."""

from __future__ import annotations

from torch import Tensor


def unsharded(x: Tensor | None) -> Tensor | None:
    """A head's weight or bias whole, where FSDP2 has it in a unit of its own: the head functions take tensors, so nobody calls it.

    So Accelerate lays the head out under PEFT, and verl wherever it is not tied. Every rank must call this. It is not for a head
    inside the unit whose forward is running, which is whole there, nor for shards of a vocabulary, which `process_group` takes as
    they are. Of a DTensor it is `x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)`.

    Args:
        x: a DTensor of FSDP2, or a plain tensor or None, which are returned as they are.

    Returns: the whole tensor; its gradient reaches the shards as the mean over ranks, as all of FSDP2's do, where `full_tensor()`
        alone would leave each shard its own rank's part.
    Raises: what the all-gather raises, such as a timeout where a rank does not call this.
    Memory: the whole tensor. Determinism: an all-gather, in backward a reduce-scatter. Source: torch.distributed.tensor.
    """
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial  # a torch built without torch.distributed has none

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)
