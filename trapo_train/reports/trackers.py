"""Metrics to TensorBoard, Weights & Biases and Trackio, beside `metrics.jsonl`, which is always written."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from trapo_train.schema import UserError, check

logger = logging.getLogger(__name__)

UNREACHED = ("CommError",)  # wandb's, beside OSError; its AuthenticationError is one, too, and has another name


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, and how often samples are written down."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """tensorboard (into output_dir/tensorboard), wandb, trackio; none by default."""
    project: str = "trapo"
    """Project of wandb and trackio."""
    name: str | None = None
    """Name of the run; null for the last part of output_dir."""
    samples_every: int = 0
    """Steps between samples in output_dir/samples, a table and JSON lines with the whole texts, at least 0; 0 writes none. With
    plan.refill those are written that are trained on."""

    def __post_init__(self) -> None:
        check(self, ("samples_every", self.samples_every >= 0, "at least 0"))


class Tracker(Protocol):
    """One destination."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of one step."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """All destinations of a run. One that fails is left out from then on, with a warning: it must not end the training.

    Args:
        resumed_at: the step that the run continues after, -1 where it begins anew in its old output_dir; None for a new run.

    Raises, when it is made: UserError for a tracker that does not load or refuses the run, as without a key; one that cannot be
        reached is left out.
    """

    def __init__(
        self, config: TrackingConfig, output_dir: str | Path, settings: dict[str, Any], resumed_at: int | None = None
    ) -> None:
        output_dir = Path(output_dir)
        name = config.name or output_dir.name
        self._trackers: dict[str, Tracker] = {}
        self.notes: list[str] = []
        """What was left out when the run began, and why."""
        for tracker in config.to:
            try:
                if tracker == "tensorboard":
                    self._trackers[tracker] = _TensorBoard(output_dir / "tensorboard", resumed_at)
                else:
                    self._trackers[tracker] = _Hosted(tracker, config.project, name, output_dir, settings)
            except Exception as error:  # what services raise has no class in common
                if isinstance(error, OSError) or type(error).__name__ in UNREACHED:
                    self.notes.append(_left_out(tracker, error))
                    continue
                self.close()  # those that have begun
                raise UserError(
                    f"tracking.to: {tracker} must take the run before it begins, got {type(error).__name__}: {error}. "
                    f"Mend that, or leave {tracker} out."
                ) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the numbers among `metrics`; texts and lists stay in metrics.jsonl."""
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
        self._each(lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Close every destination."""
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a service does, the run goes on
                logger.warning(_left_out(name, error))
                del self._trackers[name]


def _left_out(name: str, error: Exception) -> str:
    return f"tracking: {name} failed and is left out from here on: {type(error).__name__}: {error}"


class _TensorBoard:
    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that are taken again would stand there twice; what was evaluated at the resumed one stays.
        purge_step = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """wandb and trackio, which share an interface."""

    def __init__(self, module: str, project: str, name: str, output_dir: Path, settings: dict[str, Any]) -> None:
        import importlib

        self._module = importlib.import_module(module)
        # What continues in this output_dir continues its run there, too, instead of a second one from the middle on; of steps that
        # are taken again wandb keeps the first record. trackio knows no ids: it goes on with the newest run of that name.
        file = output_dir / f"{module}_run_id"
        begun = file.exists()
        run_id = file.read_text(encoding="utf-8") if begun else secrets.token_hex(8)
        options = {"resume": "allow" if begun else "never"}
        if module == "wandb":
            options = {"id": run_id, "resume": "allow", "dir": str(output_dir)}
        self._module.init(project=project, name=name, config=settings, **options)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(run_id, encoding="utf-8")
        except OSError:
            self._module.finish()  # nothing more reaches a run that is left out
            raise

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._module.log(metrics, step=step)

    def close(self) -> None:
        self._module.finish()
