"""Cut an expert trace into the prefix that guides a rollout, at a paragraph break where one is near."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING

from trapo_train.models.tokenizer import decode
from trapo_train.records import ExpertTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character


def cut_prefix(
    expert: ExpertTrace,
    ratio: float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    paragraph_break: str = "\n\n",
    snap_window: float = 0.3,
) -> tuple[int, ...]:
    """Return the first `ratio` of an expert trace's tokens, cut just after a paragraph break where one is near.

    The cut lies after floor(ratio·n) of the n tokens before the one that ends the trace, at least one. From there it
    moves forward to the first token boundary behind the next paragraph break, if that boundary lies before
    (ratio + snap_window)·n and leaves a token to generate. A cut that already stands just behind a break stays. A cut inside a
    character, whose bytes are several tokens, moves to the next boundary behind which only whole ones stand, or to the last one
    before where none behind leaves a token to generate.

    Breaks are looked for in the decoded text, not in the tokens, so the rule is the same for every tokenizer: a break
    may be one token, several, or part of a longer one (the cut then lies behind that token).

    Args:
        expert: the trace, its last token the one that ends it.
        ratio: share of the trace in [0, 1]: 0 gives (), 1 gives all tokens with the one that ends it. Any ratio in
            between never gives that one, and gives at least one token if there is one besides it.
        tokenizer: the tokenizer that made `expert.token_ids`.
        paragraph_break: the text that ends a paragraph.
        snap_window: how far forward the cut may move, as a share of the trace, ≥ 0; 0 never moves it.

    Raises:
        ValueError: for a ratio outside [0, 1], a negative snap_window or an empty paragraph_break.

    Source: arXiv 2512.17636, the authors' code, which may cut inside a character.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"cut_prefix: ratio must be in [0, 1], got {ratio}.")
    if not snap_window >= 0.0:
        raise ValueError(f"cut_prefix: snap_window must be at least 0, got {snap_window}. Pass 0 to cut exactly at the ratio.")
    if not paragraph_break:
        raise ValueError("cut_prefix: paragraph_break is empty. Pass snap_window=0 to cut exactly at the ratio.")
    if ratio == 0.0:
        return ()
    if ratio == 1.0:
        return expert.token_ids
    body = expert.token_ids[:-1]
    if not body:
        return ()
    # 1e-9 keeps 0.29 · 100 = 28.999… at 29.
    cut = max(1, math.floor(ratio * len(body) + 1e-9))
    limit = min(math.ceil((ratio + snap_window) * len(body) - 1e-9), len(body))  # the first boundary too far
    return body[: _between_characters(body, _snap_forward(body, cut, limit, tokenizer, paragraph_break), tokenizer)]


def _snap_forward(body: tuple[int, ...], cut: int, limit: int, tokenizer: PreTrainedTokenizerBase, paragraph_break: str) -> int:
    """Return the first token boundary in [cut, limit) behind the next paragraph break, or `cut` if there is none."""
    if cut >= limit:
        return cut
    text = decode(tokenizer, body, special=True)
    # A break that ends exactly at the cut counts, so the search starts one break earlier.
    start = text.find(paragraph_break, max(0, _text_position(tokenizer, body[:cut], text) - len(paragraph_break)))
    if start < 0:
        return cut
    end = start + len(paragraph_break)
    if _text_position(tokenizer, body[: limit - 1], text) < end:
        return cut
    # Text positions grow with the boundary, so bisection finds it in about 13 decodes for 8192 tokens.
    low, high = cut, limit - 1
    while low < high:
        middle = (low + high) // 2
        if _text_position(tokenizer, body[:middle], text) >= end:
            high = middle
        else:
            low = middle + 1
    return low


def _between_characters(body: tuple[int, ...], cut: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `cut`, or where it lies inside a character the nearest boundary behind it, else before it, that does not."""
    if not decode(tokenizer, body[:cut], special=True).endswith(UNFINISHED):
        return cut
    text = decode(tokenizer, body, special=True)  # which may have such a character of its own
    boundaries = (*range(cut, len(body)), *range(cut - 1, 0, -1))
    return next((place for place in boundaries if text.startswith(decode(tokenizer, body[:place], special=True))), cut)


def _text_position(tokenizer: PreTrainedTokenizerBase, head: tuple[int, ...], text: str) -> int:
    """Return how many characters of `text` the tokens `head` complete.

    `head` is decoded as a whole: decoded alone, a token can lose its leading space (SentencePiece), keep its `##`
    (WordPiece) or be a fragment of a character (byte-level BPE). A character that `head` leaves unfinished decodes to
    U+FFFD, which differs from `text` there and so does not count.
    """
    decoded = decode(tokenizer, head, special=True)
    if text.startswith(decoded):
        return len(decoded)
    return next(i for i, pair in enumerate(zip_longest(decoded, text)) if pair[0] != pair[1])
