"""The memory of one training pass, found by running it on fake tensors: the model's own code, no memory and no arithmetic.

A model with one and with two layers is traced; further layers add what the second one added. The fused head is a stand-in that
holds the two gradients, as that one does.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops

from trapo_train.micro_batch import MicroBatch
from trapo_train.models.attention import PACKED_IMPLEMENTATION
from trapo_train.models.loading import decoder_layers, replace_tensors
from trapo_train.models.lora import hold_frozen
from trapo_train.models.model import DTYPES, ModelConfig, body_autocast, policy_head, prepare
from trapo_train.schema import UserError
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer


@dataclass(frozen=True)
class Weights:
    """How many numbers a model's parameters have, and what they take."""

    held_bytes: int
    """As they are stored."""
    total: int
    trained: int
    head: int
    """The output head; 0 where it is the embedding, too."""
    head_trained: bool
    head_dtype: torch.dtype
    """As it is stored."""
    outside_layers: int
    """Embedding, last norm and head, and what a multimodal model has beside its text model."""
    cast: int
    """Trained matrices that autocast keeps in the compute type while a model generates."""


@dataclass(frozen=True)
class HeadSizes:
    """What the head of one rank works on."""

    rows: int
    """Those of all ranks where it is sharded over the vocabulary."""
    vocab_size: int
    """This rank's part."""
    grad_weight: torch.dtype = torch.float32
    """What the gradient of its weight is held in until backward."""
    kept: bool = False
    """Whether its memory is kept afterwards, as on a CPU."""


@dataclass(frozen=True)
class Pass:
    """Bytes that a pass over one micro-batch holds beside weights, gradients and optimizer state."""

    forward_peak: int
    """Before the head."""
    activations: int
    """Kept for backward when the head begins."""
    backward_peak: int
    """After the forward of the head, its gradients included."""

    def deeper(self, two: Pass, layers: int) -> Pass:
        """The pass of a model with `layers` layers; this one has one, `two` has two."""
        return Pass(*(one + (layers - 1) * (both - one) for one, both in zip(astuple(self), astuple(two), strict=True)))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors have shapes and no memory."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about caches and checkpointing, which the real run gives too
        yield


