"""Commands: `trapo-train run | eval | export | headroom | inspect | plan-memory | plot | compare | demo | recipes | settings`.

What the user can correct (a configuration, a file, a reward, a missing package) is told in one line, with exit code 2;
`--traceback` shows where it came from. Exit code 1 means that the command ran and its finding is negative,
130 that Ctrl-C ended it, 143 that SIGTERM ended a run, 129 that a closed terminal did (SIGHUP): it has saved by then, unless
Ctrl-C was pressed twice. Where stdout or stderr takes nothing more, as when `tee` has ended, a command goes on without it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from trapo_train.reports.console import outlived_readers
from trapo_train.reports.display import say
from trapo_train.reports.status import StatusLine, Tell
from trapo_train.schema import UserError, build, refused

if TYPE_CHECKING:
    from trapo_train.config import RunConfig
    from trapo_train.trainer import Trainer

EXIT_OK, EXIT_NEGATIVE, EXIT_USER_ERROR, EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 129, 130, 143
CONFIG_HELP = "YAML file, packaged recipe such as demo_trapo, or (not for run) the directory of a finished run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with outlived_readers():
        args = _parse(argv)
        try:
            return args.command(args, Console())
        except KeyboardInterrupt:
            print("trapo-train: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:  # told apart below, where those classes are imported: most commands never need them
            if not isinstance(error, UserError | OSError) and not isinstance(error, _failures()):
                raise
            if args.traceback:
                traceback.print_exc()
            else:
                print(f"trapo-train: error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR


def run_and_exit() -> NoReturn:
    """Run one command and exit with its code."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "vllm" in sys.modules:  # whoever started the ranks
        # A rank leaves without tearing the interpreter down: a gloo thread that drops a tensor meanwhile aborts the process
        # (pytorch/pytorch#179291), as the memory pools of a vLLM that sleeps do (pytorch/pytorch#145168), and the exit code of a
        # finished run would be lost. Files are closed by now, and all is printed.
        os._exit(code)
    sys.exit(code)


def _failures() -> tuple[type[Exception], ...]:
    """What a user can correct beside UserError, and OSError, which files, disks and the hub raise. Anything else is a bug."""
    from trapo_train.checkpoints.checkpoint import CheckpointError
    from trapo_train.engines.engine import EngineError
    from trapo_train.parallel.world import RankError
    from trapo_train.rewards.functions import RewardError
    from trapo_train.step.optimizer_step import NonFiniteError

    return (CheckpointError, EngineError, RankError, RewardError, NonFiniteError)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides and export's directory may stand behind options, too, where argparse no longer looks for them."""
    args, rest = _parser().parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(args, "overrides")]
    rest = [word for word in rest if word not in late]
    if late:
        args.overrides = [*args.overrides, *late]
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "directory", "") is None:
        args.directory = rest.pop()
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trapo-train", description="RL and SFT post-training of language models with expert prefixes."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    configured = argparse.ArgumentParser(add_help=False, parents=[common])
    configured.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    configured.add_argument("overrides", metavar="key=value", nargs="*", help="for example optimizer.learning_rate=1e-5")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, parent: argparse.ArgumentParser, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[parent], help=text, description=text)
        sub.set_defaults(command=command, parser=sub)
        return sub

    run = add("run", _run, configured, "Train as configured; metrics, plots and the model go to output_dir.")
    run.add_argument(
        "--dry-run", action="store_true", help="one step of a tiny model on generated problems: do the settings fit together?"
    )
    shown = add("recipes", _recipes, common, "List the packaged configurations, or print one for a file of your own.")
    shown.add_argument("name", metavar="NAME", nargs="?", help="print this one (list all)")
    settings = add("settings", _settings, common, "Every setting with its default and what it does.")
    settings.add_argument("section", metavar="SECTION", nargs="?", default="", help="such as rollout.vllm (the top level)")
    add("eval", _eval, configured, "Accuracy on the held-out problems (eval_data), without training.")
    export = add("export", _export, common, "Write the model of a checkpoint as Hugging Face files, LoRA's adapters added.")
    export.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run, finished or interrupted")
    export.add_argument("directory", metavar="DIRECTORY", nargs="?", help="where to (RUN_DIR/model_step_N)")
    export.add_argument("--step", type=_step, metavar="N", help="step of the checkpoint, or best, by its evaluation (the newest)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    export.add_argument("--adapter", action="store_true", help="LoRA's adapter alone, in PEFT's format (RUN_DIR/adapter_step_N)")
    headroom = add("headroom", _headroom, configured, "Pass rate after ever longer expert prefixes: is there headroom?")
    headroom.add_argument("--num-problems", type=int, default=128, help="problems to measure, at least 2 (128)")
    headroom.add_argument("--samples", type=int, default=4, help="responses per problem and prefix, at least 1 (4)")
    inspect = add("inspect", _inspect, configured, "Sample one problem's group and print it token by token, without training.")
    inspect.add_argument("--problem", type=int, default=0, metavar="N", help="which training problem, from 0 (0)")
    inspect.add_argument("--max-tokens", type=int, default=240, help="longest prefix or completion shown in full (240)")
    memory = add("plan-memory", _plan_memory, configured, "Predict the memory of each GPU by component; loads no weights.")
    memory.add_argument("--gpus", type=int, default=1, help="ranks that share the run (1)")
    memory.add_argument(
        "--context", type=int, metavar="TOKENS", help="longest prompt and response together (the configured limits)"
    )
    memory.add_argument("--memory-gib", type=float, metavar="GIB", help="what one GPU has: says whether it fits and what to change")
    memory.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it will run (cuda)")
    plot = add("plot", _plot, common, "Draw the plots of a run into its directory.")
    plot.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run")
    compare = add("compare", _compare, common, "Draw several runs into one figure.")
    compare.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="output_dir of each run")
    compare.add_argument("--output", metavar="PNG", help="the figure (compare.png beside the first run)")
    demo = add("demo", _demo, common, "Train a base model from scratch, then TRAPO from it, and show that it learned.")
    demo.add_argument("--output", metavar="DIR", default="runs/demo", help="where everything goes (runs/demo)")
    demo.add_argument("--seeds", metavar="SEED", type=int, nargs="+", default=[0], help="one or more, of problems and samples (0)")
    demo.add_argument("--compare", action="store_true", help="also train GRPO and SFT from the same base")
    return parser


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a step or best, got {text!r}")
    return text if text == "best" else int(text)


