"""The demo: a base model from scratch → headroom → TRAPO from it → held-out accuracy, and one annotated group.

Everything is measured where it is printed: nothing here knows what the result should be, and a base without headroom or a
run that did not learn is reported as such.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from trapo_train.config import RunConfig, load_config
from trapo_train.config_file import MODEL_DIR
from trapo_train.evaluation.headroom import HeadroomConfig, measure, show_headroom
from trapo_train.records import Sample
from trapo_train.reports.display import Reporter, format_seconds, say
from trapo_train.reports.inspect import render_group
from trapo_train.reports.metrics_log import METRICS_FILE, group_accuracies, group_label, group_order, read_metrics
from trapo_train.reports.plots import plot_accuracy_by_group, plot_comparison, plot_run
from trapo_train.reports.tables import accuracy_cell
from trapo_train.tasks import build_tokenizer
from trapo_train.train import RunSummary, Trainer, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CLEAR_STANDARD_ERRORS = 2.0
# Initial weights decide when the base learns the lookup: with seed 0 after some 250 steps, with seed 1 not within 500. A base
# that has not learned it has no headroom, and the demo says so.
BASE_SEED = 0
LABELS = {"trapo": "TRAPO", "grpo": "GRPO", "sft": "SFT"}


@dataclass(frozen=True)
class SeedResult:
    """What one seed came to: held-out evaluations of the base and of each method trained from it."""

    seed: int
    evaluations: dict[str, dict[str, Any]]
    """"base", "trapo" and, where compared, "grpo" and "sft"."""

    @property
    def gain(self) -> float:
        """Held-out accuracy of TRAPO minus the base's, in [-1, 1]."""
        return self.evaluations["trapo"]["accuracy"] - self.evaluations["base"]["accuracy"]

    @property
    def gain_standard_error(self) -> float:
        """Of the gain, as if the two evaluations were independent; they share their problems, so it is an upper estimate."""
        return math.hypot(*(self.evaluations[name]["accuracy_stderr"] for name in ("base", "trapo")))

    @property
    def learned(self) -> bool:
        """Whether held-out accuracy is clearly above the base's."""
        return self.gain > CLEAR_STANDARD_ERRORS * self.gain_standard_error


def run_demo(
    output: Path,
    *,
    seeds: Sequence[int],
    compare: bool,
    console: Console,
    overrides: Mapping[str, Sequence[str]] | None = None,
) -> bool:
    """Train one base, then run the demo from it once per seed under `output`, replacing an earlier demo there.

    Returns whether every seed learned; False also when the base has no headroom, because then guided training has nothing to show.

    Args:
        seeds: of the training problems and the samples; base and held-out problems are the same for all.
        compare: also train GRPO and SFT from the same base.
        overrides: configuration overrides by recipe, such as {"demo_base": ["steps=10"]}.
    """
    started = time.monotonic()
    overrides = overrides or {}
    methods = ["trapo", *(["grpo", "sft"] if compare else [])]
    stages = 3 + len(methods)
    base = _configure("base", output, BASE_SEED, [], overrides)
    model = [f"model.name_or_path={json.dumps(str(output / 'base' / MODEL_DIR))}"]
    plans = {}
    for seed in seeds:
        directory = output if len(seeds) == 1 else output / f"seed_{seed}"
        plans[seed] = directory, {name: _configure(name, directory, seed, model, overrides) for name in methods}
    for config in (base, *(config for _, configs in plans.values() for config in configs.values())):
        _clear(Path(config.output_dir))

    with _stage(console, f"1/{stages} base model from scratch: SFT on noisy expert traces"):
        _train(base, console)
    with _stage(console, f"2/{stages} headroom: does an expert prefix help this base?"):
        if not _has_headroom(next(iter(plans.values()))[1]["trapo"], output, console):
            return False
    results = []
    for seed, (directory, configs) in plans.items():
        if len(plans) > 1:
            console.rule(f"seed {seed}")
        results.append(_run_seed(directory, seed, configs, stages, console))
    if len(results) > 1:
        _show_seeds(results, console)
    say(console, f"the demo took {format_seconds(time.monotonic() - started)}", "dim")
    return all(result.learned for result in results)


def _has_headroom(config: RunConfig, output: Path, console: Console) -> bool:
    report = measure(Trainer(config), HeadroomConfig(group_by=config.evaluation.group_by))
    return show_headroom(report, output, console)


def _run_seed(output: Path, seed: int, configs: Mapping[str, RunConfig], stages: int, console: Console) -> SeedResult:
    """Every method from the base with one seed, the results and one annotated group."""
    summaries: dict[str, RunSummary] = {}
    for number, (name, config) in enumerate(configs.items(), start=3):
        with _stage(console, f"{number}/{stages} {LABELS[name]} from the base"):
            summaries[name] = _train(config, console)
    with _stage(console, f"{stages}/{stages} held-out accuracy and plots"):
        result = _gather(output, seed, list(configs))
        _show_result(result, console)
        for path in _draw(output, result, list(configs)):
            say(console, f"wrote {path}", "dim")
    _show_group(summaries["trapo"], build_tokenizer(), console)
    return result


