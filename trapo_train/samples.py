"""The samples of a step as a Markdown file: one table per problem, a row per sample, micro-group by micro-group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trapo_train.records import Sample

SAMPLES_DIR = "samples"
_LONGEST = 400  # characters of a text that are shown


def write_samples(groups: Sequence[Sequence[Sample]], tokenizer: Any, output_dir: str | Path, step: int) -> Path:
    """Write the samples of `step` under `output_dir` and return the file."""
    path = Path(output_dir) / SAMPLES_DIR / f"step_{step:08d}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Samples of step {step}\n" + "".join(_table(group, tokenizer) for group in groups if group), encoding="utf-8"
    )
    return path


def _table(group: Sequence[Sample], tokenizer: Any) -> str:
    problem = group[0].problem
    lines = [f"\n## Problem {problem.index}\n", f"{_shown(problem.prompt)}\n", f"Solution: {_shown(str(problem.solution))}\n"]
    lines += ["| micro-group | prefix | reward | advantage | tokens | ends by | completion |", "|---|---|---|---|---|---|---|"]
    for sample in sorted(group, key=lambda sample: sample.micro_group):
        text = tokenizer.decode(list(sample.completion_ids), skip_special_tokens=True)
        lines.append(
            f"| {sample.micro_group} | {len(sample.prefix_ids)} tokens, {sample.prefix_ratio:.2f} | {sample.reward:g} | "
            f"{sample.advantage:+.3f} | {len(sample.completion_ids)} | "
            f"{sample.finish_reason}{', not in the loss' if sample.masked else ''} | {_shown(text)} |"
        )
    return "\n".join(lines) + "\n"


def _shown(text: str) -> str:
    """One line that no Markdown table breaks on; its middle is left out where it is long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return text.replace("|", "\\|").replace("\n", " ⏎ ")
