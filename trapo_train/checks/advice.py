"""What a run says of its settings before it starts: all of them are legal, and some are probably not what was meant."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from trapo_kernels import Objective, gates, objectives
from trapo_train.config import RunConfig
from trapo_train.evaluation.eval_sets import section_of
from trapo_train.parallel.world import World
from trapo_train.schema import changed
from trapo_train.step.objective import extreme_objectives
from trapo_train.step.optimizer import OptimizerConfig

MANY_PASSES = 10
_FOR_LATER = {("evaluation", "every"), ("evaluation", "sample"), ("evaluation", "group_by")}


def advice(config: RunConfig, objective: Objective, traces: Sequence[int], world: World) -> list[str]:
    """Sentences on what may surprise in this configuration, each with the setting that changes it.

    Args:
        traces: how many expert traces each of the training problems has.
    """
    num_problems = len(traces)
    given_epochs, config = config.epochs is not None, config.for_problems(num_problems)
    found = [
        _method(config),
        _scale(config, objective),
        _unguided(config, objective),
        _untrained(config, objective),
        _unclipped(config, objective),
        _unheld(objective),
        _without_beta(config),
        _uncorrected(config, objective),
        _truncated(config, objective),
        _warmup(config),
        _adapters(config),
        _repeats(config, num_problems),
        None if given_epochs else _passes(config, objective, num_problems),
        _unused_traces(config, traces),
        _correct(config),
        _unsampled(config),
        *_unread(config),
        *_rendered(config),
        _unsaved(config),
        _engine(config, world),
        _full_precision(config, world),
        _launcher(world),
    ]
    return [sentence for sentence in found if sentence is not None]


def _method(config: RunConfig) -> str | None:
    """An objective is a method's ratio loss alone; its advantages and its normaliser are settings of their own."""
    method = objectives.PUBLISHED.get(config.objective.name)
    if method is None:
        return None
    if method.critic:
        return f"{config.objective.name} as published has a critic's advantages (GAE); there is none here, they are the group's"
    settings = {
        "advantage.normalise": (method.normalise, config.advantage.normalise),
        "advantage.center": (method.center, config.advantage.center),
        "advantage.baseline": (method.baseline, config.advantage.baseline),
        "packing.aggregation": (method.aggregation, config.packing.aggregation),
    }
    other = {name: pair for name, pair in settings.items() if pair[0] not in (None, pair[1])}
    if not other:
        return None
    published = " ".join(f"{name}={wanted}" for name, (wanted, _) in other.items())
    here = ", ".join(actual for _, actual in other.values())
    return f"{config.objective.name} as published has {published}; this run has {here}"


def _scale(config: RunConfig, objective: Objective) -> str | None:
    aggregation, longest = config.packing.aggregation, config.rollout.max_response_tokens
    if objective.rollout_terms or aggregation not in ("constant", "length"):
        return None
    return (
        f"packing.aggregation={aggregation} divides the loss by max_response_tokens = {longest} for each sequence, whatever its "
        "length: loss and gradient are no means over tokens. For those set packing.aggregation=token_mean"
    )


def _unguided(config: RunConfig, objective: Objective) -> str | None:
    if config.plan.name != "sft" or not objective.rollout_terms:
        return None
    return (
        f"objective {objective.name} trains on rollouts too, so plan sft samples the problems that have no expert trace. Leave "
        "them out with objective.name=sft"
    )


def _untrained(config: RunConfig, objective: Objective) -> str | None:
    """Sampling is most of a step's time."""
    plan = config.plan
    if objective.rollout_terms or objective.kl is not None or config.objective.chooser is not None or not plan.largest_request:
        return None
    return (
        f"objective {objective.name} trains on expert tokens alone: of what plan {plan.name} samples at most the rewards count, "
        "for how much of a trace is given. Set plan.name=sft to train on whole traces and sample nothing, or an objective that "
        "trains on rollouts too, such as trapo"
    )


def _unclipped(config: RunConfig, objective: Objective) -> str | None:
    """Every update moves the policy away from the one that sampled, and an unbounded ratio goes along however far."""
    free = [
        term
        for term in objective.rollout_terms
        if isinstance(term.gate, gates.Ratio | gates.One)
        and not math.isfinite(getattr(term.reduction, "clip", math.inf))  # GMPO's is
    ]
    updates = config.updates.per_step
    if updates == 1 or not free:
        return None
    return (
        f"{updates} updates per rollout step, and the rollout loss of {objective.name} ({free[0].gate}) does not clip: "
        "nothing holds the policy near the one that sampled. Set updates.mini_batches=1 updates.epochs=1, or an objective "
        "that clips, such as dr_grpo, or chord_mu with expert terms"
    )


