"""The metrics of several calls as those of all their tokens: counts add up, means are weighted by their counts, maxima meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trapo_kernels import checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def metric_count(name: str) -> str:
    """The name of the count that a metric belongs to: of the tokens that it is a mean or a maximum over, or of itself if it is one.

    Args:
        name: of a metric of `linear_policy_loss` or `policy_loss`, such as "rollout/clip_low".

    Returns: "role/count" for logprob, prob and entropy, "role/kl_count" for what describes the KL term, "role/trained_count" for
        all else, which describes the role's own term.
    Raises: ValueError for a name without a role.
    Memory: none. Determinism: a pure function of the name. Source: the table in `terms.metrics`.
    """
    role, _, what = name.partition("/")
    if not what:
        raise ValueError(f'metric_count: name must be that of a metric, "role/what", got {name!r}. Pass a key of out.metrics.')
    if what.endswith("count"):
        return name
    if what.startswith("kl_ref"):
        return f"{role}/kl_count"
    return f"{role}/count" if what in ("logprob", "prob", "entropy") else f"{role}/trained_count"


def merged_metrics(parts: Sequence[Mapping[str, Tensor]], process_group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """The metrics that one call on the tokens of all `parts` would report, over micro-batches and ranks.

    Equivalent to, for a mean such as "rollout/clip_low":

        counts = [part["rollout/trained_count"].double() for part in parts]
        sums = [part["rollout/clip_low"] * count for part, count in zip(parts, counts, strict=True)]
        rollout_clip_low = sum(sums) / sum(counts).clamp(min=1)

    Args:
        parts: the `metrics` of each call with one objective, or what this function made of some of them.
        process_group: ranks over whose parts to merge as well, by one all_reduce of sums and one of maxima; each has at least one
            part, of ignored tokens alone if need be. The ranks of a vocabulary-parallel head have all seen the same tokens, which
            are not to be counted twice. None: the parts at hand, which ranks can also gather and merge again.

    Returns: 0-d fp64 tensors by name, without a host sync; 0 for a mean or maximum over no tokens, as in a part.
    Raises: ValueError for no parts, parts of several kinds, or a metric whose count is missing; TypeError for one that is no
        tensor. With `process_group` every rank needs parts of the same kind: where this raises on one, the others wait for it.
    Memory: a few floats per part. Determinism: exact up to the rounding of fp64 sums, in the order of the parts.
    Source: `metric_count`.
    """
    where = "merged_metrics"
    if not parts:
        raise ValueError(f"{where}: parts must hold the metrics of at least one call, got none. Pass [out.metrics, …].")
    for part in parts:
        checks.is_a(where, "a part", part, Mapping, "out.metrics")
        if part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())
            raise ValueError(f"{where}: all parts must have the same metrics, got {odd} in some. Merge those of one objective.")
        for name, value in part.items():
            checks.is_a(where, name, value, Tensor, "out.metrics as they are, before .item()")
    counts = [name for name in parts[0] if metric_count(name) == name]
    maxima = [name for name in parts[0] if name.endswith("_max")]
    means = [name for name in parts[0] if name not in {*counts, *maxima}]
    for name in means:
        if metric_count(name) not in counts:
            raise ValueError(
                f"{where}: {name} is a mean over {metric_count(name)}, got parts without it. Pass out.metrics whole, "
                "and merge numbers of your own apart from them."
            )
    of_mean = [metric_count(name) for name in means]
    sums = torch.cat([_table(parts, counts), _table(parts, means) * _table(parts, of_mean)], 1).sum(0)
    largest = _table(parts, maxima).amax(0)
    if process_group is not None:
        torch.distributed.all_reduce(sums, group=process_group)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=process_group)
    whole = dict(zip([*counts, *means], sums.unbind(), strict=True))
    divided = {name: whole[name] / whole[count].clamp(min=1) for name, count in zip(means, of_mean, strict=True)}
    merged = whole | divided | dict(zip(maxima, largest.unbind(), strict=True))
    return {name: merged[name] for name in parts[0]}


def _table(parts: Sequence[Mapping[str, Tensor]], names: list[str]) -> Tensor:
    """[parts, names] fp64."""
    rows = [torch.stack([part[name] for name in names]) if names else next(iter(part.values())).new_zeros(0) for part in parts]
    return torch.stack([row.detach().double() for row in rows])
