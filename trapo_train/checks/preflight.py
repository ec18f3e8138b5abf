"""What must be there and fit together before the first rollout: objective, plan, problems, model and disk."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo_kernels import Objective
from trapo_train.checkpoints.checkpoint import CheckpointStore
from trapo_train.config import RunConfig
from trapo_train.data.problems import RESERVED_COLUMNS, ProblemSet
from trapo_train.engines.vllm_server import longest_of_server
from trapo_train.models.attention import longrope_limit
from trapo_train.models.model import policy_head
from trapo_train.rewards.functions import RewardFn, WeightedSum
from trapo_train.rewards.grading import WorkerReward
from trapo_train.rewards.reward_checks import check_takes, names
from trapo_train.schema import UserError
from trapo_train.step.optimizer import OptimizerConfig, build_optimizer
from trapo_train.step.packing import check_expert_streams, check_prompt_training

logger = logging.getLogger(__name__)


def check_objective(config: RunConfig, objective: Objective) -> None:
    """Raise UserError for an objective that the samples of the configured plan cannot train, and for a reward that is missing."""
    plan = config.plan
    if not objective.rollout_terms and not plan.guides:
        raise UserError(
            f"objective {objective.name} trains on expert tokens alone, and plan {plan.name} has none. "
            "Use plan.name=sft, or an objective for rollouts such as dr_grpo."
        )
    _check_is_trained(config, objective)
    drawn = sum(rung.samples for rung in plan.rungs) if plan.name == "ladder" else plan.setting("num_samples")
    single = drawn == 1 and plan.name in ("grpo", "ladder")
    if single and not objective.expert_terms and config.advantage.center != "none":
        raise UserError(
            "plan must draw at least 2 samples of a problem for a baseline among them, got 1, whose advantage is always 0. "
            "Raise plan.num_samples, add rungs, or set advantage.center=none."
        )
    if plan.setting("buffer_size") is not None and not objective.expert_terms:
        raise UserError(
            f"plan {plan.name} has steps on expert traces alone, and objective {objective.name} does not train on them. "
            "Use an objective with an expert term such as relift, or plan.name=grpo."
        )
    if config.updates.correction is not None and not objective.rollout_terms and config.objective.chooser is None:
        raise UserError(
            f"updates.correction corrects rollout tokens for their sampler, got {config.updates.correction.name} with objective "
            f"{objective.name}, which trains on expert tokens alone. Set updates.correction=null, or use an objective for rollouts."
        )
    if plan.guides:
        check_expert_streams(objective)
    check_prompt_training(config.packing, objective)
    if config.packing.train_on_prompt and plan.largest_request:
        raise UserError(
            f"packing.train_on_prompt needs a plan that samples nothing, got {plan.name}, each of whose samples would train its "
            "prompt once more. Set packing.train_on_prompt=false, or plan.name=sft."
        )
    if not objective.rollout_terms and plan.largest_request == 0 and config.objective.chooser is None:
        _check_nothing_is_compared(config)
    _check_is_judged(config, objective)


def check_choice(objective: Objective, config: RunConfig, *, has_reference: bool) -> None:
    """Raise UserError for an objective that a chooser chose and this run, its model and plan built, cannot train a step with."""
    if "ref_logprob" in objective.reads() and not has_reference:
        raise UserError(
            f"objective.chooser chose {objective.name}, which reads the logprobs of the model before training; it is kept "
            f"only for an objective.name that reads them too, got {config.objective.name}. Choose another, or set such an "
            "objective.name."
        )
    if config.plan.guides or not objective.rollout_terms:  # which takes the traces
        check_expert_streams(objective)
    check_prompt_training(config.packing, objective)
    _check_is_trained(config, objective)
    _check_is_judged(config, objective)


def _check_is_trained(config: RunConfig, objective: Objective) -> None:
    """Raise UserError for an objective of rollouts alone where the plan samples none."""
    if not objective.expert_terms and config.plan.largest_request == 0:
        raise UserError(
            f"plan {config.plan.name} samples nothing, and objective {objective.name} does not train on expert tokens. "
            "Use an objective with an expert term such as sft, or a plan with rollouts such as grpo."
        )


def _check_nothing_is_compared(config: RunConfig) -> None:
    """Raise UserError for settings of sampled responses where there are none."""
    sections = {
        "advantage": (config.advantage, ("normalise", "baseline", "center")),
        "rollout": (config.rollout, ("on_truncated", "temperature")),  # which would divide the logits of the traces, too
    }
    for section, (values, settings) in sections.items():
        for name in settings:
            value, default = getattr(values, name), getattr(type(values)(), name)
            if value != default:
                raise UserError(
                    f"{section}.{name} must be {default} with plan {config.plan.name} and objective {config.objective.name}, which "
                    f"train on expert traces alone, got {value}: nothing reads it. Leave it out."
                )


def _check_is_judged(config: RunConfig, objective: Objective) -> None:
    """Raise UserError where responses are judged and there is no reward."""
    plan, remedy = config.plan, ""
    if config.reward is not None:
        return
    if plan.largest_request:
        reader = f"plan {plan.name} samples responses"
    elif objective.rollout_terms:
        reader = f"objective {objective.name} trains on rollouts too, which plan {plan.name} draws for problems without a trace"
    elif config.data.on_rejected_expert == "drop":
        reader, remedy = "data.on_rejected_expert=drop asks it about traces", ", or data.on_rejected_expert=keep"
    elif config.eval_data is not None and config.evaluation.sample:
        reader, remedy = "evaluations sample responses", ", or evaluation.sample=false to report the loss of expert traces alone"
    else:
        return
    raise UserError(
        f"reward must be set where responses are judged, got null: {reader}. Set reward=math_verify, exact_match or "
        f"my_rewards:my_reward{remedy}."
    )


def check_reward(reward: RewardFn | WeightedSum | None, problems: Mapping[str, ProblemSet]) -> None:
    """Raise UserError for a reward with an argument that it needs and `problems`, by the section of the data, do not bring, or one
    in a worker with a column that cannot be sent there."""
    if reward is None:
        return
    terms = _terms(reward)
    given = {
        section: [name for name in (*RESERVED_COLUMNS, *entry[0].columns) if name != "solution" or entry.has_solutions]
        for section, entry in problems.items()
    }
    check_takes(terms, given, {section: entry.passed_as for section, entry in problems.items()})
    for section, entry in problems.items():
        for term in terms.values():
            if isinstance(term, WorkerReward):
                term.sent(entry[0].columns)
        for column in entry.report.unread_columns:
            logger.warning("%s: rewards do not get the column %r, they have an argument of that name; rename it", section, column)


def _terms(reward: RewardFn | WeightedSum) -> dict[str, RewardFn]:
    """The rewards of a sum by name, or the one."""
    if isinstance(reward, WeightedSum):
        return {name: term for name, term, _ in reward.terms}
    return {getattr(reward, "__name__", type(reward).__name__): reward}


def about_solutions(reward: RewardFn | WeightedSum | None, problems: Mapping[str, ProblemSet]) -> list[str]:
    """Sentences on problems without a solution, by the section of the data, where a reward has that argument by name."""
    terms = {} if reward is None else _terms(reward)
    readers = " and ".join(name for name, term in terms.items() if names(term, "solution"))
    missing = {section: entry.report.without_solution for section, entry in problems.items()}
    return [
        f"{section}: {count} of {problems[section].report.problems} problems have no solution, which the reward {readers} takes: "
        "where it has no opinion (None), samples count as 0. Leave such rows out, or set solution_column to the answers"
        for section, count in missing.items()
        if count and readers
    ]


def check_traces(config: RunConfig, problems: ProblemSet) -> None:
    """Raise UserError for a plan that takes expert traces, of which the `problems` have none."""
    if not config.plan.guides or any(problems.traces):
        return
    if config.data.prompt_column == config.data.expert_column:
        holds = "have conversations end with what the assistant says"
    else:
        holds = "set data.expert_column to the column that holds them"
    rejected = f" that the reward accepts ({len(problems.rejected)} were dropped)" if problems.rejected else ""
    instead = "" if config.reward is None else ", or use plan.name=grpo with an objective for rollouts such as dr_grpo"
    raise UserError(
        f"plan {config.plan.name} takes expert traces, and none of the {len(problems)} problems has an expert trace of at most "
        f"rollout.max_response_tokens = {config.rollout.max_response_tokens}{rejected}. {holds[0].upper()}{holds[1:]}, or raise "
        f"rollout.max_response_tokens{instead}."
    )


def check_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Mapping[str, ProblemSet]) -> None:
    """Raise UserError for a token in `problems`, by the section of the data, that the model has no embedding for.

    All of them are tokenised once more for that, but only where the tokenizer has such tokens.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) < embeddings:
        return
    remedy = "Remove it from the data, or set model.tokenizer to the one the model was trained with."
    for section, entry in problems.items():
        for problem in entry:
            texts = {"prompt": problem.prompt_ids} | {"expert trace": [i for expert in problem.experts for i in expert.token_ids]}
            for what, token_ids in texts.items():
                found = next((token_id for token_id in token_ids if token_id >= embeddings), None)
                if found is not None:
                    raise UserError(
                        f"{section}: the model must have an embedding for every token, it has {embeddings}; the {what} of problem "
                        f"{problem.index} has {tokenizer.convert_ids_to_tokens(found)!r}, token {found}. {remedy}"
                    )


