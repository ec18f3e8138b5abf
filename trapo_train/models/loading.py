"""Where published models are, and what they need before they are trained: configurations that can be saved, tokens that have an
embedding, and of multimodal ones the text alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from trapo_train.models.lora import check_no_adapter
from trapo_train.models.scratch import scratch_config
from trapo_train.schema import UserError, refused

if TYPE_CHECKING:
    from trapo_train.models.model import ModelConfig

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Of layers that predict tokens after the next one; Qwen has its own.
_FURTHER_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_MODEL_FILES, _TOKENIZER_FILES = ("config.json",), ("tokenizer_config.json", "tokenizer.json", "config.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_places(config: ModelConfig) -> None:
    """Raise UserError for a directory that does not hold what it should, LoRA's adapter in place of a model, or a revision of what
    is not on the hub; a name there, at most owner/name, passes."""
    is_here = config.name_or_path is not None and Path(config.name_or_path).is_dir()
    if config.revision is not None and (is_here or config.name_or_path is None):
        given = f"the directory {config.name_or_path}" if is_here else "model.scratch"
        raise UserError(
            f"model.revision must be null but for a model on the hub, got {config.revision!r} with {given}. Set "
            "model.revision=null, or model.name_or_path to a name on the hub."
        )
    if is_here:
        check_no_adapter(config.name_or_path)
    places = (("name_or_path", config.name_or_path, _MODEL_FILES), ("tokenizer", config.tokenizer, _TOKENIZER_FILES))
    for key, place, files in places:
        is_path = place is not None and (place.count("/") > 1 or place.startswith(("/", ".", "~")) or Path(place).is_dir())
        if is_path and not any((Path(place) / file).is_file() for file in files):
            wanted, found = (
                " or ".join(files),
                "which has none" if Path(place).is_dir() else f"which does not exist{_seen_from(place)}",
            )
            raise UserError(
                f"model.{key} must be a hub name such as owner/name or a directory with {wanted}, got {place!r}, {found}. "
                "Give another; the recipes demo_* start from the base that `trapo-train demo` leaves in runs/demo."
            )


def _seen_from(place: str) -> str:
    """Where a relative path counts from: a run may have been started elsewhere than it is exported or evaluated."""
    return "" if Path(place).is_absolute() else f" in {Path.cwd()}"


@contextmanager
def name_model_in_hub_errors(config: ModelConfig) -> Iterator[None]:
    """Say which model it was that could not be read: the hub's own errors do not."""
    try:
        yield
    except OSError as error:
        if config.name_or_path is None or error.errno is not None:  # a full disk is no missing model
            raise
        missing = "" if Path(config.name_or_path).is_dir() else f", and there is no such directory{_seen_from(config.name_or_path)}"
        missing = missing if config.revision is None else f" at model.revision={config.revision}{missing}"
        raise OSError(
            f"model.name_or_path must be a model on the hub or a directory with its files, got {config.name_or_path!r}{missing}. "
            f"{error}"
        ) from error