def fake_model(
    config: ModelConfig, architecture: PretrainedConfig, layers: int, dtype: torch.dtype, *, frozen: bool = False
) -> PreTrainedModel:
    """The model as it will be trained, or `frozen` as a reference is, cut to `layers` layers, with weights in `dtype`; to be called
    inside `fake_tensors`. Without Liger's kernels, which need somewhat less.

    Raises: UserError as `prepare`.
    """
    shallow = copy.deepcopy(architecture)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types + text.layer_types[-1:] * layers)[:layers]
    options = {"dtype": dtype, "attn_implementation": PACKED_IMPLEMENTATION, "trust_remote_code": config.trust_remote_code}
    with unset_fake_temporarily(), torch.device("meta"), meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(shallow, **options)
        prepare(model, replace(config, liger=False), device=model.device, check_logits=False)
        if frozen:
            hold_frozen(model.requires_grad_(False), DTYPES[config.dtype])
    replace_tensors(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    return model.train()


def weigh(config: ModelConfig, architecture: PretrainedConfig) -> Weights:
    """The sizes of the whole model's parameters.

    Raises: UserError for a model without a list of layers.
    """
    with fake_tensors():
        model = fake_model(config, architecture, architecture.get_text_config().num_hidden_layers, torch.float32)
    parameters = list(model.parameters())
    embedding, head = model.get_input_embeddings().weight, policy_head(model).weight
    return Weights(
        held_bytes=sum(p.nbytes for p in parameters),
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        head=0 if head is embedding else sum(p.numel() for p in policy_head(model).parameters()),
        head_trained=head.requires_grad,
        head_dtype=head.dtype,
        outside_layers=sum(p.numel() for p in parameters) - sum(p.numel() for p in decoder_layers(model).parameters()),
        cast=sum(p.numel() for p in parameters if p.requires_grad and p.ndim == 2 and (p is not embedding or p is head)),
    )


def frozen_bytes(config: ModelConfig, architecture: PretrainedConfig) -> int:
    """What the parameters of a reference take."""
    with fake_tensors():
        layers = architecture.get_text_config().num_hidden_layers
        model = fake_model(config, architecture, layers, torch.float32, frozen=True)
    return sum(p.nbytes for p in model.parameters())


def trace_pass(
    config: ModelConfig, architecture: PretrainedConfig, segments: tuple[int, ...], head: HeadSizes, *, cast: bool
) -> Pass:
    """The pass of a whole model over a packed row of such segments.

    Args:
        cast: whether weights that are trained are cast from float32 where they are used, as in a single process; FSDP gathers
            them in the compute type.

    Raises: UserError for a model whose operations depend on values, such as a mixture of experts that runs those alone that some
        token takes.
    """
    dtype = torch.float32 if cast else DTYPES[config.dtype]
    layers = architecture.get_text_config().num_hidden_layers
    try:
        one, two = (_trace(config, architecture, depth, segments, head, dtype) for depth in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"plan-memory: memory must follow from the model's shape, {architecture.model_type} asks for values ({error}). "
            "Only a run can tell: see peak_memory_mib in metrics.jsonl."
        ) from error
    return one.deeper(two, layers)


def _trace(
    config: ModelConfig, architecture: PretrainedConfig, layers: int, segments: tuple[int, ...], head: HeadSizes, dtype: torch.dtype
) -> Pass:
    tokens = sum(segments)
    with fake_tensors():
        model = fake_model(config, architecture, layers, dtype)
        weight = policy_head(model).weight
        if head.vocab_size < len(weight):
            policy_head(model).weight = nn.Parameter(torch.empty_like(weight[: head.vocab_size]), weight.requires_grad)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        positions = torch.zeros(1, tokens, dtype=torch.int64)
        micro_batch = MicroBatch(positions, positions, segments, torch.zeros(tokens, dtype=torch.int64), batch=None)
        known = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
        live = LiveTensors([*known, *model.buffers(), micro_batch.input_ids, micro_batch.loss_positions])
        seen: dict[str, int] = {}
        kept: list[Tensor] = []

        def loss_fn(hidden: Tensor, weight: Tensor, **_: Any) -> Tensor:
            seen.update(activations=live.now_bytes, forward_peak=live.peak_bytes)
            return _HeadStandIn.apply(hidden, weight, head, kept)

        with live:
            loss = model.run_head(micro_batch, loss_fn)
            live.restart_peak()
            loss.backward()
    return Pass(seen["forward_peak"], seen["activations"], live.peak_bytes)


class _HeadStandIn(torch.autograd.Function):
    """Holds the gradients that the fused head computes in its forward until they are asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: HeadSizes, kept: list[Tensor]) -> Tensor:
        ctx.trained, ctx.dtype, ctx.rows = weight.requires_grad, weight.dtype, len(hidden)
        grad_weight = weight.new_empty(weight.shape if ctx.trained else 0, dtype=head.grad_weight)
        if head.kept:
            kept.append(grad_weight)
        ctx.save_for_backward(hidden.new_empty(head.rows, hidden.shape[1]), grad_weight)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden[: ctx.rows], grad_weight.to(ctx.dtype) if ctx.trained else None, None, None


def trace_prefill(config: ModelConfig, architecture: PretrainedConfig, tokens: int) -> int:
    """Bytes that one layer's pass over `tokens` prompt tokens holds without gradients, at its peak."""
    with fake_tensors(), torch.no_grad():
        model = fake_model(config, architecture, 1, DTYPES[config.dtype]).eval()
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with LiveTensors([*model.parameters(), *model.buffers(), ids]) as live, body_autocast(model):
            model.base_model(input_ids=ids, use_cache=False)
    return live.peak_bytes


def trace_optimizer(
    model: ModelConfig, architecture: PretrainedConfig, config: OptimizerConfig, device_type: str
) -> tuple[int, int]:
    """(bytes of state, bytes that a step holds besides) of the configured optimizer over the whole model.

    Raises: UserError for an optimizer of the user's own whose step needs values.
    """
    with fake_tensors():
        whole = fake_model(model, architecture, architecture.get_text_config().num_hidden_layers, torch.float32)
        for parameter in whole.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with _AnyScalar():
            optimizer = build_optimizer(whole, config)
        if device_type == "cuda" and not optimizer.defaults.get("fused") and "foreach" in optimizer.defaults:
            for group in optimizer.param_groups:
                group["foreach"] = True  # as torch chooses there
        with LiveTensors([x for p in whole.parameters() for x in (p, p.grad) if x is not None]) as live, _AnyScalar():
            _step_without_values(optimizer, config.name)
            state = sum(x.nbytes for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor))
    return state, max(0, live.peak_bytes - state)


def _step_without_values(optimizer: Optimizer, name: str) -> None:
    try:
        optimizer.step()
    except Exception as error:  # whatever comes of fake tensors in a class of someone else's
        if ":" not in name:
            raise
        raise UserError(
            f"plan-memory: a step of optimizer.name={name} must run on tensors without values to be planned, got {error!r}. Plan "
            "with an optimizer of torch.optim that holds as much."
        ) from error


class _AnyScalar(TorchDispatchMode):
    """Gives 0.5 for the value of a fake tensor; some optimizers ask for a norm, on which their memory does not depend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0.5 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _grouped_product(left: Tensor, right: Tensor, *others: Any, **options: Any) -> Tensor:
    """The product of a mixture of experts on fake tensors, which torch allows in bfloat16 alone there."""
    return torch.ops.aten._grouped_mm(left.bfloat16(), right.bfloat16(), *others, **options).to(left.dtype)


class LiveTensors(TorchDispatchMode):
    """While it is entered, counts the bytes of what operations allocate until it is freed; views and known tensors do not count.

    Memory that an operation takes inside itself is not seen.

    Args:
        known: tensors that are not to count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, or another storage might take one's address
        self._live = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_grouped = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        result = (_grouped_product if is_grouped else func)(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.now_bytes

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now_bytes -= size
