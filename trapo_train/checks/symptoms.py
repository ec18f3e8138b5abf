"""What the steps and evaluations of a run show to be wrong, in a sentence each when it begins, and what that came to at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from trapo_train.evaluation.eval_sets import section_of
from trapo_train.rewards.grading import FAILED_SHARE, about_failed_gradings

REJECTED_STEPS = 3
SILENT_SHARE = 0.1  # of the samples; the odd solution that a grader cannot read is no symptom


class Symptoms:
    """Looks at the metrics of a run, step by step, and says of each trouble once what it is.

    Args:
        max_response_tokens: those of rollouts.
        eos_token: the tokenizer's, which ends responses.
        before: metrics of the last step before a resume; {} at the start of a run.
    """

    def __init__(self, max_response_tokens: int, eos_token: str, before: Mapping[str, Any]) -> None:
        self._longest, self._end = max_response_tokens, eos_token
        self._told: set[str] = set()
        self._first, self._steps = int(before.get("step", 0)), 0
        self._untrained: Counter[str] = Counter()  # steps by why
        self._ended = before.get("finished_share", 0.0), self._first  # the largest share so far, and its step
        self._rejected = 0  # steps in a row whose whole expert traces were all wrong

    def of_step(self, metrics: Mapping[str, Any]) -> list[str]:
        """Sentences on a training step."""
        found = _about_silence(metrics, metrics["num_samples"]) if "finished_share" in metrics else {}
        for key, share in metrics.items():
            if key.startswith(FAILED_SHARE) and share >= 0.5:
                found[key] = about_failed_gradings(key.removeprefix(FAILED_SHARE), share)
        if metrics.get("finished_share") == 0:
            name, why = self._why_endless()
            found[name] = f"no completion has an end: all ran to rollout.max_response_tokens = {self._longest}. {why}"
        if "accuracy/expert" in metrics:
            self._rejected = 0 if metrics["accuracy/expert"] > 0 else self._rejected + 1
        if self._rejected >= REJECTED_STEPS:
            found["rejected"] = (
                f"the reward called no whole expert trace correct in {REJECTED_STEPS} steps that had some, and they are learned "
                "all the same. Look at samples and solutions; data.on_rejected_expert=drop leaves out what it gives 0"
            )
        self._ended = max(self._ended, (metrics.get("finished_share", 0.0), metrics["step"]), key=lambda pair: pair[0])
        self._steps += 1
        if metrics["loss_tokens"] == 0:
            equal = metrics.get("reward/equal_share") == 1.0
            why = "every problem's rewards were equal" if equal else "no token was in the loss"
            self._untrained[why] += 1
            found["nothing"] = f"nothing was trained, {why}"
        self._told -= {"nothing"} - set(found)  # a step that trains something ends what is said of those before
        return [f"step {metrics['step']}: {text}" for text in self._new(found)]

    def of_evaluation(self, name: str, metrics: Mapping[str, Any]) -> list[str]:
        """Sentences on an evaluation of the set of this name."""
        found = {f"eval {name}: {kind}": text for kind, text in about_evaluation(name, metrics).items()}
        return self._new(found)

    def _new(self, found: Mapping[str, str]) -> list[str]:
        """The sentences that were not told before; what holds of all samples is told of some as well."""
        new = [text for kind, text in found.items() if kind not in self._told]
        self._told |= {*found, *(kind.replace("all silent", "silent") for kind in found)}
        return new

    def at_the_end(self) -> list[str]:
        """Sentences on all steps since the start, or since the resume."""
        steps = f"{self._steps} steps" + (f" after step {self._first}" if self._first else "")
        return [f"{count} of {steps} trained nothing: {why}" for why, count in self._untrained.items()]

    def _why_endless(self) -> tuple[str, str]:
        """What no completion having an end is called, and a sentence on why that may be."""
        share, step = self._ended
        if share >= 0.5:
            return "collapsed", (
                f"At step {step} {share:.0%} had one: either responses have outgrown that, or the model has collapsed (lower "
                "optimizer.learning_rate)"
            )
        why = f"Either that is too small, or the model ends its turns with another token than {self._end} (model.eos_token)"
        return "endless", why


def about_evaluation(name: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """By its kind, a sentence on an evaluation of the set `name` where its reward had no opinion on many responses; else {}."""
    if "samples_per_problem" not in metrics:  # nothing was sampled
        return {}
    found = _about_silence(metrics, round(metrics["num_problems"] * metrics["samples_per_problem"]))
    return {kind: f"{section_of(name)}: {text}" for kind, text in found.items()}


def _about_silence(metrics: Mapping[str, Any], samples: float) -> dict[str, str]:
    """A sentence where the reward had no opinion on at least SILENT_SHARE of the `samples`; else {}. On all of them is a kind of
    its own, so that it is told after some, too."""
    silent = metrics.get("reward/none_count", 0)
    if not silent or silent < SILENT_SHARE * samples:
        return {}
    kind, which = ("all silent", "any sample") if silent >= samples else ("silent", f"{silent:.0f} of {samples:.0f} samples")
    return {kind: f"the reward had no opinion (None) on {which}, and each counts as 0"}
