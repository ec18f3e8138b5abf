"""The samples of a step or an evaluation as files: a Markdown table per problem to look at, JSON lines with the whole texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trapo_train.files import replace_text
from trapo_train.models.tokenizer import decode
from trapo_train.records import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLES_DIR = "samples"
_LONGEST = 400  # characters of a text that the table shows


def write_samples(
    groups: Sequence[Sequence[Sample]],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    step: int,
    *,
    judged: bool = True,
) -> Path:
    """Write the samples of `step` under `output_dir`, each file whole or not at all; returns the table, beside which are the lines
    (see `sample_record`). A step that a resumed run takes again replaces its files. `judged`: whether there is a reward."""
    path = Path(output_dir) / SAMPLES_DIR / f"step_{step:08d}.md"
    table = f"# Samples of step {step}\n" + "".join(_table(group, tokenizer, judged) for group in groups if group)
    replace_text(path, table)
    write_lines(
        path.with_suffix(".jsonl"),
        ({"step": step, **sample_record(sample, tokenizer, judged=judged)} for group in groups for sample in group),
    )
    return path


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, the whole file or none."""
    replace_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def sample_record(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, judged: bool = True) -> dict[str, Any]:
    """Everything about a sample as JSON values. Texts are whole, special tokens included; `reward` is null where nothing is judged,
    `rewards` holds those of a sum by name, null for no opinion; `logprob_mean` is the completion's as sampled, nats per token."""
    completion, logprobs = sample.completion_ids, sample.completion_logprobs
    logprob = math.fsum(logprobs) / len(logprobs) if logprobs else math.nan
    return {
        "problem": sample.problem.index,
        "prompt": sample.problem.prompt,
        "solution": sample.problem.solution,
        "micro_group": sample.micro_group,
        "prefix_ratio": sample.prefix_ratio,
        "prefix_weight": sample.prefix_weight,
        "prefix": decode(tokenizer, sample.prefix_ids, special=True),
        "prefix_tokens": len(sample.prefix_ids),
        "completion": decode(tokenizer, completion, special=True),
        "completion_tokens": len(completion),
        "finish_reason": sample.finish_reason,
        "masked": sample.masked,
        "reward": sample.reward if judged else None,
        "correct": sample.correct if judged else None,
        "rewards": dict(sample.rewards),
        "advantage": sample.advantage,
        "answer_in_prefix": sample.answer_in_prefix,
        "logprob_mean": logprob if math.isfinite(logprob) else None,
    }


def _table(group: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, judged: bool) -> str:
    problem = group[0].problem
    lines = [f"\n## Problem {problem.index}\n", f"{_shown(problem.prompt)}\n", f"Solution: {_shown(str(problem.solution))}\n"]
    lines += ["| micro-group | prefix | reward | advantage | tokens | ends by | completion |", "|---|---|---|---|---|---|---|"]
    for sample in sorted(group, key=lambda sample: sample.micro_group):
        # With special tokens, which show what a completion ended with, or went past.
        text = decode(tokenizer, sample.completion_ids, special=True)
        reward = f"{sample.reward:g}" if judged else "–"
        lines.append(
            f"| {sample.micro_group} | {len(sample.prefix_ids)} tokens, {sample.prefix_ratio:.2f} | {reward} | "
            f"{sample.advantage:+.3f} | {len(sample.completion_ids)} | "
            f"{sample.finish_reason}{', not in the loss' if sample.masked else ''} | {_shown(text)} |"
        )
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    """One line that no Markdown table breaks on and no renderer takes for HTML; its middle is left out where it is long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", " ⏎ ")