def make_savable(model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Have the configurations of a model pass the checks of transformers, which come when they are saved, by saving them once.

    Many a generation_config of the hub has a temperature or top_p without do_sample, which is loaded, but not saved: by some
    versions of transformers never, by others (5.23) not once it was changed, as model.eos_token changes it. What is greedy, by
    do_sample: false or a temperature of 0, loses these settings, which it does not read; anything else samples.

    Raises: UserError for a configuration that cannot be saved all the same.
    """
    mended = ""
    with TemporaryDirectory() as folder:
        if model.can_generate():
            try:
                model.generation_config.save_pretrained(folder)
            except ValueError:
                mended = _mend_sampling(model.generation_config)
        remedy = "Mend its config.json or generation_config.json in a copy of the model"
        with refused(f"model: transformers must be able to save the configuration of the model. {remedy}", ValueError):
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
    if mended:
        tell(f"the model's generation_config has settings of sampling {mended}")


def _mend_sampling(config: GenerationConfig) -> str:
    """Leave settings of sampling to what samples alone; returns what was wrong and what the trained model has."""
    if config.do_sample is not False and config.temperature != 0:
        config.do_sample = True
        return "and no do_sample: true, which transformers does not save; the trained model gets do_sample: true"
    for name in _SAMPLING:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return "and is greedy, which transformers does not save; the trained model is greedy without them"


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """What of `from_pretrained` says which files are read, and whether their code may run."""
    return {"trust_remote_code": config.trust_remote_code, "revision": config.revision or "main"}


def read_architecture(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    """The model's configuration, from its config.json or, of one from scratch, its shape and the tokenizer.

    Raises: UserError for a model that cannot be loaded.
    """
    if config.scratch is not None:
        return scratch_config(config.scratch, tokenizer)
    with refused(f"model.name_or_path={config.name_or_path} cannot be loaded", ValueError, ImportError):
        return AutoConfig.from_pretrained(config.name_or_path, **hub_options(config))


def replace_tensors(module: nn.Module, other: Callable[[Tensor], Tensor]) -> None:
    """Put `other` of each parameter and buffer in its place, a parameter for a parameter; what is one tensor stays one."""
    found: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if tensor not in found:
                    new = other(tensor)
                    whole = isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter)
                    found[tensor] = nn.Parameter(new, tensor.requires_grad) if whole else new
                held[name] = found[tensor]


def tell_of_unplaced(names: Collection[str], tell: Callable[[str], None]) -> None:
    """Tell of the weights `names` in the model's files that transformers has no place for."""
    if names:
        tell(
            f"the model's files have {len(names)} tensors that transformers has no place for, such as {min(names)}: they are not "
            "trained, and the trained model is written without them"
        )


def drop_further_layers(model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Have the configuration count none of the layers that predict tokens after the next one (GLM 4.5, DeepSeek V3), which
    transformers never loads and which are not written either."""
    if any("mtp" in path for path, _ in model.named_modules()):
        return
    settings = model.config.get_text_config()
    for name in _FURTHER_LAYERS:
        count = getattr(settings, name, None)
        if count:
            tell(
                f"the model's layers that predict tokens after the next one ({name} = {count}) are not loaded: the trained model "
                "has none, and its configuration says 0"
            )
            setattr(settings, name, 0)


def tell_of_tokens_without_embedding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]
) -> None:
    """Tell which tokens of the tokenizer the model has no embedding for, as Gemma 3 1b for <image_soft_token>.

    It has no logits for them either, so that it samples none; those in data are refused by `preflight.check_token_ids`.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    found = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= embeddings)
    if found:
        shown = ", ".join(token for _, token in found[:3]) + (", …" if len(found) > 3 else "")
        tell(f"the model has no embedding for {shown} ({len(found)} of the tokenizer): it samples none, and data must have none")


def check_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
    """Raise UserError for a token that is to end a response and that the model, without an embedding for it, cannot sample."""
    embeddings = model.get_input_embeddings().num_embeddings
    for token_id in end_ids:
        if token_id >= embeddings:
            raise UserError(
                f"model: a token that ends a response must have an embedding, of which the model has {embeddings}; "
                f"{tokenizer.convert_ids_to_tokens(token_id)!r} is token {token_id}. Set model.eos_token to what ends the model's "
                "turns, or model.tokenizer to the one it was trained with."
            )


def tell_of_untrained_balance(model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Tell of a mixture of experts whose configuration asks for a load-balancing loss that the trainer does not have it.

    It is a product of two means over a batch, the share of tokens that an expert gets and its mean probability, so that its
    gradient depends on how the batch is split into micro-batches and over ranks.
    """
    settings = model.config.get_text_config()
    experts = max(getattr(settings, name, None) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    coefficient = getattr(settings, "router_aux_loss_coef", None) or 0.0
    if experts > 1 and coefficient > 0:
        tell(
            f"no loss balances the {experts} experts of the model: that of its router_aux_loss_coef = {coefficient:g} is left out, "
            "because its gradient would depend on the split into micro-batches"
        )


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether the model has parts beside its text model, such as a vision tower (Gemma 3 from 4b on)."""
    return model.config.get_text_config() is not model.config


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the text model.

    Raises: UserError for a model that does not hold them as `layers`.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UserError(
            f"model: several ranks and plan-memory need a decoder with its blocks in `layers`, that of {type(model).__name__} has "
            "none. Train it in one process, or choose another model."
        )
    return layers


def train_text_alone(model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Freeze what of a multimodal model is neither decoder nor head: the text that is trained on never reaches it."""
    if not is_multimodal(model):
        return
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    frozen = {name: parameter for name, parameter in model.named_parameters() if parameter not in text}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    if frozen:
        parts = sorted({".".join(name.split(".")[:2]) for name in frozen})
        tell(f"the model is trained on text alone: {', '.join(parts)} stay as they are")


def keep_processor(model: PreTrainedModel, name_or_path: str, revision: str | None) -> None:
    """Take over what a multimodal model's processor is made of, for `write_processor`; the hub may be away by then."""
    model.processor_files = {}
    for name in _PROCESSOR_FILES if is_multimodal(model) else ():
        found = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            model.processor_files[name] = Path(found).read_text(encoding="utf-8")


def write_processor(model: PreTrainedModel, directory: Path) -> None:
    """Write the files of the model's processor beside it."""
    for name, text in getattr(model, "processor_files", {}).items():
        (directory / name).write_text(text, encoding="utf-8")
