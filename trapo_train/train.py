"""The training loop: problems → plans and rollouts → advantages → packing → one optimizer step, again and again.

from trapo_train.config import load_config
from trapo_train.display import Reporter
from trapo_train.train import run

config = load_config("run.yaml")
summary = run(config, Reporter(config.output_dir))
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from trapo_kernels import Objective
from trapo_train.advantages import assign_advantages, assign_prefix_weights
from trapo_train.checkpoint import CheckpointStore, StopSignal, export_model, restore_rng_state, rng_state
from trapo_train.chooser import apply_choice, load_chooser
from trapo_train.config import RunConfig, to_yaml
from trapo_train.data import ProblemOrder, load_problems
from trapo_train.display import METRICS_FILE, Reporter
from trapo_train.engine import TransformersEngine
from trapo_train.evaluate import evaluate
from trapo_train.model import load_model_and_tokenizer, precision, score
from trapo_train.packing import MicroBatch, pack
from trapo_train.plans import DeferredProblems, Plan, PlanConfig, build_plan
from trapo_train.preflight import check_lengths, check_objective
from trapo_train.records import Problem, Sample
from trapo_train.rewards import load_reward
from trapo_train.rollout import drop_long_experts, run_plans
from trapo_train.step import (
    NonFiniteError,
    build_objective,
    build_optimizer,
    build_scheduler,
    extreme_objectives,
    optimizer_step,
    scheduled_options,
)
from trapo_train.tasks import build_tokenizer

CONFIG_FILE, CHECKPOINT_DIR, MODEL_DIR = "config.yaml", "checkpoints", "model"
# Sections that may change between a run and its continuation without changing what is trained.
_FREE_SECTIONS = ("output_dir", "checkpoint", "evaluation", "eval_data")


@dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    steps: int
    """Optimizer steps taken in total, those before a resume included."""
    interrupted: bool
    """True when SIGTERM ended the run before its last step; it can be resumed."""
    output_dir: Path
    """Where metrics, checkpoints and the trained model are."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last step."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """The last evaluation; empty without eval_data."""
    groups: list[list[Sample]] = field(default_factory=list)
    """Samples of the last step, one group per problem."""

    def __str__(self) -> str:
        if self.interrupted:
            return f"Stopped by SIGTERM after step {self.steps}; continue with checkpoint.resume=true."
        return f"Trained {self.steps} steps. The model is in {self.output_dir / MODEL_DIR}."


def run(config: RunConfig, reporter: Reporter) -> RunSummary:
    """Train as configured, from the start or from the newest checkpoint, and export the model.

    Everything that can be wrong with the configuration, the data or a checkpoint shows before the first rollout. Writes
    config.yaml, checkpoints/ and model/ to `config.output_dir`; metrics go to `reporter`. On SIGTERM the run saves a
    checkpoint after the current step and returns.

    Raises: ValueError for what cannot be trained; CheckpointError; RewardError; NonFiniteError after too many skipped steps.
    """
    output_dir = Path(config.output_dir)
    store = CheckpointStore(output_dir / CHECKPOINT_DIR, config.checkpoint.keep)
    _check_output_dir(config, store)
    trainer = Trainer(config)
    if config.checkpoint.resume:
        resumed = trainer.resume(store)
        reporter.rewind(trainer.step if resumed else -1)  # without a checkpoint step 0 is recorded again, too
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    reporter.start(config, trainer.data_report)
    for note in trainer.notes:
        reporter.event(note)
    with StopSignal() as stop:
        _loop(trainer, store, reporter, stop)
    interrupted = trainer.step < config.steps
    if not interrupted:
        export_model(trainer.model, trainer.tokenizer, output_dir / MODEL_DIR)
    summary = RunSummary(trainer.step, interrupted, output_dir, trainer.last_metrics, trainer.last_evaluation, trainer.last_groups)
    reporter.finish(summary)
    return summary


def _loop(trainer: Trainer, store: CheckpointStore, reporter: Reporter, stop: StopSignal) -> None:
    """Step until the end or until SIGTERM; after each step evaluate, then save, whichever is due."""
    config = trainer.config
    saved_at = trainer.step if config.checkpoint.resume and trainer.step in store.steps() else None
    while True:
        if trainer.evaluation_due and not stop.received:
            reporter.evaluation({"step": trainer.step, **trainer.evaluate()})
        finished = trainer.step >= config.steps
        every = config.checkpoint.every
        due = every > 0 and trainer.step > 0 and (trainer.step % every == 0 or finished)
        if (due or stop.received) and saved_at != trainer.step:
            reporter.event(f"saved {store.save(trainer.step, trainer.state_dict(), trainer.fingerprint)}")
            saved_at = trainer.step
        if finished or stop.received:
            return
        metrics = trainer.train_step()
        reporter.step(metrics)
        trainer.stop_if_broken(metrics, reporter)


