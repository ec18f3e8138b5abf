"""Loading a tokenizer, the tokens that end a response (its end-of-sequence token and the model's own, or those that model.eos_token
names), and texts as tokens and back."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from trapo_train.schema import UserError, did_you_mean, refused

if TYPE_CHECKING:
    from trapo_train.models.model import ModelConfig

logger = logging.getLogger(__name__)

# In which tokenizers differ: digits, spaces and line breaks, letters of all kinds, code, apostrophes.
_PROBES = (
    "so x = 12345 and y = 1,234.5",
    "one\n\ntwo\n   three\t four \r\n",
    "  two  spaces before",
    "中文と한국어 Straße Ünïcödé 🙂 ١٢٣",
    "def f(x):\n    return x['a'] != -1  # \\boxed{y_2^{10}}\n",
    "it's I'm THEY'LL don’t",
)


def load_tokenizer(
    config: ModelConfig, task_tokenizer: PreTrainedTokenizerBase | None, tell: Callable[[str], None] = logger.warning
) -> PreTrainedTokenizerBase:
    """The configured tokenizer, the model's own, or the task's, whose end-of-sequence token ends a response.

    Args:
        tell: that the tokens are those of tokenizer.json, and not of the class that transformers chooses, is told to it.

    Raises: UserError for no tokenizer, one without end-of-sequence token, or a model.eos_token that is none of its tokens.
    """
    source = config.tokenizer or config.name_or_path
    if source is None and task_tokenizer is None:
        raise UserError(
            "model: a model from scratch needs a tokenizer, and this dataset brings none. "
            "Set model.tokenizer=<name or directory>, or train on a generated task such as data.task=pointer_chasing."
        )
    tokenizer = task_tokenizer
    if source is not None:
        # A plain tokenizer file is what it says: beside a qwen2 model AutoTokenizer would make it a Qwen2Tokenizer, with
        # that one's pre-tokenisation and an extra token (transformers 5.23; test_scratch_model_exports_and_loads_again).
        hub = {"revision": config.revision if source == config.name_or_path else None}
        # A model's own that is not there is told as the model that is not; another is named by its setting.
        own = config.tokenizer is None
        what = f"The tokenizer of {source}" if own else f"model.tokenizer={source}"
        with refused(f"{what} cannot be loaded", ValueError, ImportError, *(() if own else (OSError,))):
            plain = get_tokenizer_config(source, **hub).get("tokenizer_class") == "TokenizersBackend"
            loader = PreTrainedTokenizerFast if plain else AutoTokenizer
            tokenizer = loader.from_pretrained(source, trust_remote_code=config.trust_remote_code, **hub)
            tokenizer = tokenizer if plain else _as_published(tokenizer, source, hub, tell)
    if config.eos_token is not None:
        _end_with(tokenizer, config.eos_token)
    check_end(tokenizer)
    return tokenizer


def check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for a tokenizer without an end-of-sequence token."""
    if tokenizer.eos_token_id is not None:
        return
    turn = _turn_end(tokenizer)
    remedy = "model.eos_token to the token that ends the model's turns"
    if turn is not None:
        remedy = f"{_setting(turn)}, with which the chat template ends turns"
    raise UserError(f"The tokenizer must have an end-of-sequence token, or no response could end, got none. Set {remedy}.")


