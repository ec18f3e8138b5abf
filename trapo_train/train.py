"""The training loop: problems → plans and rollouts → advantages → packing → one optimizer step, again and again.

from trapo_train.config import load_config
from trapo_train.reports.display import Reporter
from trapo_train.train import run

config = load_config("run.yaml")
summary = run(config, Reporter(config.output_dir))
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch

from trapo_train.checkpoints.checkpoint import CheckpointError, CheckpointStore
from trapo_train.checkpoints.export import export_adapter, export_model, other_tokenizer
from trapo_train.checkpoints.model_state import check_finite
from trapo_train.checks.preflight import check_disk
from trapo_train.checks.symptoms import Symptoms
from trapo_train.config import RunConfig, to_yaml
from trapo_train.config_file import ADAPTER_DIR, CONFIG_FILE, MODEL_DIR
from trapo_train.data.rejected import Place, read_rejected, write_rejected
from trapo_train.evaluation.evaluate import EvaluationStopped
from trapo_train.extras import check_packages
from trapo_train.files import replace_text
from trapo_train.parallel.world import World
from trapo_train.records import Sample
from trapo_train.reports.display import NullReporter, Reporter
from trapo_train.rollouts.samples import write_samples
from trapo_train.run.output_dir import check_output_dir, check_place, check_shared, check_steps, held
from trapo_train.run.postmortem import save_batch
from trapo_train.run.signals import StopSignal
from trapo_train.schema import UserError
from trapo_train.step.objective import ObjectiveConfig, cap_of_ratios
from trapo_train.step.optimizer_step import NonFiniteError
from trapo_train.trainer import Trainer


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    steps: int
    """Rollout steps taken in total, those before a resume included."""
    stopped_by: str | None
    """SIGTERM, SIGHUP or SIGINT where that ended the run before its last step, which can be resumed."""
    output_dir: Path
    """Where metrics, checkpoints and the trained model are."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step."""
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """The last evaluation by the name of its set, "" where there is one without a name; empty without eval_data."""
    groups: list[list[Sample]] = field(default_factory=list)
    """Samples of the last step, one group per problem."""

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.stopped_by is not None

    def __str__(self) -> str:
        if self.interrupted:
            return f"Stopped by {self.stopped_by} after step {self.steps}; continue with checkpoint.resume=true."
        return f"Trained {self.steps} steps. The model is in {self.output_dir / MODEL_DIR}."


def run(config: RunConfig, reporter: Reporter) -> RunSummary:
    """Train as configured, from the start or from the newest checkpoint, and export the model.

    Everything that can be wrong with the configuration, the data or a checkpoint shows before the first rollout. Writes
    config.yaml, checkpoints/ and model/ to `config.output_dir`; metrics go to `reporter`. On SIGTERM, SIGHUP or SIGINT the run
    saves a checkpoint after the current step and returns, and gives up an evaluation before its next engine call; a second
    SIGINT interrupts it at once. Under torchrun every rank calls this; the first one writes and reports.

    Raises: UserError for what cannot be trained; CheckpointError; NonFiniteError after too many skipped steps, RewardError,
        EngineError, and anything else that a step or an evaluation raises, on all ranks and not between two updates of a step,
        each with a checkpoint of the state before; NonFiniteError in their place, and before any other checkpoint or the model is
        written, where weights are not finite; RankError when another rank dies or hangs.
    """
    check_place(config)
    check_packages(config)
    world = World(config.parallel)
    # What output_dir holds is looked at inside: loading may take an hour, in which another run could begin and end there.
    with world.together(), held(Path(config.output_dir), world) as of_lock:
        rejected = world.attempt(lambda: _look_at_output_dir(config), Exception)[0]
        trainer = Trainer(config, rejected=rejected, tell=reporter.doing, progress=reporter.progress)
        check_steps(config, trainer.config.steps)
        store = CheckpointStore.of(config.output_dir, config.checkpoint, world)
        of_disk = check_disk(trainer.config, trainer.model, store)
        trainer.notes += [note for note in (of_disk, of_lock) if note is not None]
        summary = _run(trainer, store, reporter if world.first else NullReporter())
        trainer.close()
    return summary