def _run(args: argparse.Namespace, console: Console) -> int:
    config = _load(args, finished_run=False)
    from trapo_train import train
    from trapo_train.reports.display import NullReporter, Reporter
    from trapo_train.reports.plots import plot_run
    from trapo_train.run.output_dir import check_in_place

    if not any(override.startswith("output_dir=") for override in args.overrides):
        check_in_place(args.config, config)
    if args.dry_run:
        from trapo_train.dry_run import dry_run
        from trapo_train.extras import missing_packages

        metrics = dry_run(config).metrics
        for missing in missing_packages(config):
            say(console, f"the run itself would end at once: {missing}", "yellow")
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "grad_norm", "loss_tokens") if name in metrics)
        say(console, f"dry run passed: {shown}")
        if not metrics["loss_tokens"]:
            say(console, "no token was in the loss, which these settings leave untried", "yellow")
        say(console, "generated problems and a random model stood in: your data, model and tokenizer were not read", "dim")
        return EXIT_OK
    if int(os.environ.get("RANK", "0")) > 0:  # the first rank reports
        summary = train.run(config, NullReporter())
    else:
        with Reporter(config.output_dir, console) as reporter:
            summary = train.run(config, reporter)
        if summary.steps and not summary.interrupted:
            _print_paths(plot_run(config.output_dir), console)
    stopped = {"SIGHUP": EXIT_HUNG_UP, "SIGINT": EXIT_INTERRUPTED, "SIGTERM": EXIT_TERMINATED}
    return EXIT_OK if summary.stopped_by is None else stopped[summary.stopped_by]


