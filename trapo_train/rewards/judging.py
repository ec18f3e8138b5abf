"""Rewards of samples, while further ones are generated."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from trapo_train.models.tokenizer import decode
from trapo_train.records import END_THINK, THINK, Sample, opens_thoughts
from trapo_train.rewards.functions import RewardFn, Total, WeightedSum, judge, may_overlap, opinion_of
from trapo_train.rewards.surroundings import current_gpu, use_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trapo_train.rollouts.rollout import RolloutConfig

_CALLS_AT_ONCE = 64


@dataclass(eq=False)
class _Case:
    """Samples of one owner, and what they are judged by; `future` is None where the reward has yet to be called."""

    owner: Any
    samples: Sequence[Sample]
    texts: list[str]
    future: Future | None = field(default=None)


class Judging:
    """Rewards under way. A context: leaving it calls off what has not begun.

    A reward that may overlap (see `rewards.may_overlap`) is called at once, in a thread, for the samples of each `start` alone.
    Any other one is called when its values are taken, in the thread that takes them, once for everything that was started.
    """

    def __init__(self, reward: RewardFn | WeightedSum, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> None:
        self.none_count = 0
        self._reward, self._tokenizer, self._config = reward, tokenizer, config
        self._cases: list[_Case] = []
        own_gpu = {"initializer": use_gpu, "initargs": (current_gpu(),)}
        self._threads = ThreadPoolExecutor(_CALLS_AT_ONCE, "reward", **own_gpu) if may_overlap(reward) else None

    def __len__(self) -> int:
        return len(self._cases)

    @property
    def futures(self) -> Collection[Future]:
        """The calls under way, to wait for."""
        return [case.future for case in self._cases if case.future is not None]

    def start(self, owner: Any, samples: Sequence[Sample]) -> None:
        """Judge `samples`; `take` gives back their owner."""
        case = _Case(owner, samples, _texts(samples, self._tokenizer, self._config))
        if self._threads is not None:
            problems, about = [sample.problem for sample in samples], _about(samples, self._tokenizer, self._config)
            case.future = self._threads.submit(judge, self._reward, problems, case.texts, about)
        self._cases.append(case)

    def take(self, *, wait: bool) -> list[Any]:
        """The owners whose samples now have their rewards, in the order of their start: of all that were started if `wait`, else
        of those that are there.

        Raises: RewardError: see `rewards.judge`.
        """
        if self._threads is None:
            opinions = self._judge_all()
            taken, self._cases = self._cases, []
        else:
            taken, left = [], []
            for case in self._cases:  # each asked once: it may be done a moment later
                (taken if wait or case.future.done() else left).append(case)
            opinions = [case.future.result() for case in taken]
            self._cases = left
        for case, values in zip(taken, opinions, strict=True):
            self.none_count += _settle(case.samples, values, self._tokenizer, self._config)
        return [case.owner for case in taken]

    def _judge_all(self) -> list[list[float | None]]:
        samples = [sample for case in self._cases for sample in case.samples]
        texts = [text for case in self._cases for text in case.texts]
        about = _about(samples, self._tokenizer, self._config)
        values = iter(judge(self._reward, [sample.problem for sample in samples], texts, about))
        return [[next(values) for _ in case.samples] for case in self._cases]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def judge_samples(
    samples: Sequence[Sample], reward: RewardFn | WeightedSum, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
) -> int:
    """Set `reward`, `verdict`, `correct` and `answer_in_prefix` of each sample in one reward call; return how many were None.

    With verify="completion" the reward sees the completion alone, except for full expert traces: there the model has written
    nothing, so there is nothing it could get for free. No opinion (None) counts as 0.
    """
    problems = [sample.problem for sample in samples]
    values = judge(reward, problems, _texts(samples, tokenizer, config), _about(samples, tokenizer, config))
    return _settle(samples, values, tokenizer, config)


def answer_in_prefix(prefix_text: str, solution: str | None) -> bool:
    """Return whether the solution already stands in the prefix, so that a completion may earn its reward for nothing.

    The solution must stand there whole: "5" is found in "x = 5." but not in "15", "5.2" or "0.5". White space counts as
    one space. The prefix may name the value for another reason, so this is an upper bound.
    """
    words = (solution or "").split()
    if not words:
        return False
    pattern = r"\s+".join(re.escape(word) for word in words)
    if re.match(r"\w", words[0]):
        pattern = r"(?<!\w)(?<!\d[.,])" + pattern
    if re.match(r"\w", words[-1][-1]):
        pattern += r"(?!\w)(?![.,]\d)"
    return re.search(pattern, prefix_text) is not None


def _texts(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> list[str]:
    return [
        decode(tokenizer, (() if _is_alone(sample, config) else sample.prefix_ids) + sample.completion_ids, special=False)
        for sample in samples
    ]


def _is_alone(sample: Sample, config: RolloutConfig) -> bool:
    """Whether a reward sees the completion without its prefix."""
    return config.verify == "completion" and sample.prefix_ratio < 1.0


def _about(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> dict[str, list[Any]]:
    """The columns of `rewards.ABOUT_RESPONSES`."""
    return {
        "completion_tokens": [len(sample.prefix_ids) + len(sample.completion_ids) for sample in samples],
        "finish_reasons": [sample.finish_reason for sample in samples],
        "thoughts_open": [_begins_in_thoughts(sample, tokenizer, config) for sample in samples],
    }


def _begins_in_thoughts(sample: Sample, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig) -> bool:
    opened = opens_thoughts(sample.problem.prompt)
    if not _is_alone(sample, config):
        return opened
    prefix = decode(tokenizer, sample.prefix_ids, special=False)
    return END_THINK not in prefix and (opened or THINK in prefix)


def _settle(
    samples: Sequence[Sample], values: Sequence[float | None], tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
) -> int:
    for sample, value in zip(samples, values, strict=True):
        sample.reward = 0.0 if value is None else float(value)
        sample.rewards = value.parts if isinstance(value, Total) else {}
        sample.verdict = float(opinion_of(value, config.correct_by) or 0.0)
        sample.correct = sample.verdict >= config.correct_at
        if sample.guided:
            prefix_text = decode(tokenizer, sample.prefix_ids, special=False)
            sample.answer_in_prefix = answer_in_prefix(prefix_text, sample.problem.solution)
    return sum(value is None for value in values)
