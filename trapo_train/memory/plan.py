"""How much memory a run will need on each GPU, by component and phase, before anything is loaded.

Weights, gradients and optimizer state are counted on the model's own shapes, activations are traced through its own code on fake
tensors (see `memory_trace`), buffers of head and rollouts follow from their sizes. Not included: the CUDA context or, on a CPU,
Python and its libraries, the allocator's fragmentation, and what other processes hold. What a run has held so far is
`peak_memory_mib`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from trapo_kernels import LEAST_KEPT_BYTES, head_memory
from trapo_train.config import RunConfig
from trapo_train.engines.cache import ROOM, SMALL
from trapo_train.extras import is_installed
from trapo_train.memory.trace import HeadSizes, Weights, frozen_bytes, trace_optimizer, trace_pass, trace_prefill, weigh
from trapo_train.models.loading import check_places, name_model_in_hub_errors, read_architecture
from trapo_train.models.lora import LoraConfig, check_no_adapter
from trapo_train.models.model import DTYPES
from trapo_train.models.tokenizer import load_tokenizer
from trapo_train.schema import UserError
from trapo_train.step.objective import extreme_objectives
from trapo_train.tasks import tokenizer_of

PHASES = ("rollout", "loss", "backward", "update")
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU."""

    components: dict[str, dict[str, int]]
    """By component, then by phase; a phase that does not hold it is missing."""
    gpus: int
    context: int
    """Prompt and response together, tokens."""
    micro_batch_tokens: int
    sequences: int
    """Responses that a rank generates together, where that takes most."""
    generated: int
    """Prompt and response of one of these together, tokens: `context`, or that of an evaluation."""
    generated_by: str
    """Whose responses these are, and the setting that bounds how many."""
    longest: int
    """The longer of those two, tokens."""
    loading_bytes: int
    """Host memory that the first rank takes to load: the whole model in float32, from which every GPU gets its shard."""

    def total(self, phase: str) -> int:
        """Bytes held in a phase."""
        return sum(sizes.get(phase, 0) for sizes in self.components.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """Bytes held in that phase."""
        return self.total(self.peak_phase)


def plan_memory(
    config: RunConfig, *, gpus: int = 1, context: int | None = None, device_type: str = "cuda", gpu_bytes: int | None = None
) -> MemoryPlan:
    """Predict what each of `gpus` GPUs must hold; needs the model's config.json, not its weights.

    Args:
        gpus: ranks, a multiple of parallel.replicate.
        context: tokens of the longest prompt and response together; None for the longest that data.max_prompt_tokens,
            rollout.max_response_tokens and the model's positions allow; an evaluation has prompts as long and responses of
            its own max_response_tokens.
        device_type: "cuda" or "cpu", whose kernels take other chunks.
        gpu_bytes: what one GPU has; of it vLLM in the trainer's process takes its share, which is left out where this is None.

    A micro-batch is taken to be full (packing.max_tokens), with all of its tokens in the loss and the gradients of an earlier one
    there; responses that are generated together all reach the full context.

    Raises: UserError for a number of GPUs that replicate does not divide, or a model that cannot be traced.
    """
    if gpus < 1 or gpus % config.parallel.replicate:
        raise UserError(
            f"plan-memory: gpus must be a multiple of parallel.replicate = {config.parallel.replicate} and at least 1, got {gpus}."
        )
    if context is not None and context < 2:
        raise UserError(f"plan-memory: context must be at least 2 tokens, a prompt and a response, got {context}.")
    architecture = load_architecture(config)
    lengths = _lengths(config, architecture, context)
    context = lengths[0]
    tokens = max(config.packing.max_tokens, context)
    weights = weigh(config.model, architecture)
    shards = gpus // config.parallel.replicate
    state, transient = trace_optimizer(config.model, architecture, config.optimizer, device_type)
    always = {
        "weights": weights.held_bytes // shards,
        "optimizer state": state // shards,
    }
    if config.model.lora is None and any("ref_logprob" in objective.reads() for objective in extreme_objectives(config.objective)):
        always["reference model"] = frozen_bytes(config.model, architecture) // shards
    rollout, *responses = _most_generated(config, architecture, weights, gpus, lengths, device_type)
    components = {name: dict.fromkeys(PHASES, size) for name, size in always.items()}
    parts = [
        *_training(config, architecture, weights, gpus, context, tokens, device_type),
        *rollout,
        *_vllm(config, gpu_bytes),
        ("gradients, float32", {phase: 4 * weights.trained // shards for phase in ("loss", "backward", "update")}),
        ("optimizer step", {"update": transient // shards}),
    ]
    for name, sizes in parts:
        held = {phase: size for phase, size in sizes.items() if size}
        if held:
            components[name] = components.get(name, {}) | held
    return MemoryPlan(components, gpus, context, tokens, *responses, max(lengths), 4 * weights.total)


def _lengths(config: RunConfig, architecture: PretrainedConfig, context: int | None) -> list[int]:
    """Prompt and response together, tokens: of the rollouts, `context` where that is given, and of an evaluation if it samples."""
    response = config.rollout.max_response_tokens
    prompt = config.data.max_prompt_tokens if context is None else context - response
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None) or math.inf
    found = [min(prompt + response, positions) if context is None else context]
    if config.eval_data is not None and config.evaluation.sample:
        held_out = config.evaluation.sampling(config.rollout)
        found.append(max(2, min(prompt + held_out.max_response_tokens, positions)))
    return found


def load_architecture(config: RunConfig) -> PretrainedConfig:
    """The configuration of the model, from its config.json or the shape of a model from scratch."""
    model = config.model
    check_places(model)
    tokenizer = None if model.scratch is None else load_tokenizer(model, tokenizer_of(config.data.task))
    with name_model_in_hub_errors(model):
        check_no_adapter(model.name_or_path, model.revision)
        return read_architecture(model, tokenizer)


def _training(
    config: RunConfig, architecture: PretrainedConfig, weights: Weights, gpus: int, context: int, tokens: int, device_type: str
) -> Iterator[tuple[str, dict[str, int]]]:
    """What the passes over a micro-batch hold besides weights and gradients of the shards."""
    text = architecture.get_text_config()
    dtype = DTYPES[config.model.dtype]
    sharded = gpus > 1
    vocab_parallel = config.parallel.vocab_parallel_head and sharded
    ranks = gpus if vocab_parallel else 1
    memory = head_memory(
        tokens * ranks,
        text.hidden_size,
        text.vocab_size // ranks,
        dtype=dtype,
        weight_dtype=weights.head_dtype if vocab_parallel or not sharded else dtype,
        device_type=device_type,
        grad_weight=weights.head_trained,
        vocab_parallel=vocab_parallel,
    )
    vocab_size = text.vocab_size // ranks
    wide = memory["grad_weight"] == torch.float32.itemsize * text.hidden_size * vocab_size
    kept = {name: size if device_type == "cpu" and size >= LEAST_KEPT_BYTES else 0 for name, size in memory.items()}
    head = HeadSizes(tokens * ranks, vocab_size, torch.float32 if wide else dtype, kept["grad_weight"] > 0)
    segments = tuple([context] * (tokens // context) + ([tokens % context] if tokens % context else []))
    found = trace_pass(config.model, architecture, segments, head, cast=not sharded)
    of_others = tokens * (ranks - 1) * text.hidden_size * dtype.itemsize
    inside = {
        "chunk of logits and its gradient": memory["logits"],
        "head: hidden states": memory["hidden chunk"] + memory["grad_hidden"] + of_others,
        "head: gradient of its weight": memory["grad_weight"] + memory["rounding"],
        "head: weight in the type of its GEMMs": memory["weight"],
    }
    # With a small vocabulary the layers before it may need more than the head.
    during_loss = max(found.activations, found.forward_peak - sum(inside.values()))
    yield "activations", {"loss": during_loss, "backward": found.backward_peak}
    for name, size in inside.items():
        yield name, {"loss": size}
    yield "memory kept for the next head", {"backward": kept["logits"], "update": kept["logits"] + kept["grad_weight"]}
    if sharded:
        layer = (weights.total - weights.outside_layers) // text.num_hidden_layers
        head_unit, rest = 0 if vocab_parallel else weights.head, weights.outside_layers - weights.head
        # (weights gathered, unit whose gradient is scattered) while backward is at a layer, and at a head of its own
        moments = [(rest + 2 * layer, layer), *([(rest + head_unit + layer, head_unit)] if head_unit else [])]
        gathered, unit = max(moments, key=sum)
        whole = {"loss": dtype.itemsize * (rest + head_unit + 2 * layer), "backward": dtype.itemsize * gathered}
        yield "weights gathered by FSDP", whole
        of_embedding = 0 if weights.head else rest  # tied, it has a gradient from the head on
        trained = weights.trained / weights.total
        summed = 4 * unit * (1 + config.parallel.replicate / gpus)  # whole before ranks add theirs, and this rank's part of the sum
        scattered = int(trained * (dtype.itemsize * (of_embedding + unit) + summed))
        yield "gradients before FSDP scatters them", {"backward": scattered}


def _rollout(
    config: RunConfig,
    architecture: PretrainedConfig,
    weights: Weights,
    gpus: int,
    context: int,
    sequences: int,
    device_type: str,
) -> Iterator[tuple[str, dict[str, int]]]:
    """What the embedded engine holds; a server holds its own."""
    if config.rollout.engine != "transformers" or not sequences:
        return
    text = architecture.get_text_config()
    dtype = DTYPES[config.model.dtype]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = text.num_key_value_heads * head_dim * sequences
    columns = context + (ROOM if token * context >= SMALL else 0)
    layer = 2 * token * columns * dtype.itemsize
    # float32: the logits, their logprobs, probabilities and their sums, which a GPU adds up in float64; top_p and top_k sort them.
    per_logit = 33 if config.rollout.top_p < 1 or config.rollout.top_k > 0 else 20 if device_type == "cuda" else 16
    # One copy of each prompt is read.
    prompts = min(math.ceil(config.prompts_per_step / gpus), sequences)
    prompt_tokens = prompts * max(1, min(config.data.max_prompt_tokens, context - 1))
    held = {
        # What grows, or is joined by others, is copied layer by layer.
        "keys and values of the responses": layer * (text.num_hidden_layers + 1),
        "logits of the next tokens": per_logit * sequences * text.vocab_size,
        "activations": trace_prefill(config.model, architecture, prompt_tokens),
    }
    for name, size in held.items():
        yield name, {"rollout": size}
    if gpus > 1:
        gathering = _gathering(weights, gpus // config.parallel.replicate, dtype) - sum(held.values())  # over when these begin
        yield "weights gathered by FSDP", {"rollout": max(weights.total * dtype.itemsize, gathering)}
    elif dtype.itemsize < 4:
        yield "weights cast while generating", {"rollout": weights.cast * dtype.itemsize}


def _vllm(config: RunConfig, gpu_bytes: int | None) -> Iterator[tuple[str, dict[str, int]]]:
    """The share of the GPU that vLLM takes in the trainer's process, while it is awake."""
    if config.rollout.engine == "vllm" and gpu_bytes is not None:
        share = int(config.rollout.vllm.gpu_memory_utilization * gpu_bytes)
        yield "vLLM", dict.fromkeys(("rollout",) if config.rollout.vllm.sleep else PHASES, share)


def _gathering(weights: Weights, shards: int, dtype: torch.dtype) -> int:
    """Bytes while embedding and head, the first units, are gathered: what came, unpacked, and the shard that was cast for it."""
    return int(dtype.itemsize * weights.outside_layers * (2 if dtype == torch.float32 else 2 + 1 / shards))


def _most_generated(
    config: RunConfig, architecture: PretrainedConfig, weights: Weights, gpus: int, lengths: list[int], device_type: str
) -> tuple[list[tuple[str, dict[str, int]]], int, int, str]:
    """What `_rollout` yields for a step's problems or for an evaluation, whichever takes more; the responses that a rank generates
    together then, the tokens of each with its prompt, and whose they are."""
    share, of_call = math.ceil(config.prompts_per_step / gpus) * config.plan.largest_request, config.evaluation.responses_per_call
    wanted = [(config.rollout, share, lengths[0], "a step", f"prompts_per_step={config.prompts_per_step}")]
    for length in lengths[1:]:
        own, bound = config.evaluation.sampling(config.rollout), f"evaluation.responses_per_call={of_call}"
        wanted.append((own, of_call, length, "an evaluation call", bound))
    found = []
    for rollout, responses, length, whose, bound in wanted:
        sequences = max(1, config.rollout.max_batch_tokens // length)
        if sequences < responses:
            bound = f"rollout.max_batch_tokens={config.rollout.max_batch_tokens}"
        sequences = min(responses, sequences)
        parts = list(_rollout(replace(config, rollout=rollout), architecture, weights, gpus, length, sequences, device_type))
        found.append((parts, sequences, length, f"{whose}; {bound} bounds them"))
    return max(found, key=lambda entry: (sum(size for _, sizes in entry[0] for size in sizes.values()), entry[1]))


def changes(
    config: RunConfig,
    plan: MemoryPlan,
    *,
    context: int | None = None,
    device_type: str = "cuda",
    gpu_bytes: int | None = None,
) -> list[tuple[str, MemoryPlan]]:
    """Single settings that lower the peak of `config`, each with its own plan; the most effective first. `plan` is that of
    `config`, made with the same `context`, `device_type` and `gpu_bytes`."""
    found = []
    for setting, changed, gpus in _candidates(config, plan):
        other = plan_memory(changed, gpus=gpus, context=context, device_type=device_type, gpu_bytes=gpu_bytes)
        if other.peak_bytes < plan.peak_bytes:
            found.append((setting, other))
    return sorted(found, key=lambda pair: pair[1].peak_bytes)


def _candidates(config: RunConfig, plan: MemoryPlan) -> Iterator[tuple[str, RunConfig, int]]:
    def model(setting: str, **values: Any) -> tuple[str, RunConfig, int]:
        return f"model.{setting}", replace(config, model=replace(config.model, **values)), plan.gpus

    if config.model.dtype == "float32":
        yield model("dtype=bfloat16", dtype="bfloat16")
    if not config.model.gradient_checkpointing:
        yield model("gradient_checkpointing=true", gradient_checkpointing=True)
    if config.model.lora is None and is_installed("peft"):
        yield model("lora={rank: 16}", lora=LoraConfig(rank=16))
    if plan.micro_batch_tokens > plan.context:
        tokens = max(plan.context, plan.micro_batch_tokens // 2)
        yield f"packing.max_tokens={tokens}", replace(config, packing=replace(config.packing, max_tokens=tokens)), plan.gpus
    if plan.sequences > 1:
        tokens = max(plan.longest, plan.generated * (plan.sequences // 2))  # a run refuses less than one response
        yield (
            f"rollout.max_batch_tokens={tokens}",
            replace(config, rollout=replace(config.rollout, max_batch_tokens=tokens)),
            plan.gpus,
        )
    if config.rollout.engine == "transformers":
        server = replace(config.rollout, engine="vllm_server")
        yield "rollout.engine=vllm_server (on other GPUs)", replace(config, rollout=server), plan.gpus
    if plan.gpus > 1 and config.parallel.replicate > 1:
        yield "parallel.replicate=1", replace(config, parallel=replace(config.parallel, replicate=1)), plan.gpus
    yield f"--gpus {2 * plan.gpus}", config, 2 * plan.gpus
