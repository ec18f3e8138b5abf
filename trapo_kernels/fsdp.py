"""A head whose parameters FSDP2 has sharded over ranks."""

from __future__ import annotations

from torch import Tensor


def unsharded(x: Tensor | None) -> Tensor | None:
    """A head's weight or bias whole, where FSDP2 wraps it separately, as under Accelerate with PEFT, or untied in verl.

    That unit's module is never called, because the head functions take tensors.

    Equivalent to, for a DTensor:

        from torch.distributed.tensor import Partial
        on_device = x.to(x.device_mesh.device_type)  # from host memory, where FSDP2's CPUOffloadPolicy has it
        weight = on_device.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)

    It is not for a head inside the unit whose forward is running, which is whole there, nor for shards of a vocabulary, which
    `process_group` takes as they are.

    Args:
        x: a DTensor of FSDP2, or a plain tensor or None, which are returned as they are.

    Returns: the whole tensor, for one forward and its backward. Its gradient reaches the shards as the mean over ranks, as FSDP2's
        do by default, where `full_tensor()` alone would leave each shard its own rank's part.
    Raises: what the all-gather raises, such as a timeout where a rank does not call this: every rank must.
    In compiled code torch 2.13 and newer gather inside of the graph; older ones break it there.
    Memory: the whole tensor. Determinism: an all-gather, in backward a reduce-scatter. Source: torch.distributed.tensor.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial  # a torch built without torch.distributed has none

    on_device = x.to(x.device_mesh.device_type)
    return on_device.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def is_dtensor(x: object) -> bool:
    """By its name, too: in compiled code a DTensor has no attributes to ask for. Nothing is imported for it."""
    return isinstance(x, Tensor) and (type(x).__name__ == "DTensor" or hasattr(x, "full_tensor"))
