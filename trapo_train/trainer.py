"""Everything a run consists of, and one step of it: problems → plans and rollouts → advantages → packing → optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo_kernels import Objective, free_kept_memory
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.checkpoints.model_state import load_training_state, training_state
from trapo_train.checks import preflight
from trapo_train.checks.advice import advice
from trapo_train.config import RunConfig
from trapo_train.data.dataset import ProblemOrder, load_problems
from trapo_train.data.problems import ProblemSet
from trapo_train.data.rejected import Place
from trapo_train.engines.configured import build_engine, ready_to_generate
from trapo_train.engines.draws import rank_seed
from trapo_train.evaluation.eval_sets import load_eval_sets
from trapo_train.evaluation.evaluate import evaluation_score, never
from trapo_train.evaluation.held_out import evaluate_sets, loading_notes, trained_too
from trapo_train.micro_batch import MicroBatch
from trapo_train.models.loading import check_places, name_model_in_hub_errors
from trapo_train.models.lora import hold_frozen
from trapo_train.models.model import DTYPES, load_model_and_tokenizer
from trapo_train.models.placement import place_model
from trapo_train.models.tokenizer import end_ids, other_endings
from trapo_train.parallel.vocab_parallel import own_micro_batches
from trapo_train.parallel.world import World
from trapo_train.random_states import keep_generators, restore_rng_state, rng_state, seed_generators
from trapo_train.records import Problem, Sample
from trapo_train.reports.status import Tell, silent
from trapo_train.rewards.functions import load_reward
from trapo_train.rollouts.plans import ONE_TRACE, DeferredProblems, Plan, PlanConfig, build_plan
from trapo_train.rollouts.refill import sample_with_refill
from trapo_train.rollouts.rollout import RolloutResult, merge_results, run_plans
from trapo_train.run.continuation import about_dates, set_learning_rate, split_settings, what_changed
from trapo_train.run.undo import Undo
from trapo_train.step.advantages import assign_advantages, assign_prefix_weights
from trapo_train.step.chooser import ChooserError, apply_choice, load_chooser
from trapo_train.step.objective import build_objective, extreme_objectives, scheduled_options
from trapo_train.step.optimizer import build_optimizer, build_scheduler
from trapo_train.step.optimizer_step import optimizer_step
from trapo_train.step.packing import pack
from trapo_train.step.updates import merge_updates, split_groups, with_old_policy, with_reference
from trapo_train.tasks import tokenizer_of


class Trainer:
    """Everything a run consists of, and its state: model, optimizer, schedule, order of the problems, random states.

    Building one loads data and model and checks that they fit together. `trains`: false where no step will be taken. `rejected`:
    see `load_problems`. `tell` gets a line before what takes a while, `progress` how far it is, on the first rank.

    Raises: UserError for what cannot be trained, with rule, actual value and remedy.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        trains: bool = True,
        rejected: Collection[Place] | None = None,
        tell: Tell = silent,
        progress: Tell = silent,
    ) -> None:
        self.config = config
        self.world = World(config.parallel)
        tell = tell if self.world.first else silent
        self.progress = progress if self.world.first else silent
        seed_generators(self._rank_seed(0))  # for what draws in rewards and choosers
        self.step, self.evaluated_at, self.skipped_in_a_row = 0, -1, 0
        self.notes: list[str] = []
        self.chooser = load_chooser(config.objective.chooser) if config.objective.chooser else None
        self.deferred = DeferredProblems(config.plan.setting("buffer_size"))
        self.reward = load_reward(config.reward)
        extremes = extreme_objectives(config.objective)  # refuses what no schedule may reach before anything is loaded
        preflight.check_objective(config, self.objective)
        check_places(config.model)
        build_optimizer(nn.Linear(1, 1, bias=False), config.optimizer)  # one's own had not been asked for
        task_tokenizer = tokenizer_of(config.data.task)
        tell(f"loading {config.model.name_or_path or 'a model from scratch'}")
        with name_model_in_hub_errors(config.model):
            self.model, self.tokenizer = self._load_model(task_tokenizer, tell=self.notes.append)
        note = other_endings(self.model, self.tokenizer) if config.model.eos_token is None else None
        self.notes += [note] if note else []
        read = [str(config.data.path or config.data.task)] * trains + ["the held-out sets"] * (config.eval_data is not None)
        tell(f"reading {' and '.join(read)}")
        ends = end_ids(config.model.eos_token, self.model, self.tokenizer)
        with self.world.together():
            self.eval_sets = load_eval_sets(config.held_out, config.evaluation, self.tokenizer, ends, self.world, self.progress)
            self.problems = self._load_problems(ends, rejected)
        self.notes += advice(config, self.objective, self.problems.traces, self.world)
        self.config = config = config.for_problems(len(self.problems))
        self.notes += loading_notes(self.eval_sets, config.rollout.max_response_tokens, self.data_report if trains else None)
        self.notes += trained_too(self.eval_sets, self.problems) if trains else []
        held_out = {entry.problems.section: entry.problems for entry in self.eval_sets.values()}
        preflight.check_lengths(config, self.model, self.problems if trains else None, list(held_out.values()))
        trained = {"data": self.problems} if trains else {}
        preflight.check_token_ids(self.model, self.tokenizer, trained | held_out)
        judged = trained | (held_out if config.evaluation.sample else {})
        preflight.check_reward(self.reward, judged)
        self.notes += preflight.about_solutions(self.reward, judged)
        place_model(self.model, self.world)
        with_reference = any("ref_logprob" in objective.reads() for objective in extremes)
        self.reference = self._load_reference(task_tokenizer) if with_reference else None
        torch.manual_seed(self._rank_seed(0))  # loading has seeded it, on every rank alike
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, steps=config.steps * config.updates.per_step)
        self.engine = build_engine(config, self.model, self.tokenizer, self.world, seed=self._rank_seed(0))
        self.undo = Undo(self.optimizer, self.scheduler)
        self.order = ProblemOrder(len(self.problems), config.seed)
        self.score_before: float | None = None  # what the evaluation of step 0 found
        self.last_metrics: dict[str, Any] = {}
        self.last_evaluation: dict[str, dict[str, float]] = {}
        self.last_groups: list[list[Sample]] = []
        self.last_micro_batches: list[MicroBatch] = []

    def _load_model(
        self, task_tokenizer: PreTrainedTokenizerBase | None, **options: Any
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, with values on the first rank alone, and its tokenizer; what keeps a rank from it, every rank raises."""
        placed = {"task_tokenizer": task_tokenizer, "seed": self.config.seed, "device": self.world.device}
        loaded: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = []

        def load() -> None:
            loaded.append(load_model_and_tokenizer(self.config.model, weights=self.world.first, **placed, **options))

        with self.world.together():
            self.world.attempt(load, Exception)
        return loaded[0]

    def _load_reference(self, task_tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        """The model as it is before any step, of its own; with LoRA the model, which is that without its adapters."""
        if self.config.model.lora is not None:
            return self.model
        reference = self._load_model(task_tokenizer, check_logits=False)[0]
        hold_frozen(reference.requires_grad_(False).eval(), DTYPES[self.config.model.dtype])
        place_model(reference, self.world)  # loaded once the model is placed: no rank holds two whole ones
        return reference

    @property
    def objective(self) -> Objective:
        """The configured objective as its schedules have it at this step."""
        return build_objective(self.config.objective, self.step)

    @property
    def plan(self) -> Plan:
        """The configured plan as it draws at this step."""
        return self._built(self.config.plan)

    def _built(self, plan: PlanConfig) -> Plan:
        return build_plan(plan, step=self.step, seed=self.config.seed)

    def train_step(self) -> dict[str, Any]:
        """Sample, score and learn from the next problems; returns the metrics of the step. What it raises before it updates the
        weights leaves all state as it was (see `Undo`), and in sampling every rank raises it."""
        with self.undo.step(self.order, self.deferred, self.chooser, self.engine):
            return self._train_step()

    def _train_step(self) -> dict[str, Any]:
        config = self.config
        started = time.perf_counter()
        positions, plan, objective = self._next()
        rounds = config.plan.refill
        sample = partial(self._sample, plan)
        positions, rollout = sample_with_refill(positions, sample, self.order, rounds, config.advantage, objective)
        self.deferred.add(positions[i] for i in rollout.deferred)
        assign_advantages(rollout.groups, config.advantage)
        for group in rollout.groups:
            assign_prefix_weights(group)
        sampled = time.perf_counter()
        update = self._update(rollout.groups, objective)
        ended = time.perf_counter()
        scheduled = {f"objective/{name}": value for name, value in scheduled_options(config.objective, self.step).items()}
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update["skipped_step"] == config.updates.per_step else 0
        self.last_groups = rollout.groups
        self.last_metrics = {
            **{name: float(value) for name, value in rollout.metrics.items()},  # a reward's own: all that follows wins
            "step": self.step,
            **update,
            **scheduled,
            "epoch": self.order.passes,
            "tokens_per_s": rollout.metrics["response_tokens"] / (ended - started),
            "peak_memory_mib": self.world.peak_memory_mib(),
            "time/rollout_s": sampled - started,
            "time/update_s": ended - sampled,
        }
        if rounds:
            self.last_metrics |= {"rollout/groups_sampled": len(rollout.sampled), "rollout/groups_trained": len(rollout.groups)}
        if self.deferred.size is not None:
            self.last_metrics["deferred"] = len(self.deferred)
        return self.last_metrics

    def _update(self, groups: list[list[Sample]], objective: Objective) -> dict[str, Any]:
        """Take the optimizer steps on the samples of a rollout step."""
        config = self.config
        mini_batches = []
        for samples in split_groups(groups, config.updates.mini_batches):
            longest = config.rollout.max_response_tokens
            packed = pack(samples, config.packing, objective, max_response_tokens=longest, ranks=self.world.size)
            mine = own_micro_batches(packed, self.world)
            mine = with_old_policy(self.model, mine, objective, config.updates, config.rollout.temperature)
            mini_batches.append(with_reference(self.reference, mine, objective, config.rollout.temperature))
        self.last_micro_batches = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch]
        return merge_updates(
            [
                optimizer_step(
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    micro_batches,
                    objective,
                    config.rollout.temperature,
                    config.optimizer.max_grad_norm,
                    self.world,
                )
                for _ in range(config.updates.epochs)
                for micro_batches in mini_batches
            ]
        )

    def _sample(self, plan: PlanConfig, positions: list[int]) -> RolloutResult:
        """The samples of the problems at `positions`; each rank generates for its share and hands its samples to the others.

        Raises: what reading, sampling or a reward raises on any rank, on every rank.
        """
        problems: list[Problem] = []

        def read() -> bool:
            problems.extend(self.problems[i] for i in self.world.share(positions))
            return any(not problem.experts for problem in problems)

        # What has no trace is sampled, whatever the plan; expert traces alone need no gathered model and no export.
        generates = any(self.world.attempt(read, Exception)) or plan.largest_request > 0

        def sampled() -> RolloutResult:
            return run_plans(problems, self._built(plan), self.engine, self.reward, self.tokenizer, self.config.rollout)

        with self.ready_to_generate() if generates else nullcontext():  # which all ranks leave in one way
            return merge_results(self.world.attempt(sampled, Exception))

    @contextmanager
    def ready_to_generate(self) -> Iterator[None]:
        """Inside, the engine samples from the weights as they are now; every rank must enter."""
        free_kept_memory()
        with ready_to_generate(self.engine, self.model, self.tokenizer, self.world, step=self.step):
            yield

    def _rank_seed(self, step: int) -> int:
        """Of this rank's engine and global generators; `step` > 0 for a run that resumes on another number of ranks."""
        return rank_seed(self.config.seed, step, self.world.size, self.world.rank)

    def _next(self) -> tuple[list[int], PlanConfig, Objective]:
        """Positions of the problems of the next step, how they are sampled, and the loss.

        Where it trains expert terms alone, for enough deferred problems or by the chooser, an expert trace replaces the samples.
        """
        positions = self.deferred.take()
        choice = "expert" if positions else "both"
        if not positions:
            positions = self.order.next(self.config.prompts_per_step)
            if self.chooser is not None:
                # The first rank's answer: each sees other times and has random states of its own.
                choice = self.world.attempt(self._ask_chooser, ChooserError)[0]
        objective = self._chosen(choice)
        alone = choice != "both" and not objective.rollout_terms
        traces = alone and self.config.plan.largest_request > 0
        return positions, PlanConfig("ladder", rungs=ONE_TRACE) if traces else self.config.plan, objective

    def _chosen(self, choice: str) -> Objective:
        kl = self.config.objective.kl
        return apply_choice(choice, self.objective, None if kl is None else kl.term())

    def _ask_chooser(self) -> str:
        try:
            choice = self.chooser(self.step, self.last_metrics)
            preflight.check_choice(self._chosen(choice), self.config, has_reference=self.reference is not None)
        except Exception as error:  # a chooser is the user's code: whatever it raises must not lose the run
            name = self.config.objective.chooser
            raise ChooserError(f"objective.chooser {name!r} failed at step {self.step}: {error!r}") from error
        return choice

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and has not been: every k steps, the start included, and at the end."""
        if not self.eval_sets or self.evaluated_at == self.step:
            return False
        every = self.config.evaluation.every
        return self.step >= self.config.steps or (every > 0 and self.step % every == 0)

    def evaluate(self, label: str | None = None, stopped: Callable[[], bool] = never) -> dict[str, dict[str, float]]:
        """The metrics of each set of held-out problems (see `held_out`), by its name; leaves all random states as they are. Every
        rank must call it and gets the same. `label`: in the names of what it writes, by default the step. `stopped`: see there."""
        with keep_generators():  # rewards may draw from them
            self.last_evaluation = evaluate_sets(self, label or f"step_{self.step:08d}", stopped)
        self.evaluated_at = self.step
        self.score_before = self.score if self.step == 0 else self.score_before
        return self.last_evaluation

    def close(self) -> None:
        """Give back the engine and leave the process group, together with the other ranks."""
        self.world.barrier()
        self.engine.close()
        self.world.close()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run must share with this one to continue it: the configuration, except what may change, and the data."""
        return {"config": split_settings(self.config)[0], "data": self.data_fingerprint[:16]}

    def save(self, store: CheckpointStore) -> Path:
        """Write all state of the run; every rank calls this and writes its shards. See `CheckpointStore.save`."""
        tensors, training = training_state(self.model, self.optimizer)
        order = self.order.state_dict()
        order["remaining"] = order["remaining"].clone()  # a view, of which torch.save would write the whole epoch
        state = {
            "step": self.step,
            "evaluated_at": self.evaluated_at,
            "skipped_in_a_row": self.skipped_in_a_row,
            "training": training,
            "scheduler": self.scheduler.state_dict(),
            "order": order,
            "deferred": self.deferred.state_dict(),
            "chooser": self.chooser.state_dict() if hasattr(self.chooser, "state_dict") else {},
            "last_metrics": self.last_metrics,
            "last_evaluation": self.last_evaluation,
            "settings": split_settings(self.config)[1],
            "ranks": self.world.gather({"engine": self.engine.state_dict(), "rng": rng_state()}),
        }
        return store.save(self.step, state, self.fingerprint, tensors, self.score, self.score_before)

    @property
    def score(self) -> float | None:
        """How good the evaluation of this step found the model, None where there was none."""
        return evaluation_score(self.last_evaluation) if self.evaluated_at == self.step else None

    def resume(self, store: CheckpointStore) -> bool:
        """Take over the newest checkpoint of `store`, to continue exactly where it was saved; False where there is none."""
        found = store.load(self.fingerprint, about_dates(self.tokenizer, self.config.data))
        if found is None:
            return False
        step, state = found
        for name in ("step", "evaluated_at", "skipped_in_a_row", "last_metrics", "last_evaluation"):
            setattr(self, name, state[name])
        self.score_before = store.score_before() if step else self.score
        load_training_state(self.model, self.optimizer, state["training"], store, step)
        for name in ("scheduler", "order", "deferred"):
            getattr(self, name).load_state_dict(state[name])
        if hasattr(self.chooser, "load_state_dict"):
            self.chooser.load_state_dict(state["chooser"])
        if len(state["ranks"]) == self.world.size:
            own = state["ranks"][self.world.rank]
            self.engine.load_state_dict(own["engine"])
            restore_rng_state(own["rng"])
        else:  # no state fits: every rank draws anew, from seeds that no other start of this run has used
            self.engine.reseed(self._rank_seed(self.step))
            seed_generators(self._rank_seed(self.step))
            self.notes.append(f"saved by {len(state['ranks'])} ranks, continued by {self.world.size}: new random states")
        self.notes.append(f"resumed from step {self.step}")
        changed = what_changed(state["settings"], split_settings(self.config)[1])
        if changed:
            set_learning_rate(self.optimizer, self.scheduler, self.config.optimizer.learning_rate)
            self.notes.append(changed)
        return True

    def _load_problems(self, ends: Sequence[int], rejected: Collection[Place] | None) -> ProblemSet:
        """The training problems; expert traces and problems that cannot be used are left out and noted."""
        how = {"correct_by": self.config.rollout.correct_by, "end_ids": ends, "world": self.world, "rejected": rejected}
        how["progress"] = self.progress
        loaded = load_problems(self.config.data, self.tokenizer, self.reward, **how)
        self.data_report, self.data_fingerprint = loaded.report, loaded.fingerprint
        longest = self.config.rollout.max_response_tokens
        problems, dropped = loaded.without_long_experts(longest)
        if dropped:
            self.notes.append(f"left out {dropped} expert traces longer than rollout.max_response_tokens = {longest}")
        experts = len(problems.with_experts())
        preflight.check_traces(self.config, problems)
        if self.deferred.size is not None and experts < self.deferred.size:
            self.notes.append(
                f"no step will train on expert traces: it waits for {self.deferred.size} unsolved problems (buffer_size of plan "
                f"{self.config.plan.name}), and {experts} have a trace"
            )
        if not self.objective.rollout_terms:
            kept = problems.with_experts()
            if len(kept) < len(problems):
                self.notes.append(f"left out {len(problems) - len(kept)} problems without an expert trace")
            problems = kept
        return problems
