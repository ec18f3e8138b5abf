"""Show one group of samples token by token: what came from the expert, what is trained on, and what the model wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from trapo_train.models.tokenizer import decode
from trapo_train.records import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """How one kind of token is shown: in `style` where there is colour, else between `opening` and `closing`."""

    name: str
    style: str
    opening: str
    closing: str


@dataclass(frozen=True)
class View:
    """What every part of a rendering needs: the tokenizer, the longest segment shown in full, colour or not, whether the
    objective trains on expert tokens, and whether there is a reward."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    color: bool
    trains_prefix: bool
    judged: bool


PREFIX_WITH_LOSS = Segment("expert prefix in the loss", "black on #f0b94d", "⟦", "⟧")
PREFIX_WITHOUT_LOSS = Segment("expert prefix without loss", "black on #c9c9c9", "⟨", "⟩")
COMPLETION = Segment("the model's completion", "black on #7fc4f5", "", "")
SEGMENTS = (PREFIX_WITH_LOSS, PREFIX_WITHOUT_LOSS, COMPLETION)

VISIBLE = str.maketrans({" ": "·", "\n": "↵\n", "\t": "→\t", "\r": "␍"})


def visible(text: str) -> str:
    """`text` with marks for its whitespace: `·` space, `↵` newline (which still breaks the line), `→` tab."""
    return text.translate(VISIBLE)


def decode_after(before: Sequence[int], token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that `token_ids` add after `before`, special tokens included.

    Decoded on their own, the tokens of a SentencePiece vocabulary would lose the space that they start with.
    """
    context = list(before[-8:])
    start = decode(tokenizer, context, special=True).rstrip("\ufffd") if context else ""
    return decode(tokenizer, [*context, *token_ids], special=True)[len(start) :]


def _append_tokens(line: Text, token_ids: Sequence[int], segment: Segment, show: View, before: Sequence[int] = ()) -> None:
    """Add the tokens of one segment; of one longer than `show.max_tokens` the middle is left out, and counted."""
    if not token_ids:
        return
    limit, style = show.max_tokens, segment.style if show.color else ""
    head = token_ids if len(token_ids) <= limit else token_ids[: (limit + 1) // 2]
    tail_start = max(len(head), len(token_ids) - limit // 2)
    line.append("" if show.color else segment.opening)
    line.append(visible(decode_after(before, head, show.tokenizer)), style=style)
    if tail_start > len(head):
        line.append(f" … {tail_start - len(head)} tokens … ", style="dim italic")
    if tail_start < len(token_ids):
        line.append(visible(decode_after(token_ids[:tail_start], token_ids[tail_start:], show.tokenizer)), style=style)
    line.append("" if show.color else segment.closing)


def _header(number: int, sample: Sample, show: View) -> Text:
    prefix, completion = len(sample.prefix_ids), len(sample.completion_ids)
    weighs = show.trains_prefix and sample.guided and sample.prefix_weight != 1
    weight = f", loss weight {sample.prefix_weight:.2g}" if weighs else ""
    masked = ", not in the loss" if sample.masked else ""
    line = Text.assemble(
        (f"sample {number}", "bold"),
        f"  micro-group {sample.micro_group}  prefix {100 * sample.prefix_ratio:>3.0f} % ({prefix} tokens{weight})",
        f"  completion {completion} tokens, {sample.finish_reason}{masked}",
    )
    if show.judged:
        line.append(f"  reward {sample.reward:g}", style="bold green" if sample.reward > 0 else "bold red")
        line.append(f"  advantage {sample.advantage:+.3f}", style="bold")
    if sample.answer_in_prefix:
        line.append("  answer in prefix", style="bold magenta")
    return line


def legend(color: bool = True) -> Text:
    """The kinds of token, and what marks whitespace."""
    line = Text()
    for segment in SEGMENTS:
        shown = Text(f" {segment.name} ", style=segment.style) if color else Text(segment.opening + segment.name)
        line.append_text(shown)
        line.append(segment.closing + "   " if not color else "  ")
    line.rstrip()
    return line.append("\n· space  ↵ newline  → tab", style="dim")


def _render_sample(number: int, sample: Sample, show: View) -> Group:
    response = Text(overflow="fold")
    prefix = PREFIX_WITH_LOSS if show.trains_prefix and sample.prefix_weight > 0 else PREFIX_WITHOUT_LOSS
    _append_tokens(response, sample.prefix_ids, prefix, show)
    _append_tokens(response, sample.completion_ids, COMPLETION, show, before=sample.prefix_ids)
    return Group(_header(number, sample, show), Padding(response, (0, 0, 1, 2), expand=False))


def render_group(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 240,
    color: bool = True,
    trains_prefix: bool = True,
    judged: bool = True,
) -> RenderableType:
    """The samples of one problem, each with a line of facts and its response token by token, as rich prints them.

    Args:
        samples: the group, all of the same problem.
        tokenizer: turns token ids into text (`decode`).
        max_tokens: longest prefix and completion shown in full, in tokens; the middle of a longer one is left out.
        color: False marks the segments with brackets instead, for a terminal without colour.
        trains_prefix: False for an objective without a term on expert tokens: no prefix is in its loss.
        judged: False where there is no reward.

    Raises ValueError for an empty group, samples of different problems, or max_tokens below 1.
    """
    problems = {sample.problem.index for sample in samples}
    if len(problems) != 1:
        raise ValueError(
            f"render_group: samples must belong to one problem, got {len(samples)} samples of {len(problems)} problems."
            " Pass one group of the rollout's result."
        )
    if max_tokens < 1:
        raise ValueError(f"render_group: max_tokens must be at least 1, got {max_tokens}. Leave it out for 240.")
    show = View(tokenizer, max_tokens, color, trains_prefix, judged)
    problem = samples[0].problem
    prompt = Text(f"problem {problem.index}", style="bold")
    facts = Text()
    _append_tokens(facts, problem.prompt_ids, Segment("prompt", "", "", ""), show)
    if problem.solution is not None:
        facts.append(f"\nsolution {visible(problem.solution)}", style="dim")
    shown = [_render_sample(number, sample, show) for number, sample in enumerate(samples, start=1)]
    return Group(prompt, Padding(facts, (0, 0, 1, 2), expand=False), *shown, legend(color))
