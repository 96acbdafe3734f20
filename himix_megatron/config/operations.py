"""How a run is operated: checkpoints, logs, health limits and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..runtime.limits import Count, CountOrZero, Limit, Positive, check_limits


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where weights come from and when they are saved."""

    init_from: str | None = None
    """Run or checkpoint folder whose weights a fresh run starts from (align: a converted model; instruct: align's run)."""
    interval_steps: Count = 500
    """Number of steps between saves; the last step is always saved."""
    mode: Literal["async", "sync"] = "async"
    """Way of saving. async: the state is copied into host memory (as much again as a rank saves) and written while training
    goes on; sync: training waits until the state is on disk."""
    keep_last: Count = 2
    """Number of newest checkpoints kept, besides the one with the lowest validation loss."""
    keep_every: Count | None = None
    """Interval of checkpoints that are kept for good: those whose step is a multiple of it; None: no such checkpoints."""
    max_failures: CountOrZero = 3
    """Maximum number of consecutive failed saves (full disk, for example); one more ends the run. The last save must
    succeed."""
    timeout_seconds: Positive = 1800.0
    """Maximum duration of a save, in seconds; a longer one ends the run, with the stacks in RUN/log and earlier checkpoints
    intact."""

    def __post_init__(self) -> None:
        check_limits(self, "checkpoint")

    @property
    def group_timeout_seconds(self) -> float:
        """Timeout of a save's messages: longer than that of the save, whose watchdog can say more."""
        return self.timeout_seconds + 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run reports."""

    interval_steps: Count = 10
    """Number of steps between log lines and TensorBoard points."""
    validation_interval_steps: Count = 500
    """Number of steps between validation losses, with data.validation_path; a new lowest one is saved, and kept."""
    validation_samples: Count = 512
    """Samples per validation, rounded down to whole batches (at least one; a smaller set is read repeatedly)."""
    ledger: bool = False
    """Whether RUN/ledger is written. rank-000.jsonl: the samples of each step; steps.jsonl: loss and gradient norm of each
    step, in hexadecimal."""
    predictions_interval_steps: CountOrZero = 0
    """Number of steps between samples shown in TensorBoard with image, question, expected and generated answer (held-out
    samples with data.validation_path); 0: none are shown."""
    predictions_samples: Count = 4
    """Number of samples shown each time."""
    peak_tflops: Positive | None = None
    """Dense peak of one GPU in the run's precision, in TFLOP/s, which MFU is a share of; None: the value known for the GPU's
    name, and no MFU for unknown GPUs."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose trace is written into RUN/profile by each pipeline stage's first rank, for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        check_limits(self, "log")


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """Limits after which a run stops itself (exit code 3, reason in RUN/STOP), and its periodic checks."""

    max_skipped_steps: CountOrZero = 10
    """Maximum number of skipped updates within 1,000 steps, because of a loss or gradient that is not finite or of
    spike_action; one more stops the run."""
    spike_action: Literal["none", "skip", "rollback"] = "none"
    """Reaction to a spike of the loss. none: a log line; skip: the update is skipped; rollback: training returns to the newest
    checkpoint and continues behind the spike, without the batches between."""
    spike_sigmas: Positive = 6.0
    """Distance of a spike above the mean of the last spike_window_steps losses, in standard deviations (at least 1 % of the
    mean)."""
    spike_window_steps: Annotated[int, Limit(2)] = 100
    """Window of recent losses used for spike detection, which is inactive until the window is full."""
    max_rollbacks: CountOrZero = 3
    """Maximum number of rollbacks in the whole run; one more stops the run."""
    replica_check_steps: Count = 500
    """Number of steps between bitwise comparisons of the parameters over the ranks that should hold the same (also done before
    each save); a difference ends the run, and nothing of it is saved."""
    max_starts_without_progress: Count = 3
    """Maximum number of consecutive starts, with the same settings, that save no new step; one more stops the run."""

    def __post_init__(self) -> None:
        check_limits(self, "health")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run folder, and how the run is continued."""

    dir: str | None = None
    """Run folder; None: runs/RECIPE. A folder with a checkpoint is continued: the same command continues the same run."""
    ignore_stop_file: bool = False
    """Whether a run that stopped on purpose (its folder has a STOP file) is continued."""
    fault_injection: str | None = None
    """File of faults that this run causes in itself, to rehearse recovery (format: runtime/failpoints.py); None: none."""
