"""Loading a causal LM with a policy head, and running it on a packed micro-batch.

The policy head is the model's own output head; given a call, it runs the fused op inside its `forward`, which is where
FSDP2 has gathered its weight. Without one it is a plain Linear, so `generate` and `save_pretrained` work unchanged.
"""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trapo_kernels import Objective, PolicyLossOutput, head_options, linear_logprob, linear_policy_loss
from trapo_train.micro_batch import MicroBatch
from trapo_train.models.attention import (
    check_architecture,
    check_attention,
    check_packing,
    choose_attention,
    plain_attention,
    segment_arguments,
)
from trapo_train.models.autocast import cast_embeddings, cast_routers
from trapo_train.models.dropout import check_one_policy, switch_off_dropout
from trapo_train.models.first_rank import meta_model
from trapo_train.models.liger import apply_liger
from trapo_train.models.loading import (
    check_ends,
    drop_further_layers,
    hub_options,
    keep_processor,
    make_savable,
    read_architecture,
    tell_of_tokens_without_embedding,
    tell_of_unplaced,
    tell_of_untrained_balance,
    train_text_alone,
)
from trapo_train.models.lora import LoraConfig, add_lora, check_no_adapter, hold_frozen
from trapo_train.models.scratch import ScratchConfig
from trapo_train.models.tokenizer import end_generation_too, end_ids, load_tokenizer
from trapo_train.parallel.vocab_parallel import gather_rows, scale_gradient, shard_over_vocabulary
from trapo_train.schema import UserError, check, expand_home, refused

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelConfig:
    """Which causal LM to train and how to run it; give either `name_or_path` or `scratch`."""

    name_or_path: str | None = None
    """Hugging Face name or local directory of a causal LM with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub, and of its own tokenizer; null for the newest."""
    scratch: ScratchConfig | None = None
    """Shape of a model with random weights, in place of `name_or_path`."""
    tokenizer: str | None = None
    """Name or directory of the tokenizer; by default the model's own, or the task's for a model from scratch."""
    eos_token: str | list[str] | None = None
    """Token that ends a response, such as <|im_end|> or <end_of_turn>, or several, of which the first ends expert traces
    without one; null: the tokenizer's own, and with it the special tokens that the model's generation_config names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type, float32 or bfloat16; trained weights, gradients and optimizer state are float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in backward: less memory for about a third more time."""
    attention: Literal["auto", "sdpa_packed", "varlen", "flash_attention_2"] = "auto"
    """flash_attention_2 (the package flash-attn) or varlen (torch's own FlashAttention), both for CUDA in bfloat16, or sdpa_packed;
    auto takes the first of them that can run."""
    liger: bool | Literal["auto"] = False
    """Liger's kernels for norms, rotary embeddings and MLP (extra [liger], CUDA): true, false, or auto where they can run."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights; null trains the weights."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; off, because that code is not checked by anyone."""

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.scratch is None):
            given = "both" if self.scratch is not None else "neither"
            raise UserError(
                f"Give exactly one of name_or_path and scratch, got {given}. "
                "Set model.name_or_path=<name or directory>, or model.scratch.hidden_size=128 for random weights."
            )
        expand_home(self, "name_or_path", "tokenizer")
        check(self, ("eos_token", self.eos_token != [], "null, a token or a list of at least one"))


