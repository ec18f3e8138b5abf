"""Presets: each method of the field as data for the same kernels. `print(objectives.trapo())` shows its formula.

`beta` of grpo, reinforce_pp and uft is the KL of their methods, on rollout tokens. It is a field of every objective, and any other
takes one so:

    >>> print(dataclasses.replace(objectives.dapo(), kl=KL(0.01)))
    dapo:
      rollout  Σ w · (-min(A·r, A·clip(r, 1-0.2, 1+0.28)), r = π/π_old)
      KL       0.01 · Σ w_K · k3(π ‖ π_ref) on rollout tokens
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

from trapo_kernels.objective import Objective
from trapo_kernels.objectives import imitation, mixed, on_policy
from trapo_kernels.objectives.imitation import dft, iw_sft, iw_sft_token, psft, sft, trsft
from trapo_kernels.objectives.mixed import (
    chord_mu,
    chord_phi,
    exgrpo,
    hpt,
    luffy,
    prefix_rft,
    reft,
    relift,
    srft,
    trapo,
    uft,
)
from trapo_kernels.objectives.on_policy import (
    cispo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    ppo,
    reinforce_pp,
    rloo,
    sapo,
)

PRESETS = {preset.__name__: preset for preset in (trapo, *imitation.PRESETS, *on_policy.PRESETS, *mixed.PRESETS)}


class Published(NamedTuple):
    """What a published method has besides its loss, which is all that a preset is; None where it leaves that open."""

    aggregation: str | None
    """The `mode` of `aggregate` that its batches are packed with."""
    normalise: str | None = None
    """What advantages are divided by: "none", "group_std", the deviation of the rewards of a prompt's samples, or "batch": minus
    the mean, then divided by the deviation, of all advantages of the step."""
    center: str | None = None
    """What is subtracted from a reward: "mean" of the rewards of the prompt's samples, "leave_one_out", that of the others, or
    "none"."""
    baseline: str | None = None
    """Over which of the prompt's samples mean and deviation are: "unguided", those without anything of an expert."""
    critic: bool = False
    """Whether its advantages come from a critic (GAE) in place of the rewards of a prompt's samples."""


PUBLISHED = {
    "grpo": Published("sequence_mean", "group_std", "mean"),
    "dr_grpo": Published("constant", "none", "mean"),
    "dapo": Published("token_mean", "group_std", "mean"),
    "cispo": Published("token_mean", "group_std", "mean"),
    "gspo": Published("sequence_mean", "group_std", "mean"),
    "gmpo": Published("sequence_mean", "group_std", "mean"),
    "sapo": Published("sequence_mean", "group_std", "mean"),
    "rloo": Published(None, "none", "leave_one_out"),
    "reinforce_pp": Published(None, "batch", "none"),
    "chord_mu": Published("role_mean", "group_std", "mean", "unguided"),
    "chord_phi": Published("role_mean", "group_std", "mean", "unguided"),
    "uft": Published("role_mean"),
    "ppo": Published(None, critic=True),
    "reft": Published(None, critic=True),
}

__all__ = [
    "PRESETS",
    "PUBLISHED",
    "Published",
    "chord_mu",
    "chord_phi",
    "cispo",
    "dapo",
    "dft",
    "dr_grpo",
    "exgrpo",
    "gmpo",
    "grpo",
    "gspo",
    "hpt",
    "iw_sft",
    "iw_sft_token",
    "luffy",
    "ppo",
    "prefix_rft",
    "psft",
    "reft",
    "reinforce_pp",
    "relift",
    "rloo",
    "sapo",
    "sft",
    "srft",
    "table",
    "trapo",
    "trsft",
    "uft",
]


def table() -> str:
    """The presets as a Markdown table: system, preset, one pass or two, source; read off their docstrings and data."""
    lines = ["| system | preset | passes | source |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        text = inspect.cleandoc(preset.__doc__)
        system, source = text.split(":", 1)[0], " ".join(text.rsplit("Source:", 1)[1].split()).rstrip(".")
        lines.append(f"| {system} | `{name}` | {_passes(preset())} | {source} |")
    return "\n".join(lines) + "\n"


def _passes(objective: Objective) -> str:
    if objective.why_two_passes(on_policy=False) is None:
        return "1"
    return "2, but 1 without `old_logprob`" if objective.why_two_passes(on_policy=True) is None else "2"