def _unheld(objective: Objective) -> str | None:
    """An estimate of the KL is not a loss for it (`trapo_kernels.KL`)."""
    if objective.kl is None or objective.kl.estimator != "k1":
        return None
    return (
        "the KL estimator k1 pushes every token alike, whatever the model before training makes of it: over the policy's own "
        "samples its gradient is zero in expectation, noise that holds nothing. Set the estimator k2, or k3_corrected, whose "
        "gradient is the KL's after several updates, too"
    )


def _without_beta(config: RunConfig) -> str | None:
    """A preset reads these options for its KL alone; a function of the user's own may do what it likes with them."""
    section = config.objective
    given = " ".join(f"{name}={section.options[name]}" for name in ("kl", "kl_clamp", "kl_cap") if name in section.options)
    if not given or section.name not in objectives.PRESETS or any(extreme.has_kl for extreme in extreme_objectives(section)):
        return None
    return f"objective.options has {given}, and no KL at any step, because beta is 0. Set beta above 0, or leave them out"


def _uncorrected(config: RunConfig, objective: Objective) -> str | None:
    """The embedded engine computes with the trainer's own model."""
    if config.rollout.engine == "transformers" or not objective.rollout_terms or config.updates.correction is not None:
        return None
    return (
        f"rollout.engine={config.rollout.engine} computes logprobs in another arithmetic than the trainer, and the loss takes its "
        "samples as the trainer's own (rollout/mismatch_kl says how far they are). Set updates.correction={name: tis} to correct it"
    )


def _truncated(config: RunConfig, objective: Objective) -> str | None:
    """vLLM's processed logprobs are taken after top_k and top_p (its TopKTopPSampler); those of the embedded engine before."""
    rollout, correction = config.rollout, config.updates.correction
    cut = [f"top_p={rollout.top_p:g}"] * (rollout.top_p < 1) + [f"top_k={rollout.top_k}"] * (rollout.top_k > 0)
    if not objective.rollout_terms or rollout.engine == "transformers" or not cut:
        return None
    wrong, remedy = "rollout/mismatch_kl holds the share that was cut off, too", ""
    if correction is not None:
        wrong = f"every ratio of updates.correction={correction.name} is lower by the share that was cut off"
        remedy = ", or updates.correction=null"
    return (
        f"rollout.engine={rollout.engine} reports logprobs over the tokens that {' and '.join(cut)} leave, the trainer's are over "
        f"all: {wrong}. Set rollout.top_p=1 rollout.top_k=0{remedy}"
    )


def _warmup(config: RunConfig) -> str | None:
    warmup, updates = config.optimizer.warmup_steps, config.steps * config.updates.per_step
    if warmup < updates:
        return None
    return (
        f"optimizer.warmup_steps = {warmup} is not below the {updates} optimizer steps of the run: the learning rate never reaches "
        "its peak. Lower it, or raise steps"
    )


def _adapters(config: RunConfig) -> str | None:
    rate = config.optimizer.learning_rate
    if config.model.lora is None or rate != OptimizerConfig.learning_rate:
        return None
    return (
        f"optimizer.learning_rate = {rate:g} is the default, which is for whole weights; LoRA's adapters, which start from zero, "
        "want more. Set optimizer.learning_rate=1e-4, for example"
    )


def _repeats(config: RunConfig, num_problems: int) -> str | None:
    if config.prompts_per_step <= num_problems:
        return None
    return f"prompts_per_step = {config.prompts_per_step} is more than the {num_problems} problems: steps repeat some of them"


def _passes(config: RunConfig, objective: Objective, num_problems: int) -> str | None:
    """Rollouts differ from pass to pass, and traces do not."""
    sampled = config.plan.largest_request > 0 or bool(objective.rollout_terms)
    passes = config.steps * config.prompts_per_step / num_problems
    if sampled or passes <= MANY_PASSES:
        return None
    return (
        f"the run makes {passes:.0f} passes over the traces of {num_problems} problems (steps · prompts_per_step / problems). For "
        "three set epochs=3"
    )