class PolicyHead(nn.Linear):
    """A model's output head that can run the fused op on its own weight.

    `compute_dtype` is what hidden states are cast to and the op computes in; `softcap` caps the logits inside it; `divisor` is what
    the model divides them by after the cap (Cohere, Granite), so that an op's temperature is multiplied by it.
    """

    compute_dtype: torch.dtype
    softcap: float | None
    divisor: float
    process_group: ProcessGroup | None = None  # the ranks that the vocabulary is sharded over
    _whole: tuple[Tensor, Tensor | None] | None = None  # weight and bias while they are gathered

    @classmethod
    def adopt(cls, linear: nn.Linear, *, compute_dtype: torch.dtype, softcap: float | None, divisor: float = 1.0) -> PolicyHead:
        """A head that holds the very parameters of `linear`, so that tied weights stay tied."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight = linear.weight
        head.bias = linear.bias
        head.compute_dtype, head.softcap, head.divisor = compute_dtype, softcap, divisor
        return head

    def shard_over_vocabulary(self, mesh: DeviceMesh) -> None:
        """Keep this rank's rows of weight and bias; the loss is then computed by all ranks together."""
        shard_over_vocabulary(self, mesh)
        self.process_group = mesh.get_group()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, a sharded head has its whole weight, in its compute type, and gives logits; every rank must enter."""
        if self.process_group is None:
            yield
            return
        with torch.no_grad():
            weight, bias = (None if x is None else x.to(self.compute_dtype).full_tensor() for x in (self.weight, self.bias))
            self._whole = (weight, bias)
        try:
            yield
        finally:
            self._whole = None

    def forward(
        self, hidden: Tensor, loss_fn: Callable[..., Any] | None = None, rows_per_rank: tuple[int, ...] | None = None
    ) -> Any:
        """Logits of `hidden` [..., D]; or `loss_fn(hidden, weight, bias, softcap, logits_dtype, process_group)` of hidden [N, D].

        With a head sharded over the vocabulary `rows_per_rank` are the rows that each rank brings, and `loss_fn` sees all of them.
        """
        if loss_fn is None:
            return super().forward(hidden) if self._whole is None else nn.functional.linear(hidden, *self._whole)
        weight, bias = self.weight, self.bias
        # The op chooses its own precision: autocast would turn its fp32 statistics into bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.compute_dtype)
            if self.process_group is not None:
                hidden = gather_rows(hidden, rows_per_rank, self.process_group)
                # A loss is multiplied by the number of ranks because FSDP averages gradients; nothing averages these.
                average = 1.0 / len(rows_per_rank)
                weight, bias = (None if x is None else scale_gradient(x.to_local(), average) for x in (weight, bias))
            return loss_fn(
                hidden,
                weight,  # float32 unless frozen or gathered by FSDP: the op computes in the dtype of hidden
                bias=bias,
                softcap=self.softcap,
                logits_dtype=torch.promote_types(self.compute_dtype, torch.float32),
                process_group=self.process_group,
            )


def load_model_and_tokenizer(
    config: ModelConfig,
    *,
    task_tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    check_logits: bool = True,
    weights: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model into host memory, its output head replaced by a `PolicyHead`, and its tokenizer.

    Weights are float32; once a LoRA is added, frozen matrices are in the compute type. `placement.place_model` moves them.

    Args:
        config: where the model comes from and how it runs.
        task_tokenizer: the tokenizer of a generated task, used by a model from scratch.
        seed: of the random weights: those of a model from scratch, and LoRA's adapters.
        device: where the model will run, which decides what `auto` chooses.
        check_logits: see `prepare`. False for a second one of the same architecture, whose layers
            Liger has made its own by then, so that they would not run in host memory.
        weights: False for a model without values (see `first_rank.meta_model`), which is not checked: `place_model` gives it
            the first rank's.
        tell: what `auto` chose is told to it.

    Raises: UserError for a model that the packed step would train wrongly, with what to use instead.
    """
    device = torch.device(device)
    check_no_adapter(config.name_or_path, config.revision)
    tokenizer = load_tokenizer(config, task_tokenizer, tell)
    architecture = read_architecture(config, tokenizer)
    check_architecture(architecture)
    implementation = choose_attention(
        config.attention, device=device, compute_dtype=DTYPES[config.dtype], architecture=architecture, tell=tell
    )
    torch.manual_seed(seed)
    options = {"dtype": torch.float32, "attn_implementation": implementation}
    given = (config, architecture, hub_options(config), options)
    model, unplaced = _load(*given) if weights else (meta_model(*given), set())
    ends = end_ids(config.eos_token, model, tokenizer)
    check_ends(model, tokenizer, ends)
    end_generation_too(model, ends)
    tell_of_unplaced(unplaced, tell)
    drop_further_layers(model, tell)
    make_savable(model, tell)
    tell_of_tokens_without_embedding(model, tokenizer, tell)
    tell_of_untrained_balance(model, tell)
    prepare(model, config, device=device, check_logits=check_logits and weights, tell=tell)
    return model, tokenizer


