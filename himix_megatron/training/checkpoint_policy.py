"""When a run saves. Flows in: the position after each step; out: saves, or the reason why the run must stop instead.

A state is saved only if the ranks that should hold equal weights do.
"""

from __future__ import annotations

from ..checkpoint.description import Position
from ..config import Config
from ..monitoring.metrics import Metrics
from ..resilience.goodput import Goodput
from ..resilience.loss_guard import LossGuard
from ..resilience.replica_check import check_replica_weights
from .builder import TrainingComponents


class CheckpointPolicy:
    """Decides after each step whether to compare replicas and to save."""

    def __init__(
        self,
        config: Config,
        run: TrainingComponents,
        *,
        loss_guard: LossGuard,
        goodput: Goodput,
        metrics: Metrics,
        saved_step: int,
    ):
        """`saved_step`: of the checkpoint that the run continued from, 0 without one."""
        self._config, self._run, self._checkpoints = config, run, run.checkpoints
        self._loss_guard, self._goodput, self._metrics = loss_guard, goodput, metrics
        self.saved_step = saved_step

    @property
    def can_roll_back(self) -> bool:
        """Whether the run has a checkpoint of its own."""
        return self.saved_step > 0

    def maybe_save(self, position: Position, validation_loss: float | None, *, due: bool) -> str | None:
        """After a step: check and save if it is time, or `due` for another reason. A step is saved once.

        Returns: why the run must stop; None if it goes on.
        """
        due = (due or position.step % self._config.checkpoint.interval_steps == 0) and position.step > self.saved_step
        if due or position.step % self._config.health.replica_check_steps == 0:
            difference = check_replica_weights(self._run.topology, self._run.model_chunks, self._checkpoints.frozen_tower)
            if difference:
                return (
                    f"after step {position.step} {difference}. A machine may be broken: find it before you continue from the "
                    f"checkpoint of step {self.saved_step}"
                )
        if due:
            with self._goodput.doing("save"):
                self._goodput.record_save(position.step, self._loss_guard.state())
                blocking_seconds = self._checkpoints.save(position, validation_loss=validation_loss)
            self._metrics.add(position.step, {"checkpoint/blocking_seconds": blocking_seconds})
            self.saved_step = position.step
        return None

    def save_before_exit(self, position: Position) -> str | None:
        """Save what is not on the disk yet, also where an earlier save of it failed. Returns: as `maybe_save`."""
        self._checkpoints.wait()
        if self._checkpoints.saves.failures:
            self.saved_step = 0
        return self.maybe_save(position, None, due=True)
