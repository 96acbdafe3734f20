"""RUN/status.json: what a run is doing now, as one small JSON file for the programs that follow it.

Flows in: state changes, steps and the rates of an interval, on rank 0; out: the file, replaced atomically at every state change
and otherwise at most once a second. A process that is killed cannot write: the file then keeps the last state, and
`updated_at` says how old it is.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..runtime import typed_json
from ..runtime.errors import StartError
from ..runtime.stop_signals import EXIT_REQUEUE, EXIT_STOPPED, FAILED

logger = logging.getLogger(__name__)

VERSION, MAX_BYTES = 1, 1 << 20
State = Literal["starting", "training", "stopped", "requeue", "finished", "failed"]
_END_STATES: dict[int, State] = {0: "finished", EXIT_STOPPED: "stopped", EXIT_REQUEUE: "requeue"}
_RATES = {
    "step_seconds": "time/step_seconds",
    "samples_per_second": "throughput/samples_per_second",
    "text_tokens_per_second": "throughput/text_tokens_per_second",
    "tflops_per_second_per_rank": "compute/model_tflops_per_second_per_rank",
}
"""Fields that repeat numbers of the last logged interval, by its TensorBoard tags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """The content of status.json. None: not known, or not yet."""

    recipe: str
    state: State
    reason: str | None = None
    """Why the run stopped on purpose or failed, in one line."""
    step: int
    """Optimizer steps done."""
    planned_steps: int
    loss: float | None = None
    """Of the last step; None also where it was not finite."""
    step_seconds: float | None = None
    samples_per_second: float | None = None
    text_tokens_per_second: float | None = None
    tflops_per_second_per_rank: float | None = None
    seconds_left: float | None = None
    world_size: int
    global_batch: int
    """Samples a step, or packs with packing."""
    exit_code: int | None = None
    """None while the run is running."""
    started_at: float
    """When this launch started, in seconds since 1970, as `updated_at`."""
    updated_at: float


def status_path(run_dir: Path) -> Path:
    """Where a run's status is."""
    return run_dir / "status.json"


def read_status(run_dir: Path) -> RunStatus | None:
    """The status of a run; None if it has not written any. Raises: ValueError for a damaged file or one of a newer version."""
    path = status_path(run_dir)
    try:
        found = typed_json.read_object(path, MAX_BYTES)
        if (version := found.pop("version", None)) in (VERSION, None):
            return typed_json.build(RunStatus, found, str(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}: it is damaged; delete it, the next launch of the run writes it again") from None
    raise ValueError(f"{path} has version {version}, and this code reads version {VERSION}: use the code that wrote it")


def followed_status(run_dir: Path) -> RunStatus | None:
    """The status for who follows a run; None also while it cannot be read, which does not concern the run."""
    try:
        return read_status(run_dir)
    except (ValueError, OSError):
        return None


class RunStatusWriter:
    """Keeps status.json up to date. Every rank calls it; rank 0 alone writes (`writes`). The thread of the watchdog may record
    an end while the main thread records a step, or an error that follows from it: what follows an end is ignored."""

    def __init__(self, run_dir: Path, status: RunStatus, *, writes: bool):
        self.status = status
        self._path, self.writes = status_path(run_dir), writes
        self._recent_seconds: deque[float] = deque(maxlen=10)
        self._written_at = -math.inf
        self._lock = threading.RLock()

    def record_state(self, state: State, **changes: object) -> None:
        """The run is in another state from now on."""
        with self._lock:
            self._change(state=state, **changes)
            self._write()

    def record_step(self, step: int, loss: float) -> None:
        """A step is done."""
        self._change(step=step, loss=loss if math.isfinite(loss) else None)
        self._write_at_most_once_a_second()

    def record_interval(self, step: int, points: Mapping[str, float]) -> float:
        """The rates of a logged interval, by tag. Returns: the seconds that the steps left will take."""
        self._recent_seconds.append(points["time/step_seconds"])
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        seconds_left = max(0, self.status.planned_steps - step) * mean_seconds
        self._change(step=step, seconds_left=seconds_left, **{name: points.get(tag) for name, tag in _RATES.items()})
        self._write_at_most_once_a_second()
        return seconds_left

    def record_end(self, code: int, reason: str | None = None) -> None:
        """This process ends with an exit code."""
        left = {"seconds_left": 0.0} if code == 0 else {}
        self.record_state(_END_STATES.get(code, "failed"), reason=reason, exit_code=code, **left)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Within it an error that goes on to end the run is recorded."""
        try:
            yield
        except (Exception, SystemExit) as error:
            code = 2 if isinstance(error, StartError) else FAILED
            self.record_end(code, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
            raise

    def _change(self, **changes: object) -> None:
        with self._lock:
            if self.status.exit_code is None or "updated_at" in changes:
                self.status = replace(self.status, **changes)  # type: ignore[arg-type]

    def _write_at_most_once_a_second(self) -> None:
        with self._lock:
            if time.monotonic() - self._written_at >= 1:
                self._write()

    def _write(self) -> None:
        """A full disk costs the news, not the run. Nothing is synced: after a power cut the file may be an older one."""
        if not self.writes:
            return
        self._written_at = time.monotonic()
        self._change(updated_at=round(time.time(), 3))
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"version": VERSION} | asdict(self.status), indent=1) + "\n")
            partial.replace(self._path)
        except OSError as error:
            logger.warning("%s could not be written: %s", self._path, error)
