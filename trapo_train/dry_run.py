"""A dry run: the configuration with a tiny random model and generated problems in place of what would be downloaded, for one step.

Everything that the configuration decides is built and used: plan, objective, advantages, packing, LoRA, optimizer, schedule,
updates, evaluation. Nothing is downloaded, and nothing is written where the run will write.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trapo_train.checkpoints.checkpoint import CheckpointConfig
from trapo_train.config import RunConfig
from trapo_train.data.dataset import DataConfig
from trapo_train.models.scratch import ScratchConfig
from trapo_train.parallel.world import World
from trapo_train.reports.display import NullReporter
from trapo_train.reports.trackers import TrackingConfig
from trapo_train.rewards.functions import RewardTerm, load_reward
from trapo_train.train import RunSummary, run

_RESPONSE_TOKENS, _POSITIONS = 24, 96
_SHAPE = ScratchConfig(
    architecture="qwen2", hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=24, max_position=_POSITIONS
)

STAND_IN = "trapo_train.dry_run:stand_in_reward"


def stand_in_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """Values below 1, because 1 would count as correct, and different for different completions: a random model solves nothing, and
    equal rewards would leave no token in the loss."""
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def dry_config(config: RunConfig, output_dir: str) -> RunConfig:
    """`config` for one step of a tiny model on generated problems, written to `output_dir`."""
    problems = DataConfig(task="pointer_chasing", num_problems=4)
    held_out = replace(problems, split="test")
    prompts = min(2, config.prompts_per_step)
    named = isinstance(config.eval_data, dict)
    return replace(
        config,
        output_dir=output_dir,
        steps=1,
        epochs=None,
        prompts_per_step=prompts,
        data=problems,
        eval_data=dict.fromkeys(config.eval_data, held_out) if named else held_out if config.eval_data else None,
        reward=[RewardTerm(STAND_IN)] if isinstance(config.reward, list) else config.reward and STAND_IN,
        model=replace(
            config.model,
            name_or_path=None,
            revision=None,
            scratch=_SHAPE,
            tokenizer=None,
            eos_token=None,
            attention="auto",
            liger="auto" if config.model.liger else False,
            lora=config.model.lora and replace(config.model.lora, target_modules="all-linear"),  # whose names are another model's
        ),
        rollout=replace(
            config.rollout,
            max_response_tokens=_RESPONSE_TOKENS,
            paragraph_break="|",
            max_batch_tokens=4096,
            engine="transformers",
            correct_by=config.rollout.correct_by and STAND_IN,
        ),
        packing=replace(config.packing, max_tokens=4 * _POSITIONS),
        optimizer=replace(config.optimizer, warmup_steps=0) if config.optimizer.schedule == "polynomial" else config.optimizer,
        updates=replace(config.updates, mini_batches=min(prompts, config.updates.mini_batches)),
        evaluation=replace(config.evaluation, num_problems=2, group_by=None, pass_at=None, max_response_tokens=None),
        checkpoint=CheckpointConfig(every=1),
        tracking=TrackingConfig(),
    )


def dry_run(config: RunConfig) -> RunSummary:
    """Run `dry_config(config)` in a temporary directory; the configured rewards are loaded, too.

    Which packages the run itself would need is not asked, for another machine may have them, but PEFT, which the dry run uses
    itself, and math-verify, which loading its reward imports.

    Raises: whatever the run itself would raise for its configuration; KeyboardInterrupt where a signal stopped it.
    """
    load_reward(config.reward)
    world = World(config.parallel)
    with tempfile.TemporaryDirectory() as directory:
        summary = run(dry_config(config, world.gather(directory)[0]), NullReporter())
    if summary.interrupted:
        raise KeyboardInterrupt
    return summary