def check_lengths(config: RunConfig, model: PreTrainedModel, problems: ProblemSet | None, held_out: Sequence[ProblemSet]) -> None:
    """Raise UserError unless the longest prompts of training and evaluation, in tokens, fit with their responses into engine and
    model, and what the model scores of them into micro-batch and model. `problems`: None where nothing is trained."""
    rollout, own = config.rollout, config.evaluation.max_response_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    packing, short = {"packing.max_tokens": config.packing.max_tokens}, longrope_limit(model.config)
    model_limit = {
        "the model's positions (of one from scratch model.scratch.max_position)": positions,
        "the short factors of the model's LongRoPE (a longer sequence gives those beside it the long ones)": short,
    }
    name, limit = _engine_limit(config)
    if rollout.engine != "transformers":
        _check_vllm_takes_short_factors(name, limit, short)
    engine = {name: limit, **model_limit}
    longest = rollout.max_response_tokens
    if problems is not None and (config.plan.largest_request or not all(problems.traces)):
        sizes = problems.longest_prompt_tokens, longest
        _check_fits("prompt and", "rollout.max_response_tokens", sizes, packing | engine, problems.section)
    elif problems is not None:  # nothing is sampled
        traces = "prompt and its expert trace of at most"
        sizes = problems.longest_with_expert(longest)
        _check_fits(traces, "rollout.max_response_tokens", sizes, packing | model_limit, problems.section)
    for entry in held_out:
        if config.evaluation.sample:
            setting = f"{'rollout' if own is None else 'evaluation'}.max_response_tokens"
            _check_fits("held-out prompt and", setting, (entry.longest_prompt_tokens, own or longest), engine, entry.section)
        traces = "held-out prompt and its expert trace of at most"
        sizes = entry.longest_with_expert(longest)
        _check_fits(traces, "rollout.max_response_tokens", sizes, packing | model_limit, entry.section)