def _run(trainer: Trainer, store: CheckpointStore, reporter: Reporter) -> RunSummary:
    config, output_dir = trainer.config, Path(trainer.config.output_dir)
    if config.checkpoint.resume:
        resumed = trainer.resume(store)
        store.prune()  # a run that was killed may have saved one and not dropped another
        trainer.notes += [store.undeleted] if store.undeleted is not None else []
        # Without a checkpoint step 0 is recorded again, too, and so is an evaluation that the checkpoint knows nothing of.
        reporter.rewind(trainer.step if resumed else -1, evaluated=trainer.evaluated_at == trainer.step)
        trainer.notes += [] if resumed else [f"there is no checkpoint in {store.directory}: training starts from the beginning"]
    trainer.world.barrier()  # all ranks have looked at output_dir
    if trainer.world.first:
        if config.data.on_rejected_expert == "drop":
            write_rejected(output_dir, trainer.problems.rejected)
        replace_text(output_dir / CONFIG_FILE, to_yaml(config))
    check_shared(config, trainer.world)
    _start(trainer, reporter)
    for note in trainer.notes:
        reporter.event(note)
    with StopSignal(_notice(trainer)) as stop:  # which also holds while the model is written
        failed, written = _loop(trainer, store, reporter, stop)
        left = trainer.step < config.steps or trainer.evaluation_due  # for the run that continues this one
        stopped_by = stop.received if left and failed is None else None  # what is in no checkpoint is exported
        if stopped_by is None:
            if not written:
                _export(trainer, store, reporter, failed)
            better = store.better_before() if config.checkpoint.keep_best else None
            if better is not None:
                reporter.event(better)
    summary = RunSummary(trainer.step, stopped_by, output_dir, trainer.last_metrics, trainer.last_evaluation, trainer.last_groups)
    reporter.finish(summary)
    return summary


def _look_at_output_dir(config: RunConfig) -> set[Place] | None:
    """Check that the run may write there. Returns the expert traces that the run which it continues has dropped; None where there
    is no such run."""
    check_output_dir(config)
    store = CheckpointStore.of(config.output_dir)
    if not (config.checkpoint.resume and store.steps() and config.data.on_rejected_expert == "drop"):
        return None
    if store.fingerprint().get("config", {}).get("data", {}).get("on_rejected_expert") == "keep":
        return set()  # without asking about traces: to resume that run with another setting is refused once the data is known
    return read_rejected(Path(config.output_dir))


def _start(trainer: Trainer, reporter: Reporter) -> None:
    """Begin the report; what is wrong with its trackers, known to the first rank, is raised on every rank."""
    trainer.world.attempt(lambda: reporter.start(trainer.config, trainer.data_report), UserError)


def _notice(trainer: Trainer) -> str:
    """What Ctrl-C is answered with. Under torchrun a second one reaches torchrun alone."""
    if not trainer.world.first:
        return ""
    again = "; Ctrl-C once more stops it at once, without saving" if trainer.world.size == 1 else ""
    return f"\nSIGINT: the run saves after this step and stops{again}\n"


def _export(trainer: Trainer, store: CheckpointStore, reporter: Reporter, unsaved: CheckpointError | None) -> None:
    """Write the trained model; where that fails, a checkpoint of the last step, so that nothing has to be trained again. Several
    ranks, which one that fails takes along, have saved that step before.

    `unsaved`: why that checkpoint could not be written, where it was tried already; raised once the model is there.
    """
    config, error = trainer.config, None
    directory = Path(config.output_dir) / MODEL_DIR
    try:
        export_model(trainer.model, trainer.tokenizer, directory, trainer.world)
        if config.model.lora is not None and config.model.name_or_path is not None:  # of a model that PEFT finds again
            adapter = directory.with_name(ADAPTER_DIR)
            export_adapter(trainer.model, trainer.tokenizer, adapter, trainer.world, revision=config.model.revision)
    except CheckpointError as raised:
        error = raised
    except Exception as raised:  # whatever gathering the weights raises, such as for too little memory, must not lose the run
        if trainer.world.size > 1:  # the others still gather, or will not: that this one ends tells them; the step is saved
            raise
        error = CheckpointError(f"model: could not be written to {directory}: {type(raised).__name__}: {raised}.")
    failed = next((found for found in trainer.world.gather(error) if found is not None), None)
    if trainer.world.first and error is None and config.data.task is None:  # a generated task brings its tokenizer, too
        note = other_tokenizer(directory, trainer.tokenizer, config.model.trust_remote_code)
        if note is not None:
            reporter.event(note)
    if failed is None and unsaved is None:
        return
    if failed is None:
        raise CheckpointError(f"{unsaved} The trained model is complete: {directory}.") from unsaved
    if unsaved is not None:
        raise CheckpointError(f"{failed} Nor could a checkpoint: {unsaved}") from failed
    saved = store.path(trainer.step) if trainer.step in store.steps() else trainer.save(store)
    raise CheckpointError(
        f"{failed} What was trained is in {saved}. Free space, make the directory writable or mend what else it names, then resume "
        "with checkpoint.resume=true, which writes the model."
    ) from failed


