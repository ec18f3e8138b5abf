"""The configured engine, and how it receives the updated weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from trapo_train.checkpoints.checkpoint import CheckpointError
from trapo_train.checkpoints.export import check_replaceable, export_model
from trapo_train.checkpoints.model_state import whole_weights
from trapo_train.engines.engine import EngineError, TransformersEngine
from trapo_train.engines.vllm_engine import VllmEngine
from trapo_train.engines.vllm_server import VllmServerEngine
from trapo_train.models.model import body_autocast, policy_head
from trapo_train.models.placement import gathered
from trapo_train.models.tokenizer import end_ids
from trapo_train.parallel.world import World

if TYPE_CHECKING:
    from trapo_train.config import RunConfig

AnyEngine = TransformersEngine | VllmServerEngine | VllmEngine


def build_engine(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, *, seed: int
) -> AnyEngine:
    """The engine of `rollout.engine` for this rank; all that ends a response ends one there.

    Raises: EngineError for a server that does not answer or that another run uses, or vLLM that is not installed; CheckpointError
        for a sync_dir that holds what is not the trainer's to replace.
    """
    engine = _engine(config, model, tokenizer, world, seed)
    engine.end_ids = end_ids(config.model.eos_token, model, tokenizer)
    return engine


def _engine(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, seed: int) -> AnyEngine:
    rollout = config.rollout
    if rollout.engine == "transformers":
        return TransformersEngine(model, tokenizer, seed=seed, max_batch_tokens=rollout.max_batch_tokens)
    if rollout.engine == "vllm_server":
        weights = Path(config.output_dir) / "vllm_weights"
        engine = VllmServerEngine(rollout.vllm_server, config.model.name_or_path or "", weights, tokenizer, seed=seed)
        engine.check()
        world.attempt(engine.claim if world.first else lambda: None, EngineError, OSError)
        check_replaceable(engine.sync_dir)
        return engine
    folder = Path(config.output_dir) / f"vllm_config_{world.rank}"
    return VllmEngine(rollout.vllm, model, folder, tokenizer, seed=seed, dtype=config.model.dtype, ranks=world.size)


@contextmanager
def ready_to_generate(
    engine: AnyEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, *, step: int
) -> Iterator[None]:
    """Inside, the engine samples from the weights as they are at rollout step `step`; every rank must enter.

    Raises: EngineError on every rank, where they cannot be written or vLLM does not take them on one, or does not sleep afterwards.
    """
    if isinstance(engine, TransformersEngine):
        with gathered(model), body_autocast(model):
            yield
    elif isinstance(engine, VllmEngine):
        world.attempt(engine.wake, EngineError)  # before the weights, which all ranks put together
        world.attempt(lambda: engine.load(_weights_as_saved(model, policy_head(model).compute_dtype)), EngineError)
        try:
            yield
        except BaseException:  # perhaps of this rank alone, while the others are elsewhere
            with suppress(EngineError):
                engine.sleep()
            raise
        world.attempt(engine.sleep, EngineError)
    else:
        if engine.loaded_step != step:
            world.attempt(lambda: _write_for(engine, model, tokenizer, world), EngineError)
        # also where they are unchanged: the server may have started anew since
        world.attempt(engine.load_weights if world.first else lambda: None, EngineError)
        engine.loaded_step = step
        yield


def _weights_as_saved(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`whole_weights` under the names and in the shapes of the model's files, which is what vLLM reads: transformers holds the
    experts of a layer as one tensor, files have one for each.

    Raises: EngineError for a model of which several weights are one in its files, as here each is turned back alone.
    """
    seen: set[str] = set()
    for name, weight in whole_weights(model, dtype):
        for saved_name, saved in revert_weight_conversion(model, {name: weight}).items():
            if saved_name in seen:
                raise EngineError(
                    f"vllm: each tensor of the model's files must come from one weight of the model, got {saved_name} of several, "
                    f"{name} the last. Use rollout.engine=vllm_server, which reads whole files."
                )
            seen.add(saved_name)
            yield saved_name, saved


def _write_for(engine: VllmServerEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
    try:
        export_model(model, tokenizer, engine.sync_dir, world, policy_head(model).compute_dtype)
    except CheckpointError as error:  # the step is not trained, and what was trained before it can be saved
        raise EngineError(f"vllm_server: the weights cannot be handed over. {error} Mend that, or set sync_dir.") from error