def _engine_limit(config: RunConfig) -> tuple[str, int | None]:
    """What limits a prompt with its response in the engine, and to how many tokens, None for no limit.

    Raises: EngineError for a vLLM server that does not answer or does not offer the model.
    """
    rollout = config.rollout
    if rollout.engine == "vllm_server":
        return "the vLLM server's --max-model-len", longest_of_server(rollout.vllm_server, config.model.name_or_path)
    if rollout.engine == "vllm":
        return "rollout.vllm.max_model_len", rollout.vllm.max_model_len
    return "rollout.max_batch_tokens", rollout.max_batch_tokens


def _check_vllm_takes_short_factors(setting: str, longest: int | None, short: int | None) -> None:
    """Raise UserError where vLLM would sample from a model with LongRoPE's long factors, which it takes for all or no sequences."""
    if short is not None and (longest is None or longest > short):
        given = "null" if longest is None else longest
        raise UserError(
            f"{setting} must be at most {short} for this model, got {given}: beyond that vLLM samples with the "
            f"long factors of its LongRoPE, and training has the short ones. Set it to {short} or less."
        )


def _check_fits(what: str, setting: str, sizes: tuple[int, int], limits: dict[str, int | None], section: str) -> None:
    for name, limit in limits.items():
        if limit is not None and sum(sizes) > limit:
            raise UserError(
                f"train: the longest {what} {setting} must fit into {name} = {limit}, got {sizes[0]} + {sizes[1]} = {sum(sizes)} "
                f"tokens. Raise that limit where it is yours, lower {setting}, or drop long prompts with "
                f"{section}.max_prompt_tokens and on_long_prompt."
            )