def _loop(trainer: Trainer, store: CheckpointStore, reporter: Reporter, stop: StopSignal) -> tuple[CheckpointError | None, bool]:
    """Step until the end or a signal to stop; after each step save, then evaluate, whichever is due. What it ends with at the last
    step is finite. Returns why that could not be saved, which must not keep the model from being written, and whether it is.

    An evaluation may take long: what ends the run meanwhile finds the step saved. Whatever takes long leads back to the top, where
    ranks agree on a signal, so that one that came meanwhile ends the run before anything else begins."""
    config = trainer.config
    saved_at = trainer.step if config.checkpoint.resume and trainer.step in store.steps() else None
    symptoms = Symptoms(config.rollout.max_response_tokens, trainer.tokenizer.eos_token, trainer.last_metrics)
    every, unsaved, written = config.checkpoint.every, None, False
    last_is_due = every > 0 or trainer.world.size > 1  # or all would be lost where one rank fails to gather the model
    while True:
        stopping = stop.agree(trainer.world) is not None  # a signal to one rank stops all of them, at the same step
        finished = trainer.step >= config.steps
        due = trainer.step > 0 and (last_is_due if finished else every > 0 and trainer.step % every == 0)
        if finished and trainer.evaluation_due and not (due or stopping or written):  # an evaluation may end what saved nothing
            check_finite(trainer.model, trainer.world, store, trainer.step)
            _export(trainer, store, reporter, None)
            written = True
        try:
            if (due or stopping) and saved_at != trainer.step and unsaved is None:
                _save(trainer, store, reporter)
                saved_at = trainer.step
            elif trainer.evaluation_due and not stopping:
                _evaluate(trainer, store, reporter, stop, symptoms, saved=saved_at == trainer.step)
            elif finished or stopping:
                if not (due or stopping):  # what was to be saved has been checked
                    check_finite(trainer.model, trainer.world, store, trainer.step)
                for text in symptoms.at_the_end():
                    reporter.event(text)
                return unsaved, written
            else:
                _step(trainer, store, reporter, symptoms)
        except CheckpointError as error:
            if not finished:
                raise
            unsaved = error
        except NonFiniteError:  # of weights, or with all saved that can be
            raise
        except Exception as error:  # whatever it is: the last whole step is not lost, if all ranks are here to save it
            if trainer.undo.intact and trainer.step > 0 and saved_at != trainer.step and trainer.world.all_raise(error):
                clear_frames(error.__traceback__)  # what a pass holds, for want of memory it may have ended
                _rescue(trainer, store, reporter)
            raise


def _step(trainer: Trainer, store: CheckpointStore, reporter: Reporter, symptoms: Symptoms) -> None:
    """Train a step and report it. After too many skipped steps in a row a checkpoint is saved, unless weights are not finite,
    before NonFiniteError is raised."""
    metrics = _trained(trainer)
    reporter.step(metrics)
    for text in symptoms.of_step(metrics):
        reporter.event(text)
    samples_every = trainer.config.tracking.samples_every
    if trainer.world.first and samples_every and trainer.step % samples_every == 0:
        _write_samples(trainer, reporter)
    _report_non_finite(trainer, metrics, reporter)
    if trainer.skipped_in_a_row > trainer.config.optimizer.max_skipped_steps:
        # 0 of the run that goes on from here: nothing was taken from the updates that were skipped
        skipped, trainer.skipped_in_a_row = trainer.skipped_in_a_row, 0
        with suppress(NonFiniteError):  # of the weights
            _rescue(trainer, store, reporter)
        raise _given_up(trainer, skipped)


def _trained(trainer: Trainer) -> dict[str, Any]:
    """The metrics of a step that was taken. Raises: UserError for too little memory of the GPU; what `Trainer.train_step` does."""
    try:
        return trainer.train_step()
    except torch.OutOfMemoryError as error:
        too_little = str(error).split(". ")[0]  # not the error, whose frames hold what fills the memory
    raise UserError(
        f"train: step {trainer.step + 1} must fit into the memory of the GPU, got {too_little}. Lower packing.max_tokens = "
        f"{trainer.config.packing.max_tokens} or set model.gradient_checkpointing=true, which a run that goes on with "
        "checkpoint.resume=true may change; `trapo-train plan-memory` says what takes how much."
    )