def _unused_traces(config: RunConfig, traces: Sequence[int]) -> str | None:
    used = [len(config.plan.traces_used(count)) if count else 0 for count in traces]
    if not config.plan.guides or sum(used) == sum(traces):
        return None
    return (
        f"plan {config.plan.name} never uses {sum(traces) - sum(used)} of the {sum(traces)} expert traces: it takes at most "
        f"{max(used)} of a problem. Plan sft trains on every one, and rungs of the plan ladder name theirs (expert_index)"
    )


def _correct(config: RunConfig) -> str | None:
    if not isinstance(config.reward, list) or len(config.reward) == 1 or config.rollout.correct_by is not None:
        return None
    guided = f", and plan {config.plan.name} compares it with its thresholds" if config.plan.has_thresholds else ""
    refilled = ", and plan.refill keeps problems with wrong answers alone where it tells these apart" if config.plan.refill else ""
    return (
        f"what counts as correct, in evaluation too, is a weighted sum of {len(config.reward)} rewards of at least "
        f"rollout.correct_at = {config.rollout.correct_at:g}{guided}{refilled}. Set rollout.correct_by to the reward that "
        "alone says what is correct"
    )


def _unsampled(config: RunConfig) -> str | None:
    ignored = config.evaluation.ignored
    if config.eval_data is None or not ignored:
        return None
    return (
        f"evaluation.sample=false samples no responses, and nothing reads evaluation.{', evaluation.'.join(ignored)}. Set "
        "evaluation.sample=true for accuracy"
    )


def _unread(config: RunConfig) -> list[str]:
    """Settings of sections that this run has no use for. Recipes set `every` and `sample` for the eval_data that may be added, and
    `trapo-train headroom` groups by a column without any."""
    rollout = config.rollout
    sections = {
        "evaluation": (config.evaluation, config.eval_data is not None, "eval_data is null"),
        "rollout.vllm": (rollout.vllm, rollout.engine == "vllm", f"rollout.engine is {rollout.engine}"),
        "rollout.vllm_server": (rollout.vllm_server, rollout.engine == "vllm_server", f"rollout.engine is {rollout.engine}"),
    }
    found = []
    for section, (settings, is_read, why) in sections.items():
        given = [name for name in changed(settings) if (section, name) not in _FOR_LATER]
        if given and not is_read:
            found.append(f"nothing reads {', '.join(f'{section}.{name}' for name in given)}: {why}")
    return found


def _rendered(config: RunConfig) -> list[str]:
    """A section of held-out problems takes nothing over from that of the training problems."""
    return [
        f"data.{setting} is {getattr(config.data, setting)!r}, that of {section_of(name)} {getattr(entry, setting)!r}: "
        "the model is evaluated on other prompts than it is trained on. Set the same in both, unless the data brings it"
        for name, entry in config.held_out.items()
        for setting in ("chat_template_kwargs", "system_prompt", "response_start")
        if getattr(entry, setting) != getattr(config.data, setting)
    ]


def _unsaved(config: RunConfig) -> str | None:
    """Of a model worth keeping; one from scratch is a matter of minutes."""
    if config.checkpoint.every or config.model.name_or_path is None:
        return None
    return (
        "checkpoints are saved only where a signal or an error ends the run: kill -9, or what ends one of several ranks alone, "
        "would lose all. Set checkpoint.every=N to save while it trains"
    )


def _engine(config: RunConfig, world: World) -> str | None:
    if config.rollout.engine != "transformers" or config.model.name_or_path is None or world.device.type != "cuda":
        return None
    return "rollout.engine=transformers samples in plain PyTorch. vllm and vllm_server are the engines for speed"


def _full_precision(config: RunConfig, world: World) -> str | None:
    if config.model.dtype != "float32" or config.model.name_or_path is None or world.device.type != "cuda":
        return None
    return (
        "model.dtype=float32 computes everything in full float32, for which there is no flash attention. Set model.dtype=bfloat16; "
        "trained weights and optimizer state stay float32"
    )


def _launcher(world: World) -> str | None:
    told = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ  # torchrun's other way to say it
    if world.size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or told:
        return None
    return (
        "torchrun kills its ranks 30 s after it got SIGTERM or Ctrl-C itself, saved or not, unless it was started with "
        "--shutdown-timeout=SECONDS (torch 2.13 and later): choose more than a step and a checkpoint take"
    )