class Trainer:
    """Everything a run consists of, and its state: model, optimizer, schedule, order of the problems, random states.

    Building one loads data and model and checks that they fit together.

    Raises: ValueError for what cannot be trained, with rule, actual value and remedy.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.step = 0
        self.chooser = load_chooser(config.objective.chooser) if config.objective.chooser else None
        self.deferred = DeferredProblems(config.plan.setting("buffer_size"))
        self.reward = load_reward(config.reward)
        check_objective(config, self.objective)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task_tokenizer = build_tokenizer() if config.data.task is not None else None
        self.model, self.tokenizer = load_model_and_tokenizer(
            config.model, task_tokenizer=task_tokenizer, seed=config.seed, device=self.device
        )
        self.notes: list[str] = []
        self.problems = self._load_problems()
        self.eval_problems = None
        if config.eval_data is not None:
            self.eval_problems = load_problems(config.eval_data, self.tokenizer, None)
        check_lengths(config, self.model, [*self.problems, *(self.eval_problems or [])])
        self.reference = None
        if any("ref_logprob" in objective.streams for objective in extreme_objectives(config.objective)):
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, steps=config.steps)
        self.engine = TransformersEngine(
            self.model, self.tokenizer, seed=config.seed, max_batch_tokens=config.rollout.max_batch_tokens
        )
        self.order = ProblemOrder(len(self.problems), config.seed)
        self.evaluated_at = -1
        self.skipped_in_a_row = 0
        self.last_metrics: dict[str, Any] = {}
        self.last_evaluation: dict[str, float] = {}
        self.last_groups: list[list[Sample]] = []

    @property
    def objective(self) -> Objective:
        """The configured objective as its schedules have it at this step."""
        return build_objective(self.config.objective, self.step)

    @property
    def plan(self) -> Plan:
        """The configured plan as it draws at this step."""
        return build_plan(self.config.plan, step=self.step, seed=self.config.seed)

    def train_step(self) -> dict[str, Any]:
        """Sample, score and learn from the next problems; returns the metrics of the step."""
        config = self.config
        started = time.perf_counter()
        positions, plan, objective = self._next()
        problems = [self.problems[i] for i in positions]
        with precision(self.model):
            rollout = run_plans(problems, plan, self.engine, self.reward, self.tokenizer, config.rollout)
        self.deferred.add(positions[i] for i in rollout.deferred)
        assign_advantages(rollout.groups, config.advantage)
        for group in rollout.groups:
            assign_prefix_weights(group)
        sampled = time.perf_counter()
        micro_batches = self._with_reference(
            pack(
                [sample for group in rollout.groups for sample in group],
                config.packing,
                objective,
                max_response_tokens=config.rollout.max_response_tokens,
            ),
            objective,
        )
        update = optimizer_step(
            self.model,
            self.optimizer,
            self.scheduler,
            micro_batches,
            objective,
            config.rollout.temperature,
            config.optimizer.max_grad_norm,
        )
        ended = time.perf_counter()
        scheduled = {f"objective/{name}": value for name, value in scheduled_options(config.objective, self.step).items()}
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update["skipped_step"] else 0
        self.last_groups = rollout.groups
        self.last_metrics = {
            "step": self.step,
            **update,
            **rollout.metrics,
            **scheduled,
            "tokens_per_s": rollout.metrics["response_tokens"] / (ended - started),
            "peak_memory_mib": peak_memory_mib(self.device),
            "time/rollout_s": sampled - started,
            "time/update_s": ended - sampled,
        }
        if self.deferred.size is not None:
            self.last_metrics["deferred"] = len(self.deferred)
        return self.last_metrics

    def _next(self) -> tuple[list[int], Plan, Objective]:
        """Positions of the problems of the next step, how they are sampled, and the loss.

        A step that trains expert terms alone, be it for enough deferred problems or by the chooser, takes the expert traces.
        """
        positions = self.deferred.take()
        choice = "expert" if positions else "both"
        if not positions:
            positions = self.order.next(self.config.prompts_per_step)
            if self.chooser is not None:
                choice = self.chooser(self.step, self.last_metrics)
        objective = apply_choice(choice, self.objective)
        alone = choice != "both" and objective.rollout is None
        return positions, build_plan(PlanConfig("sft")) if alone else self.plan, objective

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and has not been: every k steps, the start included, and at the end."""
        if self.eval_problems is None or self.evaluated_at == self.step:
            return False
        every = self.config.evaluation.every
        return self.step >= self.config.steps or (every > 0 and self.step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the held-out problems; leaves all random states as they are."""
        config = self.config
        with precision(self.model):
            self.last_evaluation = evaluate(
                self.engine, self.eval_problems, self.reward, self.tokenizer, config.evaluation, config.rollout
            )
        self.evaluated_at = self.step
        return self.last_evaluation

    def stop_if_broken(self, metrics: dict[str, Any], reporter: Reporter) -> None:
        """Report a skipped step; after too many in a row keep the samples for inspection and raise NonFiniteError."""
        if not metrics["skipped_step"]:
            return
        reporter.event(
            f"step {self.step} skipped: loss {metrics['loss']:.3g} and gradient norm {metrics['grad_norm']:.3g} must be finite"
        )
        if self.skipped_in_a_row <= self.config.optimizer.max_skipped_steps:
            return
        path = Path(self.config.output_dir) / f"non_finite_step_{self.step}.jsonl"
        samples = [sample for group in self.last_groups for sample in group]
        path.write_text("".join(json.dumps(asdict(sample), default=str) + "\n" for sample in samples), encoding="utf-8")
        raise NonFiniteError(
            f"train: {self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, at most "
            f"optimizer.max_skipped_steps = {self.config.optimizer.max_skipped_steps} are skipped. The last samples are in "
            f"{path}. Resume from the last checkpoint with a lower optimizer.learning_rate or max_grad_norm."
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run must share with this one to continue it: the configuration, except where and how long, and the data."""
        config = yaml.safe_load(to_yaml(self.config))
        free = [*_FREE_SECTIONS]
        if self.config.optimizer.schedule.startswith("constant"):
            free.append("steps")  # other schedules depend on it
        return {"config": {k: v for k, v in config.items() if k not in free}, "data": self.data_fingerprint[:16]}

    def state_dict(self) -> dict[str, Any]:
        """All state of the run, as tensors and plain values."""
        return {
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "skipped_in_a_row": self.skipped_in_a_row,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order.state_dict(),
            "engine": self.engine.state_dict(),
            "deferred": self.deferred.state_dict(),
            "chooser": self.chooser.state_dict() if hasattr(self.chooser, "state_dict") else {},
            "last_metrics": self.last_metrics,
            "rng": rng_state(),
        }

    def resume(self, store: CheckpointStore) -> bool:
        """Take over the newest checkpoint of `store`, to continue exactly where it was saved; False where there is none."""
        found = store.load(self.fingerprint)
        if found is None:
            return False
        _, state = found
        for name in ("step", "evaluated_at", "skipped_in_a_row", "last_metrics"):
            setattr(self, name, state[name])
        for name in ("model", "optimizer", "scheduler", "order", "engine", "deferred"):
            getattr(self, name).load_state_dict(state[name])
        if hasattr(self.chooser, "load_state_dict"):
            self.chooser.load_state_dict(state["chooser"])
        restore_rng_state(state["rng"])
        self.notes.append(f"resumed from step {self.step}")
        return True

    def _load_problems(self) -> Sequence[Problem]:
        """The training problems; expert traces and problems that cannot be used are left out and noted."""
        loaded = load_problems(self.config.data, self.tokenizer, self.reward)
        self.data_report, self.data_fingerprint = loaded.report, loaded.fingerprint
        longest = self.config.rollout.max_response_tokens
        problems, dropped = drop_long_experts(loaded, longest)
        if dropped:
            self.notes.append(f"left out {dropped} expert traces longer than rollout.max_response_tokens = {longest}")
        if self.objective.rollout is None:
            kept = [problem for problem in problems if problem.experts]
            if len(kept) < len(problems):
                self.notes.append(f"left out {len(problems) - len(kept)} problems without an expert trace")
            if not kept:
                raise ValueError(
                    f"objective {self.objective.name} trains on expert tokens alone, and none of the {len(problems)} problems "
                    "has an expert trace. Set data.expert_column, raise rollout.max_response_tokens, or train on rollouts."
                )
            problems = kept
        return problems

    def _with_reference(self, micro_batches: list[MicroBatch], objective: Objective) -> list[MicroBatch]:
        """The micro-batches with logprobs of the model as it was before training, where the objective reads them."""
        if "ref_logprob" not in objective.streams:
            return micro_batches
        if self.reference is None:
            raise ValueError(
                f"objective.chooser chose {objective.name}, which reads the logprobs of the model before training; it is kept "
                f"only for an objective.name that reads them too, got {self.config.objective.name}."
            )
        scored = []
        for micro_batch in micro_batches:
            logprob, _ = score(self.reference, micro_batch.to(self.device), self.config.rollout.temperature)
            batch = replace(micro_batch.batch, ref_logprob=logprob.cpu())
            scored.append(replace(micro_batch, batch=batch))
        return scored


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held at once so far, MiB: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _check_output_dir(config: RunConfig, store: CheckpointStore) -> None:
    metrics = Path(config.output_dir) / METRICS_FILE
    used = store.steps() or (metrics.exists() and metrics.stat().st_size > 0)
    if used and not config.checkpoint.resume:
        raise ValueError(
            f"output_dir {config.output_dir} already holds a run. Continue it with checkpoint.resume=true, delete it, or "
            "choose another output_dir."
        )