def _as_published(
    tokenizer: PreTrainedTokenizerBase, source: str, hub: dict[str, str | None], tell: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    """`tokenizer`, or in its place the one of the tokenizer.json in `source` where that makes other tokens of a text.

    For some types of models transformers 5 keeps the vocabulary of the file alone: what splits the text before is the class's own.
    """
    if not tokenizer.is_fast:
        return tokenizer
    file = cached_file(source, "tokenizer.json", **hub, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return tokenizer
    published = Tokenizer.from_file(file)
    published.no_truncation()
    published.no_padding()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    differing = next((text for text in _PROBES if encode(text) != published.encode(text, add_special_tokens=False).ids), None)
    if differing is None:
        return tokenizer
    as_file = PreTrainedTokenizerFast.from_pretrained(source, **hub)  # with tokenizer_config.json's settings, which may explain it
    theirs = {text: as_file(text, add_special_tokens=False)["input_ids"] for text in _PROBES}
    differing = next((text for text in _PROBES if encode(text) != theirs[text]), None)
    if differing is None:
        return tokenizer
    tell(
        f"the tokenizer of {source} is what its tokenizer.json says, with the tokens {theirs[differing]} for {differing!r}; as a "
        f"{type(tokenizer).__name__}, which transformers would make of it, it has {encode(differing)}. If these are right, save "
        "that one by AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY) and set model.tokenizer=DIRECTORY"
    )
    return as_file


def _end_with(tokenizer: PreTrainedTokenizerBase, eos_token: str | list[str]) -> None:
    tokens = [eos_token] if isinstance(eos_token, str) else eos_token
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(
                f"model.eos_token must be one of the tokenizer's {len(vocabulary)} tokens, or a list of these, got {token!r}."
                f"{did_you_mean(token, vocabulary)} Name the token that ends the model's turns, as its chat template writes it, "
                "or null for the tokenizer's own."
            )
    special = special_tokens(tokenizer)
    # Adding one again would drop its lstrip and rstrip, and prompts would have other tokens; decoding would leave one that is not
    # special in the text that the reward sees.
    if vocabulary[tokens[0]] in special:
        tokenizer.eos_token = tokens[0]
    else:
        tokenizer.add_special_tokens({"eos_token": tokens[0]})
    tokenizer.add_tokens([token for token in tokens[1:] if vocabulary[token] not in special], special_tokens=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by their ids."""
    return {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def line_break_behind(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a line break, for `continuations`, where the tokenizer encodes a text otherwise behind one than alone, as
    SentencePiece with a dummy prefix does, which begins each with a space; else []."""
    try:
        line_break, alone, behind = _encoded(["\n", "a", "\na"], tokenizer)
    except Exception:  # tokenizers' own, for a vocabulary without them, which has no such space to add either
        return []
    return line_break if behind[: len(line_break)] == line_break and behind[len(line_break) :] != alone else []


def continuations(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, line_break: Sequence[int]) -> list[list[int]]:
    """Token ids of texts that go on from another, as an expert trace does from its prompt: without a space that a tokenizer with a
    `line_break_behind` would begin them with."""
    if not line_break:
        return _encoded(texts, tokenizer)
    found = _encoded([f"\n{text}" for text in texts], tokenizer)
    for place, text in enumerate(texts):
        if found[place][: len(line_break)] == line_break:
            found[place] = found[place][len(line_break) :]
            continue
        # A text that swallows the break, into a token of several or one that takes white space, leaves a letter alone.
        letter, behind, alone = _encoded(["a", f"a{text}", text], tokenizer)
        found[place] = behind[len(letter) :] if behind[: len(letter)] == letter else alone
    return found


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, special: bool) -> str:
    """The text of `token_ids` just as the tokens spell it; special tokens as they are written, or left out."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def end_ids(eos_token: str | list[str] | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a response: those of `model.eos_token`; for null the tokenizer's own, and what the model's
    generation_config names of its special tokens, so that sampling ends where the model's own `generate` does."""
    if eos_token is not None:
        return tuple(tokenizer.convert_tokens_to_ids([eos_token] if isinstance(eos_token, str) else eos_token))
    own, special = [tokenizer.eos_token_id], special_tokens(tokenizer)
    return tuple(dict.fromkeys([*own, *(token_id for token_id in ending_ids(model) if token_id in special)]))


def ending_ids(model: PreTrainedModel) -> list[int]:
    """Token ids that end what the model's own `generate` writes."""
    token_ids = model.generation_config.eos_token_id
    return [] if token_ids is None else [token_ids] if isinstance(token_ids, int) else list(token_ids)


def end_generation_too(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Have tokens end what `generate` writes as well, of the exported model, too."""
    known = ending_ids(model)
    if not set(token_ids) <= set(known):
        model.generation_config.eos_token_id = list(dict.fromkeys([*token_ids, *known]))


def other_endings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence, where model.eos_token is null, on a special token other than the tokenizer's end-of-sequence token that the chat
    template ends turns with, or else on what the model's generation_config names and is no special token; None for neither."""
    ends = end_ids(None, model, tokenizer)
    own, turn = tokenizer.eos_token, _turn_end(tokenizer)
    others = [token_id for token_id in ending_ids(model) if token_id not in ends and 0 <= token_id < len(tokenizer)]
    if turn not in (None, own):
        names = tokenizer.convert_ids_to_tokens(ends)
        through = "" if turn in names else f", and a response goes on behind {turn}"
        traces = "expert traces" if through else "expert traces that are texts"
        choice = [turn, *(name for name in names if name != turn)]
        said = f"{traces} end with {own}, the chat template ends turns with {turn}{through}. If prompts are rendered with it"
    elif others:
        names = tokenizer.convert_ids_to_tokens(others)
        choice = [*tokenizer.convert_ids_to_tokens(ends), *names]
        said = (
            f"a response goes on behind {', '.join(names)}, no special token, which the model's generation_config names as an end. "
        )
        said += "If it is one"
    else:
        return None
    return f"{said}, set {_setting(choice)}"


def _setting(eos_token: str | list[str]) -> str:
    """The override that a shell is given."""
    return shlex.quote(f"model.eos_token={json.dumps(eos_token, ensure_ascii=False)}")


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first special token that the chat template writes behind what the assistant said; None where there is none."""
    said = "4"  # which no template writes itself behind it
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is the model's own code and may raise anything; a prompt that it refuses says so
        return None
    behind = text.rpartition(said)[2] if said in text else ""
    special = special_tokens(tokenizer).values()
    found = sorted((behind.find(token), -len(token), token) for token in special if token in behind)
    return found[0][2] if found else None
