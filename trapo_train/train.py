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

from trapo_train.advantages import assign_advantages, assign_prefix_weights
from trapo_train.checkpoint import CheckpointStore, StopSignal, export_model, restore_rng_state, rng_state
from trapo_train.config import RunConfig, to_yaml
from trapo_train.data import ProblemOrder, load_problems
from trapo_train.display import METRICS_FILE, Reporter
from trapo_train.engine import TransformersEngine
from trapo_train.evaluate import evaluate
from trapo_train.model import load_model_and_tokenizer, precision, score
from trapo_train.packing import MicroBatch, pack
from trapo_train.plans import build_plan, plan_rungs
from trapo_train.records import Problem, Sample
from trapo_train.rewards import load_reward
from trapo_train.rollout import drop_long_experts, run_plans
from trapo_train.step import NonFiniteError, build_objective, build_optimizer, build_scheduler, optimizer_step
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
        self.objective = build_objective(config.objective)
        self.plan = build_plan(config.plan)
        self.reward = load_reward(config.reward)
        self._check_objective()
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
        self._check_lengths()
        self.reference = None
        if "ref_logprob" in self.objective.streams:
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, steps=config.steps)
        self.engine = TransformersEngine(
            self.model, self.tokenizer, seed=config.seed, max_batch_tokens=config.rollout.max_batch_tokens
        )
        self.order = ProblemOrder(len(self.problems), config.seed)
        self.step = 0
        self.evaluated_at = -1
        self.skipped_in_a_row = 0
        self.last_metrics: dict[str, Any] = {}
        self.last_evaluation: dict[str, float] = {}
        self.last_groups: list[list[Sample]] = []

    def train_step(self) -> dict[str, Any]:
        """Sample, score and learn from the next problems; returns the metrics of the step."""
        config = self.config
        started = time.perf_counter()
        problems = [self.problems[i] for i in self.order.next(config.prompts_per_step)]
        with precision(self.model):
            rollout = run_plans(problems, self.plan, self.engine, self.reward, self.tokenizer, config.rollout)
        assign_advantages(rollout.groups, config.advantage)
        for group in rollout.groups:
            assign_prefix_weights(group)
        sampled = time.perf_counter()
        micro_batches = self._with_reference(
            pack(
                [sample for group in rollout.groups for sample in group],
                config.packing,
                self.objective,
                max_response_tokens=config.rollout.max_response_tokens,
            )
        )
        update = optimizer_step(
            self.model,
            self.optimizer,
            self.scheduler,
            micro_batches,
            self.objective,
            config.rollout.temperature,
            config.optimizer.max_grad_norm,
        )
        ended = time.perf_counter()
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update["skipped_step"] else 0
        self.last_groups = rollout.groups
        self.last_metrics = {
            "step": self.step,
            **update,
            **rollout.metrics,
            "tokens_per_s": rollout.metrics["response_tokens"] / (ended - started),
            "peak_memory_mib": peak_memory_mib(self.device),
            "time/rollout_s": sampled - started,
            "time/update_s": ended - sampled,
        }
        return self.last_metrics

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
            "rng": rng_state(),
        }

    def resume(self, store: CheckpointStore) -> bool:
        """Take over the newest checkpoint of `store`, to continue exactly where it was saved; False where there is none."""
        found = store.load(self.fingerprint)
        if found is None:
            return False
        _, state = found
        for name in ("step", "evaluated_at", "skipped_in_a_row"):
            setattr(self, name, state[name])
        for name in ("model", "optimizer", "scheduler", "order", "engine"):
            getattr(self, name).load_state_dict(state[name])
        restore_rng_state(state["rng"])
        self.notes.append(f"resumed from step {self.step}")
        return True

    def _check_objective(self) -> None:
        guided = any(rung.prefix_ratio > 0 for rung in plan_rungs(self.config.plan))
        if self.objective.rollout is None and not guided:
            raise ValueError(
                f"objective {self.objective.name} trains on expert tokens alone, and plan {self.config.plan.name} has none. "
                "Use plan.name=sft, or an objective for rollouts such as dr_grpo."
            )

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

    def _check_lengths(self) -> None:
        """The longest prompt and response must fit into a micro-batch, into the engine's batch and into the model."""
        response = self.config.rollout.max_response_tokens
        both = [*self.problems, *(self.eval_problems or [])]
        longest = max(len(problem.prompt_ids) for problem in both) + response
        limits = {
            "packing.max_tokens": self.config.packing.max_tokens,
            "rollout.max_batch_tokens": self.config.rollout.max_batch_tokens,
            "the model's positions": getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        }
        for name, limit in limits.items():
            if limit is not None and longest > limit:
                raise ValueError(
                    f"train: the longest prompt and rollout.max_response_tokens must fit into {name} = {limit}, got "
                    f"{longest - response} + {response} = {longest} tokens. Raise that limit, lower "
                    "rollout.max_response_tokens, or drop long prompts with data.max_prompt_tokens and on_long_prompt."
                )

    def _with_reference(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with logprobs of the model as it was before training, where the objective has a KL term."""
        if self.reference is None:
            return micro_batches
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
