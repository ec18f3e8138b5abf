"""Many ranks: the process group, the mesh that a model is sharded over, and what the ranks tell each other.

Every rank samples its share of a step's problems. Then all ranks exchange their samples, so each computes the same advantages,
weights and micro-batches as one process would, and runs every size-th micro-batch. The gradient therefore does not depend on the
number of ranks.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from trapo_train.schema import UserError, check


@dataclass(frozen=True)
class ParallelConfig:
    """How a run that `torchrun` starts spreads over its ranks; unused in a single process."""

    replicate: int = 1
    """Copies of the sharded model (HSDP), at least 1, a divisor of the number of ranks; 1 shards over all ranks (FSDP2)."""
    vocab_parallel_head: bool = False
    """Whether each rank computes its part of the vocabulary for the tokens of all ranks, so that no rank holds the whole output
    head or its gradient; needs replicate = 1 and a model whose head is not its embedding."""
    timeout_s: int = 1800
    """Longest wait for another rank, in seconds, from 1 to 31536000, a year; after it the run ends with an error."""

    def __post_init__(self) -> None:
        check(
            self,
            ("replicate", self.replicate >= 1, "at least 1"),
            ("timeout_s", 1 <= self.timeout_s <= 31_536_000, "from 1 to 31536000, a year"),
        )
        if self.vocab_parallel_head and self.replicate > 1:
            raise UserError(
                f"vocab_parallel_head needs replicate = 1, got {self.replicate}. Shard over all ranks, or leave the head to FSDP."
            )


class RankError(RuntimeError):
    """Another rank has died, or did not answer within parallel.timeout_s."""


class World:
    """This process among the ranks of a run; alone, all of its methods are trivial."""

    def __init__(self, config: ParallelConfig, environment: Mapping[str, str] = os.environ) -> None:
        self.size = int(environment.get("WORLD_SIZE", "1"))
        self.rank = int(environment.get("RANK", "0"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if self.size % config.replicate:
            raise UserError(
                f"parallel.replicate must divide the number of ranks, {self.size}, got {config.replicate}. "
                "Start as many ranks as replicas times shards."
            )
        self._shape = (config.replicate, self.size // config.replicate)
        self._timeout = timedelta(seconds=config.timeout_s)
        self.vocab_parallel_head = config.vocab_parallel_head and self.size > 1
        if self.size > 1:
            if cuda:
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                # Objects travel over gloo, gradients over NCCL where there is CUDA.
                backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
                with self.together():
                    dist.init_process_group(backend, timeout=self._timeout)

    @classmethod
    def alone(cls) -> World:
        """A single process, whatever the environment says."""
        return cls(ParallelConfig(), environment={})

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's part of a list that all ranks hold: every size-th item."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, the loss of another rank is a RankError, whichever collective operation notices it."""
        try:
            yield
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors, which name its source file; an error of ours may name such a path
            lost = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error))
            if self.size == 1 or not lost:
                raise
            raise RankError(
                f"parallel: rank {self.rank} has lost another rank: {str(error).splitlines()[0]} Look at what the rank that ended "
                "first printed, then continue with checkpoint.resume=true; a slow rank needs a larger parallel.timeout_s."
            ) from error

    def attempt(self, action: Callable[[], Any], *kinds: type[Exception]) -> list[Any]:
        """What `action` returns on each rank, as `gather`; where one of `kinds` is raised on a rank, every rank raises it, of
        several the first rank's, so that none goes on to wait for another."""
        value, error = None, None
        try:
            value = action()
        except kinds as raised:
            error = raised
        parts = self.gather((value, error and _portable(error)))
        for rank, (_, failed) in enumerate(parts):
            if failed is not None:
                raised = error if rank == self.rank else failed  # its own has a traceback
                raised.of_all_ranks = True
                raise raised
        return [part for part, _ in parts]

    def all_raise(self, error: Exception) -> bool:
        """Whether every rank has this error, as after `attempt`, so that they can do something together before they end."""
        return self.size == 1 or getattr(error, "of_all_ranks", False)

    def peak_memory_mib(self) -> float:
        """Most memory that a rank has held at once so far, MiB: by tensors on a GPU, by the process on a CPU."""
        if self.device.type == "cuda":
            return max(self.gather(torch.cuda.max_memory_allocated(self.device) / 2**20))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return max(self.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def close(self) -> None:
        """Leave the process group together."""
        if self.size > 1 and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """[shards], or [replicas, shards], whose process groups wait for a rank as long as all others do."""
        replicas, shards = self._shape
        if replicas == 1:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        mesh = init_device_mesh(self.device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():
            _set_pg_timeout(self._timeout, group)  # they are made with torch's default, 10 minutes for NCCL
        return mesh


def _portable(error: Exception) -> Exception:
    """`error`, or its words where it is none of those that can be sent to another rank."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of someone else's raises where it is not made to be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def interleave(parts: list[list[Any]]) -> list[Any]:
    """The list whose shares (see `World.share`) are `parts`."""
    out: list[Any] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        out[rank :: len(parts)] = part
    return out
