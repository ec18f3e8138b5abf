"""One evaluation of a run: every set of held-out problems sampled and judged, and its expert traces scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from trapo_kernels import Role, objectives
from trapo_train.evaluation.eval_sets import EvalSet
from trapo_train.evaluation.evaluate import evaluate, never
from trapo_train.micro_batch import MicroBatch
from trapo_train.models.model import score_all
from trapo_train.models.placement import reshard
from trapo_train.parallel.vocab_parallel import own_micro_batches
from trapo_train.parallel.world import World
from trapo_train.records import Sample
from trapo_train.rollouts.rollout import RolloutConfig
from trapo_train.rollouts.samples import SAMPLES_DIR
from trapo_train.step.packing import PackingConfig, pack

if TYPE_CHECKING:
    from trapo_train.data.dataset import DataReport
    from trapo_train.data.problems import ProblemSet
    from trapo_train.trainer import Trainer

_CHUNK = 1024  # traces that are packed together


def evaluate_sets(trainer: Trainer, label: str, stopped: Callable[[], bool] = never) -> dict[str, dict[str, float]]:
    """The metrics of each set by its name: what `evaluate` and `expert_nll` return, and "dropped_prompts", the rows left out for
    a long prompt, where there are any. Every rank must call it and gets the same.

    Args:
        label: ends the names of the files of responses, evaluation.save_samples: samples/eval_<set>_<label>.jsonl.
        stopped: asked before each engine call, on each rank; where it says so to one of them, all raise EvaluationStopped.
    """
    config = trainer.config
    found: dict[str, dict[str, float]] = {name: {} for name in trainer.eval_sets}
    if config.evaluation.sample:
        with trainer.ready_to_generate():
            for name, entry in trainer.eval_sets.items():
                save_to = responses_file(config.output_dir, name, label)

                def progress(share: float, section: str = entry.problems.section) -> None:
                    trainer.progress(f"evaluating {section}: {share:.0%}")

                settings = (config.evaluation, config.rollout, trainer.world, save_to, stopped, progress)
                found[name] = evaluate(trainer.engine, entry, trainer.reward, trainer.tokenizer, *settings)
    for name, entry in trainer.eval_sets.items():
        found[name] |= expert_nll(trainer.model, entry, config.packing, config.rollout, trainer.world)
        dropped = entry.problems.report.dropped_prompts
        found[name] |= {"dropped_prompts": float(dropped)} if dropped else {}
    return found


def loading_notes(eval_sets: Mapping[str, EvalSet], longest: int, trained: DataReport | None) -> list[str]:
    """What loading each set found, how many of its expert traces are longer than `longest` tokens and not scored, and where it has
    texts as prompts that are rendered as chats, and the `trained` problems, None where nothing is trained, have not, or the other
    way round."""
    notes = []
    for entry in eval_sets.values():
        section = entry.problems.section
        report = replace(entry.problems.report, duplicates=0)  # of which there is more to say here
        notes.append(f"{section}: {report}{_repeated(entry)}")
        if dropped := entry.problems.at(entry.members).without_long_experts(longest)[1]:
            notes.append(f"{section}: left out {dropped} expert traces longer than rollout.max_response_tokens = {longest}")
        if trained is not None and bool(report.plain_prompts) != bool(trained.plain_prompts):
            notes.append(
                f"prompts of {section if trained.plain_prompts else 'data'} are rendered with the chat template, those of "
                f"{'data' if trained.plain_prompts else section} are not all: the model is evaluated on other prompts than it is "
                "trained on. Set as_chat to the same in both"
            )
    return notes


def trained_too(eval_sets: Mapping[str, EvalSet], problems: ProblemSet) -> list[str]:
    """Which sets have prompts that are among the training `problems`, and how many."""
    trained, notes = set(problems.prompt_keys), []
    for entry in eval_sets.values():
        shared = sum(key in trained for key in entry.problems.at(entry.rows).prompt_keys)
        if shared:
            section = entry.problems.section
            notes.append(f"{shared} of the {len(entry.rows)} problems of {section} are training problems, too (equal prompts)")
    return notes


def _repeated(entry: EvalSet) -> str:
    if len(entry.rows) == len(entry.members):
        return ""
    sampled = ", with as many times the samples" if max(entry.samples) > 1 else ""
    return f"; {len(entry.rows)} different ones in {len(entry.members)} rows: equal rows are one problem{sampled}"


def responses_file(output_dir: str | Path, name: str, label: str) -> Path:
    """Where an evaluation of the set `name` writes its responses."""
    return Path(output_dir) / SAMPLES_DIR / f"eval_{name}{'_' if name else ''}{label}.jsonl"


def model_label(name_or_path: str | None, revision: str | None = None) -> str:
    """What a model is called in the names of files, no two alike: owner--name of one on the hub, with --revision where that is set;
    of a directory run--model and six digits that stand for its whole path, as every trained model's directory is called model."""
    if name_or_path is None:
        return "scratch"
    path = Path(name_or_path)
    if not path.is_dir():
        return (name_or_path if revision is None else f"{name_or_path}/{revision}").replace("/", "--")
    path = path.resolve()
    return f"{'--'.join(path.parts[1:][-2:])}--{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def expert_nll(
    model: PreTrainedModel, eval_set: EvalSet, packing: PackingConfig, rollout: RolloutConfig, world: World | None = None
) -> dict[str, float]:
    """Score the expert traces of a set under the current policy; nothing is sampled, and no random state changes.

    Traces of equal rows count once; those longer than rollout.max_response_tokens are left out, as in training.

    Args:
        packing: its max_tokens.
        rollout: its max_response_tokens.
        world: the ranks that call this together, each on its share of the traces; None for a single process.

    Returns: "expert_nll", nats per token of the model as it is (temperature 1), mean over all tokens of the traces with the
        end-of-sequence token, the same for any number of ranks but for rounding; "expert_traces", how many. Empty for a set without
        traces.
    """
    world = world or World.alone()
    total, tokens, count = 0.0, 0, 0
    traces = _traces(eval_set, rollout.max_response_tokens)
    training = model.training
    model.eval()  # without the dropout of LoRA
    while chunk := list(islice(traces, _CHUNK)):
        count += len(chunk)
        mine = _share(chunk, packing, rollout, world)
        for micro_batch, logprob in zip(mine, score_all(model, mine, temperature=1.0), strict=True):
            expert = micro_batch.batch.role == Role.EXPERT
            total -= logprob[expert].double().sum().item()
            tokens += int(expert.sum())
    model.train(training)
    reshard(model)
    if not count:
        return {}
    # With a vocabulary-parallel head every rank has seen the tokens of all ranks already.
    parts = [(total, tokens)] if world.vocab_parallel_head else world.gather((total, tokens))
    return {"expert_nll": sum(part for part, _ in parts) / sum(part for _, part in parts), "expert_traces": float(count)}


def _share(chunk: list[Sample], packing: PackingConfig, rollout: RolloutConfig, world: World) -> list[MicroBatch]:
    """The micro-batches of this rank, as many as those of any other."""
    settings = PackingConfig(packing.max_tokens, "token_mean")
    packed = pack(chunk, settings, objectives.sft(), max_response_tokens=rollout.max_response_tokens, ranks=world.size)
    return own_micro_batches(packed, world)


def _traces(eval_set: EvalSet, longest: int) -> Iterator[Sample]:
    """The expert traces of at most `longest` tokens, those of equal rows once."""
    seen: set[int] = set()
    for row in eval_set.members:
        problem = eval_set.problems[row]
        for trace in problem.experts:
            key = hash((problem.prompt_ids, trace.token_ids))
            if len(trace.token_ids) <= longest and key not in seen:
                seen.add(key)
                yield Sample(problem, 1, 1.0, trace.token_ids, (), (), "expert")
