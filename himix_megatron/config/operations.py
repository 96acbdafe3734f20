"""How a run is operated: checkpoints, logs, health limits and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import positive


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where weights come from and when they are saved."""

    init_from: str | None = None
    """Run or checkpoint folder whose weights a fresh run starts from (align: a converted model; instruct: align's run)."""
    interval_steps: int = 500
    """Steps between saves; the last step is always saved."""
    mode: Literal["async", "sync"] = "async"
    """async: the state is copied into host memory (as much again as a rank saves), and written while training goes on. sync:
    training waits until it is on the disk."""
    keep_last: int = 2
    """Newest checkpoints kept. The one with the lowest validation loss is kept besides."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple of this are kept for good; None: none are."""
    max_failures: int = 3
    """Saves that may fail one after another (disk full, say); one more ends the run. The last save must not fail."""
    timeout_seconds: float = 1800.0
    """A save that takes longer hangs: the stacks go to RUN/log and the run ends, with the earlier checkpoints as they were."""

    def __post_init__(self) -> None:
        positive(
            checkpoint__interval_steps=self.interval_steps,
            checkpoint__keep_last=self.keep_last,
            checkpoint__timeout_seconds=self.timeout_seconds,
        )
        if self.keep_every is not None:
            positive(checkpoint__keep_every=self.keep_every)
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: it must be 0 or above")

    @property
    def group_timeout_seconds(self) -> float:
        """For the messages of a save: a little more than the save itself has, since the watch on it can say more."""
        return self.timeout_seconds + 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run tells."""

    interval_steps: int = 10
    """Steps between log lines and TensorBoard points."""
    validation_interval_steps: int = 500
    """Steps between validation losses, when data.validation_path is given; a new lowest one is saved, and kept."""
    validation_samples: int = 512
    """Samples per validation, rounded down to whole batches (at least one; a smaller set is gone through again)."""
    ledger: bool = False
    """Write RUN/ledger/rank-000.jsonl: samples of each step; steps.jsonl: each step's loss and gradient norm, in hex."""
    predictions_interval_steps: int = 0
    """Steps between looks at a few samples in TensorBoard: picture, question, expected and given answer (held-out samples where
    data.validation_path is given); 0: none."""
    predictions_samples: int = 4
    """Samples of such a look."""
    peak_tflops: float | None = None
    """Dense peak of one GPU in the run's precision, in TFLOP/s: what MFU is a share of. None: by the GPU's name, where it is
    known; else there is no MFU."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose trace each pipeline stage's first rank writes into RUN/profile, to be opened at ui.perfetto.dev."""

    def __post_init__(self) -> None:
        positive(
            log__interval_steps=self.interval_steps,
            log__validation_interval_steps=self.validation_interval_steps,
            log__validation_samples=self.validation_samples,
            log__pictures_samples=self.predictions_samples,
        )
        if self.predictions_interval_steps < 0:
            raise ValueError(f"log.predictions_interval_steps is {self.predictions_interval_steps}: wanted 0 (none) or more")
        if self.peak_tflops is not None:
            positive(log__peak_tflops=self.peak_tflops)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """What a run bears before it gives up, and what it checks as it goes. Giving up is exit code 3, the reason in RUN/STOP."""

    max_skipped_steps: int = 10
    """Updates left out within 1,000 steps, for a loss or gradient that is not finite or by spike_action; one more ends it."""
    spike_action: Literal["none", "skip", "rollback"] = "none"
    """At a spike of the loss: only say so; leave the update out; or go back to the newest checkpoint and on behind the spike,
    without the batches between."""
    spike_sigmas: float = 6.0
    """A spike is a loss so many standard deviations above the mean of the last spike_window_steps (a deviation counts as at
    least 1 % of the mean)."""
    spike_window_steps: int = 100
    """Losses that a new one is held against; the first steps of a run, before there are as many, are not judged."""
    max_rollbacks: int = 3
    """Rollbacks in the whole run; one more ends it."""
    replica_check_steps: int = 500
    """Steps between comparisons of the parameters, bit for bit, over the ranks that should hold the same (also done before
    each save); a difference ends the run, and nothing of it is saved."""
    max_starts_without_progress: int = 3
    """Starts in a row, with the same settings, of which none saved a new step; another one ends it."""

    def __post_init__(self) -> None:
        positive(
            health__spike_sigmas=self.spike_sigmas,
            health__replica_check_steps=self.replica_check_steps,
            health__max_starts_without_progress=self.max_starts_without_progress,
        )
        for name in ("max_skipped_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"health.{name} is {getattr(self, name)}: wanted 0 or more")
        if self.spike_window_steps < 2:
            raise ValueError(f"health.spike_window_steps is {self.spike_window_steps}: a deviation takes 2 losses or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run itself."""

    dir: str | None = None
    """Run folder; None: runs/RECIPE. A folder with a checkpoint is continued: the same command continues the same run."""
    ignore_stop_file: bool = False
    """Continue a run that stopped on purpose (its folder has a STOP file)."""
    fault_injection: str | None = None
    """Rehearse recovery: a file of faults that this run does to itself (format: runtime/failpoints.py).
    None: none."""