def _load(
    config: ModelConfig, architecture: PretrainedConfig, hub: dict[str, Any], options: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """The model of transformers with its weights, and the names of those in its files that have no place in it."""
    if config.scratch is not None:
        return AutoModelForCausalLM.from_config(architecture, **options), set()
    with refused(f"model.name_or_path={config.name_or_path} cannot be loaded", ValueError, ImportError, SafetensorError):
        model, info = AutoModelForCausalLM.from_pretrained(config.name_or_path, **hub, **options, output_loading_info=True)
    keep_processor(model, config.name_or_path, config.revision)
    return model, set(info["unexpected_keys"])


def prepare(
    model: PreTrainedModel,
    config: ModelConfig,
    *,
    device: torch.device,
    check_logits: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> None:
    """Make a model of transformers ready for the packed step: no dropout of its own, policy head, kernels, adapters, checkpointing.

    Args:
        device: where the model will run.
        check_logits: compare the head's logits with the model's, a training pass with an evaluation, and a packed row with its
            sequences, which runs the model.
        tell: what `auto` chose is told to it, and what is changed in the model.

    Raises: UserError for a model that the packed step would train wrongly.
    """
    check_attention(model)
    if switch_off_dropout(model):
        tell("the model's own dropout and noise are switched off: sampler, old policy and update must be one policy")
    install_policy_head(model, compute_dtype=DTYPES[config.dtype], check_logits=check_logits)
    if check_logits:
        check_one_policy(model)
        check_packing(model)
    train_text_alone(model, tell)
    apply_liger(model, config.liger, device, tell)
    if config.lora is not None:
        add_lora(model, config.lora, tell)
        hold_frozen(model, DTYPES[config.dtype])
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the activations of every layer in backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23, but 5.17 knows no other name
        model.gradient_checkpointing_enable({"use_reentrant": False})


def install_policy_head(model: PreTrainedModel, *, compute_dtype: torch.dtype, check_logits: bool = True) -> PolicyHead:
    """Replace the model's output head by a `PolicyHead` over the same parameters, and check that the logits stay.

    Raises: UserError where the model's logits are not softcap(head(hidden)) / divisor, which is all that the fused op knows.
    """
    linear = model.get_output_embeddings()
    if type(linear) not in (nn.Linear, PolicyHead):
        raise UserError(
            f"model: the output head must be a torch.nn.Linear, {type(model).__name__} has {type(linear).__name__}. "
            "Load the model without quantisation or adapters on its head."
        )
    if model.base_model is model:  # Llama4ForCausalLM names a body that it does not have
        raise UserError(f"model: {type(model).__name__} must name its body in base_model_prefix, got none. Choose another model.")
    try:
        options = head_options(model)
    except ValueError as error:
        rule = str(error).removeprefix("head_options: ").split(". Pass ")[0]  # its remedy is for who calls the kernels
        raise UserError(f"model: {rule}. {type(model).__name__} is not supported: choose another model.") from error
    softcap, divisor = options["softcap"], options["temperature"]
    head = PolicyHead.adopt(linear, compute_dtype=compute_dtype, softcap=softcap, divisor=divisor)
    model.set_output_embeddings(head)
    cast_embeddings(model, compute_dtype)
    cast_routers(model)
    model.run_head = types.MethodType(_run_head, model)  # a method, so that FSDP can gather the weights around it
    if check_logits:
        _check_logits(model, head)
    return head


@torch.no_grad()
def _check_logits(model: PreTrainedModel, head: PolicyHead) -> None:
    # Some architectures scale or shift logits after the head; a two-token forward finds out for any of them.
    training = model.training
    model.eval()
    token_ids = torch.tensor([[0, 1]], device=head.weight.device)
    with plain_attention(model):
        logits = model(input_ids=token_ids, use_cache=False).logits.float()
        expected = head(model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    expected = expected / head.divisor
    error = (logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not error < 1e-3:
        raise UserError(
            "model: logits must be the output head's, softcapped and scaled as head_options reads it from the configuration; "
            f"those of {type(model).__name__} are off by {float(error):.2g} of their maximum. It is not supported: "
            "choose another model."
        )


def policy_head(model: PreTrainedModel) -> PolicyHead:
    """The model's `PolicyHead`; raises TypeError for a model that `load_model_and_tokenizer` has not prepared."""
    head = model.get_output_embeddings()
    if not isinstance(head, PolicyHead):
        raise TypeError(f"model: the output head must be a PolicyHead, got {type(head).__name__}. Call install_policy_head(model).")
    return head


def policy_forward(
    model: PreTrainedModel, micro_batch: MicroBatch, objective: Objective, temperature: float = 1.0
) -> PolicyLossOutput[Tensor]:
    """Run one packed micro-batch and its loss; only the positions that carry a loss reach the head.

    Args:
        micro_batch: on the model's device.
        objective: a preset or composition of `trapo_kernels`.
        temperature: > 0, the sampling temperature of the rollouts; it divides the logits.

    Returns: what `linear_policy_loss` returns: loss (0-d), logprob and entropy [N], metrics.
    """
    divisor = temperature * policy_head(model).divisor
    loss = partial(linear_policy_loss, batch=micro_batch.batch, objective=objective, temperature=divisor)
    return model.run_head(micro_batch, loss)


@torch.no_grad()
def score(model: PreTrainedModel, micro_batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Logprob [N] in nats of the tokens of `micro_batch.batch` under the current policy, without gradients."""
    divisor = temperature * policy_head(model).divisor
    return model.run_head(micro_batch, partial(linear_logprob, target=micro_batch.batch.target, temperature=divisor)).logprob


def score_all(model: PreTrainedModel, micro_batches: Sequence[MicroBatch], temperature: float) -> list[Tensor]:
    """The logprobs [N] of each micro-batch, on the CPU; every pass is queued before the first copy to the host."""
    device = next(model.parameters()).device
    there = [micro_batch.to(device) for micro_batch in micro_batches]
    scored = [score(model, micro_batch, temperature) for micro_batch in there]
    return [logprob.cpu() for logprob in scored]


def body_autocast(model: PreTrainedModel, *, keep_casts: bool = True) -> torch.autocast:
    """A context in which the model's body computes in its `compute_dtype`, whatever its weights are stored in.

    FSDP gathers weights in that type; then it does nothing.

    Args:
        keep_casts: keep weights cast to `compute_dtype` until the context ends, for several passes inside it. A training pass uses
            each of them once: keeping would save no work and hold a second copy of the whole model.
    """
    compute_dtype, kind = policy_head(model).compute_dtype, next(model.parameters()).device.type
    mixed = not isinstance(model, FSDPModule) and any(weight.dtype != compute_dtype for weight in model.parameters())
    dtype = compute_dtype if mixed else None
    return torch.autocast(kind, dtype=dtype, enabled=mixed, cache_enabled=keep_casts)


def _run_head(model: PreTrainedModel, micro_batch: MicroBatch, loss_fn: Callable[..., Any]) -> Any:
    device = micro_batch.input_ids.device
    with body_autocast(model, keep_casts=False):
        hidden = model.base_model(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            use_cache=False,
            **segment_arguments(model, micro_batch.segment_lengths, device),
        ).last_hidden_state[0]  # [T, D]
        return policy_head(model)(hidden.index_select(0, micro_batch.loss_positions), loss_fn, micro_batch.rows_per_rank)