def _configure(name: str, output: Path, seed: int, further: Sequence[str], overrides: Mapping[str, Sequence[str]]) -> RunConfig:
    recipe = f"demo_{name}"
    fixed = [f"output_dir={json.dumps(str(output / name))}", f"seed={seed}", f"data.seed={2 * seed + (name != 'base')}"]
    return load_config(recipe, [*fixed, *further, *overrides.get(recipe, ())])


def _clear(directory: Path) -> None:
    """Remove what an earlier demo wrote; a directory that is no run is left alone, and the run then says so itself."""
    if (directory / METRICS_FILE).exists():
        shutil.rmtree(directory)


def _train(config: RunConfig, console: Console) -> RunSummary:
    with Reporter(config.output_dir, console) as reporter:
        summary = run(config, reporter)
    if summary.interrupted:  # the next stage needs its model
        raise KeyboardInterrupt
    return summary


def _gather(output: Path, seed: int, methods: Sequence[str]) -> SeedResult:
    """The base's evaluation is TRAPO's at step 0; every method's own is its last."""
    evaluations: dict[str, dict[str, Any]] = {}
    for name in methods:
        rows = [row for row in read_metrics(output / name) if row["kind"] == "eval"]
        evaluations.setdefault("base", rows[0])
        evaluations[name] = rows[-1]
    return SeedResult(seed, evaluations)


def result_table(result: SeedResult) -> Table:
    """Held-out accuracy ± 1 standard error by group, a column per model."""
    table = Table("held-out accuracy", *(LABELS.get(name, name) for name in result.evaluations))
    found = [group_accuracies(row) for row in result.evaluations.values()]
    for group in sorted({group for groups in found for group in groups}, key=group_order):
        table.add_row(group_label(group), *(accuracy_cell(*groups[group]) if group in groups else "–" for groups in found))
    cells = [accuracy_cell(row["accuracy"], row.get("accuracy_stderr")) for row in result.evaluations.values()]
    table.add_row("all", *cells, style="bold")
    return table


def _show_result(result: SeedResult, console: Console) -> None:
    console.print(result_table(result))
    gain = f"{100 * result.gain:+.1f} ± {100 * result.gain_standard_error:.1f} points held-out"
    if result.learned:
        say(console, f"TRAPO learned: {gain} over its base.", "bold green")
    else:
        rule = f"the gain must exceed {CLEAR_STANDARD_ERRORS:g} standard errors"
        say(console, f"TRAPO is not clearly above its base: {rule}, got {gain}.", "bold red")


def _show_seeds(results: Sequence[SeedResult], console: Console) -> None:
    names = list(results[0].evaluations)
    table = Table("held-out accuracy", *(LABELS.get(name, name) for name in names), "TRAPO - base, points")
    for result in results:
        cells = [accuracy_cell(row["accuracy"], row["accuracy_stderr"]) for row in result.evaluations.values()]
        table.add_row(f"seed {result.seed}", *cells, f"{100 * result.gain:+.1f}")
    means = [fmean(result.evaluations[name]["accuracy"] for result in results) for name in names]
    gain = fmean(result.gain for result in results)
    table.add_row("mean", *(f"{mean:.2f}" for mean in means), f"{100 * gain:+.1f}", style="bold")
    console.print(table)


def _draw(output: Path, result: SeedResult, methods: Sequence[str]) -> list[Path]:
    evaluations = {LABELS.get(name, name): row for name, row in result.evaluations.items()}
    paths = [*plot_run(output / "trapo"), plot_accuracy_by_group(evaluations, output / "accuracy.png")]
    if len(methods) > 1:
        runs = {LABELS[name]: read_metrics(output / name) for name in methods}
        paths.append(plot_comparison(runs, output / "compare.png"))
    return paths


def most_telling(groups: Sequence[list[Sample]]) -> list[Sample]:
    """The group that shows most: guided samples beside unguided ones, failures beside successes."""

    def score(group: list[Sample]) -> tuple[int, int]:
        continued = sum(sample.guided and bool(sample.completion_ids) for sample in group)
        kinds = len({(sample.guided, bool(sample.completion_ids), sample.reward > 0) for sample in group})
        return kinds, continued

    return max(groups, key=score)


def _show_group(summary: RunSummary, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    say(console, "\none group of the last step, token by token", "bold")
    console.print(render_group(most_telling(summary.groups), tokenizer, color=console.color_system is not None))


@contextmanager
def _stage(console: Console, title: str) -> Iterator[None]:
    started = time.monotonic()
    say(console, f"\n== {title}", "bold")
    yield
    say(console, f"   took {format_seconds(time.monotonic() - started)}", "dim")
