"""What the micro-batches of one optimizer step report, summed up on the device and read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trapo_kernels import Objective, PolicyLossOutput, Role
from trapo_train.packing import MicroBatch

HISTOGRAM_BINS = 10


class Tally:
    """Metrics of one step over its micro-batches, kept on the device: sums, means weighted by their role's count, maxima."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._mismatches: list[Tensor] = []

    @torch.no_grad()
    def add(self, out: PolicyLossOutput, micro_batch: MicroBatch, objective: Objective) -> None:
        """Take in one micro-batch."""
        batch = micro_batch.batch
        metrics = dict(out.metrics)
        if batch.rollout_logprob is not None:
            log_ratio, counted = _log_ratio(out, micro_batch)
            metrics |= _mismatch(log_ratio, counted) | _corrected(micro_batch)
            self._mismatches.append(torch.where(counted, log_ratio.abs(), torch.nan))
        self._add("loss", out.loss.detach().double())
        for name, value in metrics.items():
            if name.endswith("_max"):
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            elif name.endswith("count"):
                self._add(name, value.double())
            else:
                self._add(name, value.double() * metrics[_counted_by(name)])
        if "expert/trsft_weight" in metrics:  # DFT's too, which is TrSFT with alpha = 1
            weight = objective.expert.gate.slope(out.logprob, batch.advantage).clamp(max=1.0)
            trained = (batch.role == Role.EXPERT) & (batch.weight != 0)
            self._add("histogram", torch.histc(torch.where(trained, weight, -1.0), HISTOGRAM_BINS, 0.0, 1.0).double())

    def on_cpu(self) -> Tally:
        """A copy that can travel between processes."""
        copy = Tally()
        copy._sums = {name: value.cpu() for name, value in self._sums.items()}
        copy._maxima = {name: value.cpu() for name, value in self._maxima.items()}
        copy._mismatches = [value.cpu() for value in self._mismatches]
        return copy

    @classmethod
    def merged(cls, tallies: Sequence[Tally]) -> Tally:
        """The tally of all micro-batches of all ranks, the same on every rank."""
        whole = cls()
        for tally in tallies:
            for name, value in tally._sums.items():
                whole._add(name, value)
            for name, value in tally._maxima.items():
                whole._maxima[name] = torch.maximum(whole._maxima.get(name, value), value)
            whole._mismatches += tally._mismatches
        return whole

    def result(self, extra: dict[str, Tensor]) -> dict[str, Any]:
        """All metrics as Python numbers, `extra` included, after one transfer."""
        histogram = self._sums.pop("histogram", None)
        whole = dict(self._maxima)  # of the step as it is, not sums to be divided by a count
        if self._mismatches:
            whole["rollout/mismatch_p95"] = quantile(torch.cat(self._mismatches), 0.95)
        scalars = self._sums | whole | extra
        parts = [value.double().reshape(-1) for value in scalars.values()]
        numbers = torch.cat(parts if histogram is None else [*parts, histogram]).tolist()
        values = dict(zip(scalars, numbers, strict=False))
        counts = {name: values.pop(name) for name in list(values) if name.endswith("count")}
        metrics: dict[str, Any] = {"loss_tokens": int(sum(count for name, count in counts.items() if name.endswith("/count")))}
        for name, value in values.items():
            count = counts.get(_counted_by(name))
            if count is None:
                metrics[name] = value
            elif count:
                metrics[_RENAMED.get(name, name)] = value if name in whole else value / count
        if counts.get("expert/count") and histogram is not None:
            metrics["trsft/weight_histogram"] = [int(count) for count in numbers[-HISTOGRAM_BINS:]]
        return metrics

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def _counted_by(name: str) -> str:
    """The count of tokens that a metric is a mean over."""
    role, _, what = name.partition("/")
    if role == "correction" or what.startswith("mismatch"):
        return "rollout/sampled_count"
    if what.startswith("kl_ref"):
        return "rollout/kl_count"
    return f"{role}/count" if what in ("logprob", "prob", "entropy") else f"{role}/trained_count"


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


def _log_ratio(out: PolicyLossOutput, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
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
    """How far the trainer is from the sampler on the sampler's own tokens: KL estimate in nats, share off by over 10 %."""
    return {
        "rollout/sampled_count": counted.sum(),
        "rollout/mismatch_kl": _mean(-log_ratio, counted),
        "rollout/mismatch_above_10_percent": _mean((log_ratio.expm1().abs() > 0.1).float(), counted),
    }


def _corrected(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """What updates.correction did: mean factor, share of tokens that it masked, and share whose factor a cap held back."""
    if micro_batch.correction is None:
        return {}
    factor, counted = micro_batch.correction["factor"], micro_batch.correction["counted"]
    return {
        "correction/mean": _mean(factor, counted),
        "correction/masked_share": _mean((factor == 0).float(), counted),
        "correction/capped_share": _mean(micro_batch.correction["capped"], counted),
    }


def _mean(x: Tensor, over: Tensor) -> Tensor:
    """0-d: the mean of x [N] over the tokens `over` [N] bool, 0 of none."""
    return torch.where(over, x, 0.0).sum() / over.sum().clamp(min=1)