def _recipes(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.config_file import read_recipe, recipes
    from trapo_train.reports.tables import recipes_table

    if args.name is None:
        console.print(recipes_table(recipes()))
    else:
        print(read_recipe(args.name), end="")
    return EXIT_OK


def _settings(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.reports.tables import settings_table
    from trapo_train.settings import settings

    console.print(settings_table(settings(args.section)))
    return EXIT_OK


def _eval(args: argparse.Namespace, console: Console) -> int:
    config = _load(args)
    from trapo_train.checks.symptoms import about_evaluation
    from trapo_train.evaluation.held_out import model_label, responses_file
    from trapo_train.reports.tables import evaluation_table
    from trapo_train.rollouts.plans import PlanConfig
    from trapo_train.step.advantages import AdvantageConfig
    from trapo_train.step.objective import ObjectiveConfig
    from trapo_train.step.optimizer import OptimizerConfig
    from trapo_train.step.updates import UpdateConfig

    if not config.held_out:
        raise UserError("eval: the configuration must have held-out problems. Set eval_data.path=<dataset>, or eval_data.task.")
    # Nothing is trained: neither the training data nor a reference model nor the plan for traces is needed.
    plan, objective = ("grpo", "dr_grpo") if config.reward is not None else ("sft", "sft")  # which ask for no reward
    nothing = {"plan": PlanConfig(plan), "objective": ObjectiveConfig(objective), "updates": UpdateConfig()}
    nothing |= {"optimizer": OptimizerConfig()}
    nothing |= {"advantage": AdvantageConfig(), "rollout": replace(config.rollout, on_truncated="keep")}
    nothing["packing"] = replace(config.packing, train_on_prompt=False)
    config = replace(config, data=next(iter(config.held_out.values())), **nothing)
    label = f"of_{model_label(config.model.name_or_path, config.model.revision)}"
    with StatusLine(console) as progress:
        trainer = _trainer(config, console, progress, trains=False)
        evaluations = trainer.evaluate(label)
    if trainer.world.first:
        console.print(evaluation_table(evaluations))
        for name, metrics in evaluations.items():
            for text in about_evaluation(name, metrics).values():
                say(console, text, "yellow")
        if config.evaluation.save_samples:
            _print_paths([responses_file(config.output_dir, name, label) for name in evaluations], console)
    trainer.close()
    return EXIT_OK


def _export(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.run.export_checkpoint import export_checkpoint

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"export: must run in one process, got {os.environ['WORLD_SIZE']} ranks. Start it without torchrun.")
    _quiet_libraries()
    how = {"step": args.step, "dtype": args.dtype, "adapter": args.adapter}
    directory, step, notes = export_checkpoint(args.run_dir, args.directory, **how)
    say(console, f"step {step}: wrote {directory}")
    for note in notes:
        say(console, note, "dim")
    if not args.adapter:
        say(console, f"trapo-train eval {args.run_dir} model.name_or_path={directory}", "dim")
    return EXIT_OK


def _headroom(args: argparse.Namespace, console: Console) -> int:
    config = _load(args)
    from trapo_train.evaluation.headroom import HeadroomConfig, measure, show_headroom

    if config.reward is None:
        raise UserError("headroom: reward must be set, for it judges responses, got null. Add reward=math_verify, for example.")
    with refused(f"output_dir must be a directory that can be written to, got {config.output_dir}", OSError):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.output_dir).close()  # asked before it samples for minutes
    settings = HeadroomConfig(num_problems=args.num_problems, samples_per_prompt=args.samples, group_by=config.evaluation.group_by)
    with StatusLine(console) as progress:
        trainer = _trainer(config, console, progress)
        report = measure(trainer, settings)
    found = show_headroom(report, Path(config.output_dir), console) if trainer.world.first else report.verdict()[0]
    trainer.close()
    return EXIT_OK if found else EXIT_NEGATIVE


def _inspect(args: argparse.Namespace, console: Console) -> int:
    if args.max_tokens < 1:
        raise UserError(f"inspect: --max-tokens must be at least 1, got {args.max_tokens}.")
    with StatusLine(console) as progress:
        trainer = _trainer(_load(args), console, progress)
    from trapo_train.reports.inspect import render_group
    from trapo_train.rollouts.rollout import run_plans
    from trapo_train.step.advantages import assign_advantages, assign_prefix_weights

    if not 0 <= args.problem < len(trainer.problems):
        raise UserError(f"inspect: --problem must be in [0, {len(trainer.problems) - 1}], got {args.problem}.")
    config = trainer.config
    with trainer.ready_to_generate():
        result = run_plans(
            [trainer.problems[args.problem]], trainer.plan, trainer.engine, trainer.reward, trainer.tokenizer, config.rollout
        )
    assign_advantages(result.groups, config.advantage)
    group = result.groups[0]
    assign_prefix_weights(group)
    color = console.color_system is not None
    if trainer.world.first:
        trains_prefix = bool(trainer.objective.expert_terms)
        view = {"max_tokens": args.max_tokens, "color": color, "trains_prefix": trains_prefix}
        shown = render_group(group, trainer.tokenizer, **view, judged=trainer.reward is not None)
        console.print(shown)
    trainer.close()
    return EXIT_OK


def _plan_memory(args: argparse.Namespace, console: Console) -> int:
    config = _load(args)
    from trapo_train.memory.plan import GIB, changes, plan_memory
    from trapo_train.memory.tables import changes_table, memory_summary, memory_table

    if args.memory_gib is not None and not 0 < args.memory_gib < float("inf"):
        raise UserError(f"plan-memory: --memory-gib must be a finite number above 0, got {args.memory_gib}.")
    gpu_bytes = None if args.memory_gib is None else int(args.memory_gib * GIB)
    where = {"context": args.context, "device_type": args.device, "gpu_bytes": gpu_bytes}
    plan = plan_memory(config, gpus=args.gpus, **where)
    console.print(memory_table(plan))
    console.print(memory_summary(plan, args.device), highlight=False)
    if args.memory_gib is None:
        return EXIT_OK
    if plan.peak_bytes <= args.memory_gib * GIB:
        say(console, f"fits into {args.memory_gib:g} GiB", "green")
        return EXIT_OK
    most = max(plan.components, key=lambda name: plan.components[name].get(plan.peak_phase, 0))
    needs = f"{plan.peak_phase} needs most, and most of it is {most}"
    say(console, f"does not fit into {args.memory_gib:g} GiB: {needs}.", "bold red")
    console.print(changes_table(changes(config, plan, **where), args.memory_gib))
    return EXIT_NEGATIVE


def _plot(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.reports.plots import plot_run

    paths = plot_run(args.run_dir)
    if not paths:
        raise UserError(
            f"plot: metrics must hold what can be drawn, got those of {args.run_dir}, where no step trained anything. Train more."
        )
    _print_paths(paths, console)
    return EXIT_OK


def _compare(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.reports.plots import compare_runs

    path = args.output or Path(args.run_dirs[0]).resolve().parent / "compare.png"
    _print_paths([compare_runs(args.run_dirs, path)], console)
    return EXIT_OK


def _demo(args: argparse.Namespace, console: Console) -> int:
    from trapo_train.demo import run_demo

    _quiet_libraries()
    learned = run_demo(Path(args.output), seeds=args.seeds, compare=args.compare, console=console)
    return EXIT_OK if learned else EXIT_NEGATIVE


def _trainer(config: RunConfig, console: Console, progress: Tell, **options: Any) -> Trainer:
    """One that says what it loads."""
    from trapo_train.trainer import Trainer

    return Trainer(config, tell=lambda text: say(console, text, "dim"), progress=progress, **options)


def _load(args: argparse.Namespace, finished_run: bool = True) -> RunConfig:
    """The configuration, with the allocator set as suits it. Commands ask for it before they import what brings torch: a file
    that cannot be read is told at once."""
    config = _read_config(args, finished_run)
    # Micro-batches differ in length: segments of fixed sizes would leave holes that nothing fits into. torch reads this when CUDA
    # starts, a user's own first. vLLM's sleep moves memory of its own, for which it refuses such segments.
    sleeps = config.rollout.engine == "vllm" and config.rollout.vllm.sleep
    if not sleeps and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return config


def _read_config(args: argparse.Namespace, finished_run: bool) -> RunConfig:
    """The configuration; for the directory of a finished run its own, with the model that it trained."""
    from trapo_train.config_file import read_config, read_finished_run

    read = read_finished_run if finished_run and Path(args.config).is_dir() else read_config
    given = read(args.config, args.overrides)
    from trapo_train.config import RunConfig

    _quiet_libraries()
    return build(RunConfig, *given)


def _quiet_libraries() -> None:
    """No progress bars of transformers and datasets between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets, which reads this, is imported where data is read


def _print_paths(paths: Sequence[Path], console: Console) -> None:
    for path in paths:
        say(console, f"wrote {path}", "dim")


if __name__ == "__main__":
    run_and_exit()
