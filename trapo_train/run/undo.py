"""A step that fails is as if it had not begun, so that what was trained before it can be saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trapo_train.data.dataset import ProblemOrder
from trapo_train.random_states import restore_rng_state, rng_state


class Undo:
    """Puts back what a step that fails has changed, unless it has begun to update the weights."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._updating = False
        optimizer.register_step_pre_hook(self._note_update)
        self.intact = True
        """Whether all state is that after a whole number of steps: not where one failed in, or between, updates of the weights."""

    @contextmanager
    def step(self, order: ProblemOrder, *parts: Any) -> Iterator[None]:
        """Inside, a step is taken; on an error the order, those of `parts` that have a state, and the random generators are put
        back."""
        # The order's has all problems that are left of an epoch, in a tensor that nobody writes to: it is not copied.
        states = [(order, order.state_dict())]
        states += [(part, copy.deepcopy(part.state_dict())) for part in parts if hasattr(part, "state_dict")]
        generators, updates, self._updating = rng_state(), self._scheduler.last_epoch, False
        try:
            yield
        except Exception:  # whatever it is; a second Ctrl-C is to end the run at once
            self.intact = not self._updating and self._scheduler.last_epoch == updates  # which counts updates that are skipped, too
            if self.intact:
                self._optimizer.zero_grad(set_to_none=True)
                for part, state in states:
                    part.load_state_dict(state)
                restore_rng_state(generators)
            raise

    def _note_update(self, *arguments: object) -> None:
        self._updating = True