def _evaluate(
    trainer: Trainer, store: CheckpointStore, reporter: Reporter, stop: StopSignal, symptoms: Symptoms, *, saved: bool
) -> None:
    """Evaluate this step and, where it is `saved`, rate its checkpoint; an evaluation that a signal ends leaves nothing."""
    reporter.doing("evaluating")
    try:
        found = trainer.evaluate(stopped=lambda: stop.received is not None)
    except EvaluationStopped:
        return
    for name, metrics in found.items():
        reporter.evaluation({**metrics, "step": trainer.step}, name)
        for text in symptoms.of_evaluation(name, metrics):
            reporter.event(text)
    if saved:
        told = store.undeleted
        evaluated = {"evaluated_at": trainer.evaluated_at, "last_evaluation": trainer.last_evaluation}
        store.rate(trainer.step, trainer.score, evaluated)
        if store.undeleted not in (None, told):
            reporter.event(store.undeleted)


def _write_samples(trainer: Trainer, reporter: Reporter) -> None:
    """Write the samples of the last step; where that fails, it is told, and the run goes on without them."""
    judged = trainer.reward is not None
    try:
        write_samples(trainer.last_groups, trainer.tokenizer, trainer.config.output_dir, trainer.step, judged=judged)
    except OSError as error:
        reporter.event(f"the samples of step {trainer.step} could not be written: {error}")


def _save(trainer: Trainer, store: CheckpointStore, reporter: Reporter) -> None:
    """Save a checkpoint of finite weights; an old one that cannot be deleted is told, and the run goes on."""
    check_finite(trainer.model, trainer.world, store, trainer.step)
    reporter.event(f"saved {trainer.save(store)}")
    if store.undeleted is not None:
        reporter.event(store.undeleted)


def _rescue(trainer: Trainer, store: CheckpointStore, reporter: Reporter) -> None:
    """Save before an error ends the run, which says why; that this fails, too, is told beside it."""
    try:
        _save(trainer, store, reporter)
    except CheckpointError as error:
        reporter.event(f"step {trainer.step} could not be saved: {error}")


def _report_non_finite(trainer: Trainer, metrics: dict[str, Any], reporter: Reporter) -> None:
    """Report updates that were skipped, and a loss alone that is not finite."""
    config = trainer.config
    skipped, updates = metrics["skipped_step"], config.updates.per_step
    if not skipped:
        if not math.isfinite(metrics["loss"]):
            reporter.event(f"step {trainer.step}: the loss is {metrics['loss']}, its gradient is finite and was taken")
        return
    what = f"gradient norm {metrics['grad_norm']:.3g} must be finite, at loss {metrics['loss']:.3g}"
    reporter.event(
        (
            f"step {trainer.step} skipped: {what}"
            if skipped == updates
            else f"step {trainer.step}: {skipped} of {updates} updates skipped, whose gradient norm was not finite"
        )
        + _about_ratios(config.objective, metrics)
    )


def _given_up(trainer: Trainer, skipped: int) -> NonFiniteError:
    """Why the run ends after so many steps of nothing else, the last batch of which is kept where there is room for it."""
    config = trainer.config
    directory = Path(config.output_dir) / f"non_finite_step_{trainer.step}"
    batch = f"The last batch is in {directory} (see trapo_train.run.postmortem)"
    try:
        save_batch(directory, trainer)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        batch = f"The last batch could not be written to {directory}: {str(error).rstrip('.')}"
    return NonFiniteError(
        f"train: {skipped} steps in a row had a gradient that is not finite, at most "
        f"optimizer.max_skipped_steps = {config.optimizer.max_skipped_steps} are skipped. {batch}. Resume from the last "
        "checkpoint with a lower optimizer.learning_rate or max_grad_norm."
    )


def _about_ratios(config: ObjectiveConfig, metrics: dict[str, Any]) -> str:
    """What to do where a ratio of probabilities is beyond float32; "" where that is not known to be so."""
    if math.isfinite(metrics.get("rollout/ratio", 0.0)):
        return ""
    option = cap_of_ratios(config)
    cap = f"objective.options.{option} caps" if option is not None else "ppo's option dual and grpo's delta cap"
    return (
        f". A token's logprob is over 88 nats above the old one, and its ratio not finite: {cap} it where its advantage is negative"
    )
