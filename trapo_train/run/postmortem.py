"""What is kept of a batch whose gradient is not finite: its samples to read, its micro-batches to run again.

from trapo_train.config import load_config
from trapo_train.models.model import policy_forward
from trapo_train.run.postmortem import load_batch
from trapo_train.trainer import Trainer

trainer = Trainer(load_config("runs/my/config.yaml"))  # the model of before training
temperature = trainer.config.rollout.temperature
for micro_batch in load_batch("runs/my/non_finite_step_7/rank_0.pt"):
    print(policy_forward(trainer.model, micro_batch.to(trainer.world.device), trainer.objective, temperature).loss)
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trapo_kernels import TokenBatch
from trapo_train.micro_batch import MicroBatch
from trapo_train.rollouts.samples import sample_record, write_lines

if TYPE_CHECKING:
    from trapo_train.trainer import Trainer

SAMPLES_FILE = "samples.jsonl"


def save_batch(directory: Path, trainer: Trainer) -> None:
    """Write the micro-batches of this rank's last step to rank_<r>.pt in `directory`, and on the first rank the samples of all to
    samples.jsonl, one per line (see `samples.sample_record`)."""
    directory.mkdir(parents=True, exist_ok=True)
    if trainer.world.first:
        samples = (sample for group in trainer.last_groups for sample in group)
        judged = trainer.reward is not None
        write_lines(directory / SAMPLES_FILE, (sample_record(sample, trainer.tokenizer, judged=judged) for sample in samples))
    torch.save([_plain(micro_batch) for micro_batch in trainer.last_micro_batches], directory / f"rank_{trainer.world.rank}.pt")


def load_batch(path: str | Path) -> list[MicroBatch]:
    """The micro-batches that `save_batch` wrote to a rank_<r>.pt, in their order; read with weights_only, so no code can run."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return [MicroBatch(**{**values, "batch": TokenBatch(**values["batch"])}) for values in saved]


def _plain(record: MicroBatch | TokenBatch) -> dict[str, Any]:
    """The fields that a record is made of as tensors and tuples; a batch inside a micro-batch likewise."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: _plain(value) if isinstance(value, TokenBatch) else value for name, value in values.items()}
