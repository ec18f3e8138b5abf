"""Which terms of the objective a step trains: a hook for alternating schemes such as CodeRL's and SASR's.

    class Alternate:                                   # in my_choosers.py; objective.chooser: my_choosers:Alternate
        def __call__(self, step, metrics):
            return "expert" if step % 2 == 0 else "rollout"

A chooser is asked before every step, those of plan relift on deferred problems left out, with the number of steps taken and the
metrics of the last step (empty before the first), and answers "both", "expert", "rollout", or the name of a preset, which is used
with its own defaults, and with objective.kl where it is one of rollouts that has no KL. A step without a rollout term takes the
expert traces of its problems instead of what the plan would sample. An answer that the run cannot train, such as a preset with a KL
where no reference was loaded, and an exception of the chooser stop the run with a `ChooserError`: before anything is sampled, and
with a checkpoint.

A chooser must draw its decision from these and its own state alone, so that a run can be resumed. One with state has
`state_dict()` and `load_state_dict(state)`, of tensors and plain values, which go into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trapo_kernels import KL, Objective, objectives
from trapo_train.schema import UserError
from trapo_train.step.objective import with_kl
from trapo_train.user_code import resolve

Chooser = Callable[[int, Mapping[str, Any]], str]
CHOICES = ("both", "expert", "rollout")


class ChooserError(UserError):
    """A chooser raised, or answered what cannot be trained."""


def load_chooser(path: str) -> Chooser:
    """The chooser at "package.module:name": a function, or a class, of which an instance without arguments is made.

    A module is looked for as `import` does, and in the working directory.

    Raises: UserError where there is none.
    """
    chooser = resolve("objective.chooser", path, "my_choosers:Alternate")
    chooser = chooser() if isinstance(chooser, type) else chooser
    if not callable(chooser):
        raise UserError(f"objective.chooser {path!r} must be callable with (step, metrics), got {type(chooser).__name__}.")
    if hasattr(chooser, "state_dict") != hasattr(chooser, "load_state_dict"):
        raise UserError(f"objective.chooser {path!r} must have both state_dict and load_state_dict, or neither.")
    return chooser


def apply_choice(choice: str, objective: Objective, kl: KL | None = None) -> Objective:
    """The objective of a step: `objective` itself, its terms of one role, or a preset, with `kl` (objective.kl) on its rollouts
    unless it has a KL of its own.

    An entropy bonus stays, on the tokens of the step's samples; a KL goes with the rollout term.

    Raises: UserError for an unknown choice, or a role for which `objective` has no term.
    """
    if choice == "both":
        return objective
    named = isinstance(choice, str)
    if named and choice in objectives.PRESETS:
        preset = objectives.PRESETS[choice]()
        lacks = preset.rollout_terms and not preset.has_kl
        return with_kl(preset, kl) if kl is not None and lacks else preset
    if not named or choice not in CHOICES:
        raise UserError(
            f"objective.chooser must answer one of {', '.join(CHOICES)} or a preset ({', '.join(objectives.PRESETS)}), "
            f"got {choice!r}."
        )
    layers = [layer for layer in objective.layers if getattr(layer, choice) is not None]
    if not layers:
        raise UserError(f"objective.chooser chose {choice!r}, and the objective {objective.name} has no {choice} term.")
    kept = None
    for layer in reversed(layers):
        kept = Objective(
            **{choice: getattr(layer, choice)},
            kl=layer.kl if choice == "rollout" else None,
            entropy_coef=layer.entropy_coef,
            plus=kept,
            name=layer.name,
        )
    return replace(kept, name=f"{objective.name}/{choice}")