def check_disk(config: RunConfig, model: PreTrainedModel, store: CheckpointStore) -> str | None:
    """Raise UserError unless the disk of output_dir has room for the trained model and a checkpoint of it, without which the run
    would be lost; a note where it has no room for all that checkpoint.keep keeps."""
    output_dir = Path(config.output_dir)
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    handed_over = config.rollout.engine == "vllm_server" and config.rollout.vllm_server.sync_dir is None
    in_files = 4 + (policy_head(model).compute_dtype.itemsize if handed_over else 0)  # the model's, and beside it the server's
    exported = in_files * sum(p.numel() for p in model.parameters())
    share = _optimizer_share(config.optimizer, next(model.parameters()).device)
    checkpoint = int((1 + share) * sum(size for size, trained in sizes if trained))
    free = shutil.disk_usage(place).free + store.unfinished_bytes()  # which the next save deletes
    saved, last = len(store.steps()), config.steps in store.steps()
    if free < exported + (0 if last else checkpoint):
        raise UserError(
            f"output_dir must have room for the trained model and a checkpoint, {_size(exported)} + {_size(checkpoint)}, got "
            f"{_size(free)} free at {place}. Free space, or choose another output_dir."
        )
    keep, every = config.checkpoint.keep + config.checkpoint.keep_best, config.checkpoint.every
    coming = min(math.ceil(config.steps / every), keep + 1) if every > 0 else 0  # an old one goes when the new one is whole
    needed = exported + max(1, coming - saved) * checkpoint
    if coming and not last and free < needed:
        return (
            f"output_dir has {_size(free)} free and needs {_size(needed)} for the model and checkpoints of {_size(checkpoint)}: "
            f"{keep} of them by checkpoint.keep, and the one being written. A run that cannot save stops at its last checkpoint."
        )
    return None


def _optimizer_share(config: OptimizerConfig, device: torch.device) -> float:
    """Bytes of the optimizer's state per byte of a weight matrix, found out by a step on a small one.

    Raises: UserError for state that a checkpoint cannot hold.
    """
    matrix = nn.ParameterList([torch.zeros(256, 256, device=device)])
    matrix[0].grad = torch.zeros(256, 256, device=device)
    optimizer = build_optimizer(matrix, config)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    for value in state:
        if type(value) is not Tensor:  # of one whose data lie elsewhere (torchao's) safetensors finds nothing to write
            raise UserError(
                f"optimizer.name: the state must be plain tensors for a checkpoint to hold it, {config.name} keeps "
                f"{type(value).__name__}. Use bitsandbytes.optim:AdamW8bit for one in 8 bits."
            )
    return sum(value.nbytes for value in state) / matrix[0].nbytes


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
