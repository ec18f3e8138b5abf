"""What the micro-batches of one optimizer step report, summed up on the device and read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trapo_kernels import Objective, PolicyLossOutput, Role, merged_metrics, metric_count
from trapo_train.metrics import Mean
from trapo_train.micro_batch import MicroBatch

HISTOGRAM_BINS = 10


class Tally:
    """Metrics of one step over its micro-batches, kept on the device: the kernel's of each, and sums of what the trainer adds."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._mismatches: list[Tensor] = []

    @torch.no_grad()
    def add(self, out: PolicyLossOutput[Tensor], micro_batch: MicroBatch, objective: Objective) -> None:
        """Take in one micro-batch."""
        batch = micro_batch.batch
        self._parts.append(out.metrics)
        self._add("loss", out.loss.detach().double())
        if batch.rollout_logprob is not None:
            log_ratio, counted = _log_ratio(out, micro_batch)
            for name, value in (_mismatch(log_ratio, counted) | _corrected(micro_batch)).items():
                self._add(name, value)
            self._mismatches.append(torch.where(counted, log_ratio.abs(), torch.nan))
        if "expert/trsft_weight" in out.metrics:  # DFT's too, which is TrSFT with alpha = 1
            weight = objective.expert.gate.slope(out.logprob, batch.advantage).clamp(max=1.0)
            trained = (batch.role == Role.EXPERT) & (batch.weight != 0)
            self._add("histogram", torch.histc(torch.where(trained, weight, -1.0), HISTOGRAM_BINS, 0.0, 1.0).double())

    def on_cpu(self) -> Tally:
        """A copy that can travel between processes."""
        copy = Tally()
        copy._parts = [{name: value.cpu() for name, value in merged_metrics(self._parts).items()}]
        copy._sums = {name: value.cpu() for name, value in self._sums.items()}
        copy._mismatches = [value.cpu() for value in self._mismatches]
        return copy

    @classmethod
    def merged(cls, tallies: Sequence[Tally]) -> Tally:
        """The tally of all micro-batches of all ranks, the same on every rank."""
        whole = cls()
        for tally in tallies:
            for name, value in tally._sums.items():
                whole._add(name, value)
            whole._parts += tally._parts
            whole._mismatches += tally._mismatches
        return whole

    def result(self, extra: dict[str, Tensor]) -> dict[str, Any]:
        """All metrics as Python numbers, `extra` included, after one transfer; means over tokens are `Mean`s."""
        histogram = self._sums.pop("histogram", None)
        whole = merged_metrics(self._parts)  # of the step as it is, not sums to be divided by a count
        if self._mismatches:
            whole["rollout/mismatch_p95"] = quantile(torch.cat(self._mismatches), 0.95)
        scalars = self._sums | whole | extra
        parts = [value.double().reshape(-1) for value in scalars.values()]
        numbers = torch.cat(parts if histogram is None else [*parts, histogram]).tolist()
        values = dict(zip(scalars, numbers, strict=False))
        counts = {name: values.pop(name) for name in list(values) if name.endswith("count")}
        metrics: dict[str, Any] = {"loss_tokens": int(sum(count for name, count in counts.items() if name.endswith("/count")))}
        for name, value in values.items():
            count = counts.get(_counted_by(name)) if "/" in name else None
            if count is None:
                metrics[name] = value
            elif count:
                metrics[_RENAMED.get(name, name)] = Mean(value if name in whole else value / count, int(count))
        if counts.get("expert/count") and histogram is not None:
            metrics["trsft/weight_histogram"] = [int(count) for count in numbers[-HISTOGRAM_BINS:]]
        return metrics

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _counted_by(name: str) -> str:
    """The count of tokens that a metric is a mean over."""
    of_the_sampler = name.startswith(("correction/", "rollout/mismatch"))
    return "rollout/sampled_count" if of_the_sampler else metric_count(name)


_RENAMED = {
    "rollout/entropy": "entropy/rollout",
    "expert/entropy": "entropy/expert",
    "expert/trsft_weight": "trsft/weight_mean",
    "expert/share_below_alpha": "trsft/share_below_alpha",
}


def quantile(values: Tensor, share: float) -> Tensor:
    """Of the values that are not NaN, in fp64; torch.nanquantile takes 2^24 of them at most."""
    ordered = values.sort().values.double()  # NaN come last
    place = share * ((~values.isnan()).sum() - 1).clamp(min=0).double()
    below, above = (ordered.gather(0, index.long()[None])[0] for index in (place.floor(), place.ceil()))
    return torch.lerp(below, above, place - place.floor())


def _log_ratio(out: PolicyLossOutput[Tensor], micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The trainer's logprob less the sampler's, [N] fp32, and of which tokens it is read, [N] bool: those of rollouts in the loss.

    A correction has measured it on those that it masked as well.
    """
    if micro_batch.correction is not None:
        return micro_batch.correction["log_ratio"], micro_batch.correction["counted"]
    batch = micro_batch.batch
    # With several updates the policy moves away from the sampler: the one that sampled is the old one.
    sampled_with = out.logprob if batch.old_logprob is None else batch.old_logprob
    return sampled_with.float() - batch.rollout_logprob, (batch.role == Role.ROLLOUT) & (batch.weight != 0)


def _mismatch(log_ratio: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """How far the trainer is from the sampler on the sampler's own tokens, summed: KL estimate in nats, tokens off by over 10 %."""
    return {
        "rollout/sampled_count": counted.sum().double(),
        "rollout/mismatch_kl": _sum(-log_ratio, counted),
        "rollout/mismatch_above_10_percent": _sum((log_ratio.expm1().abs() > 0.1).float(), counted),
    }


def _corrected(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """What updates.correction did, summed: its factors, tokens that it masked, and those whose factor a cap held back."""
    if micro_batch.correction is None:
        return {}
    factor, counted = micro_batch.correction["factor"], micro_batch.correction["counted"]
    return {
        "correction/mean": _sum(factor, counted),
        "correction/masked_share": _sum((factor == 0).float(), counted),
        "correction/capped_share": _sum(micro_batch.correction["capped"], counted),
    }


def _sum(x: Tensor, over: Tensor) -> Tensor:
    """0-d fp64: the sum of x [N] over the tokens `over` [N] bool."""
    return torch.where(over, x, 0.0).sum(dtype=torch.float64)
