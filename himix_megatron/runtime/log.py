"""Logging of a run: one format, rank 0 on stderr, every rank in a file of its own.

Flows in: records of the standard library's `logging`; out: lines on stderr and in RUN/log/rank-000.log.
Modules log through `logging.getLogger(__name__)` and know nothing of ranks.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RankError, StartError
from .untrusted_files import escaped

_FORMAT = "%(asctime)s [%(rank)d/%(world_size)d] %(levelname)s %(name)s: %(message)s"
# Libraries speak from WARNING on; ours from INFO. A program started with -m is named __main__.
_OURS = ("himix_megatron", "pipelines", "slurm", "tools", "__main__")
_handlers: list[logging.Handler] = []
_python_format = warnings.formatwarning


class EscapingFormatter(logging.Formatter):
    """Spells out control characters: names from a dataset are logged, and must not move a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class RankFilter(logging.Filter):
    """Stamps each record with the rank; ranks other than 0 speak from `others_from` on only."""

    def __init__(self, rank: int, world_size: int, others_from: int = logging.NOTSET) -> None:
        super().__init__()
        self.rank, self.world_size, self.others_from = rank, world_size, others_from

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank, record.world_size = self.rank, self.world_size
        return self.rank == 0 or record.levelno >= self.others_from


def start(run_dir: Path | None = None, rank: int = 0, world_size: int = 1) -> None:
    """Send log records to stderr (rank 0 from INFO on, the others from ERROR on) and to RUN/log/rank-000.log.

    Without a run folder there is only stderr. Files are appended to, so that a requeued run keeps one story.
    Starting again replaces the earlier set-up. Raises: OSError when the log file cannot be opened.
    """
    stop()
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(RankFilter(rank, world_size, others_from=logging.ERROR))
    _handlers.append(console)
    if run_dir is not None:
        (run_dir / "log").mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run_dir / "log" / f"rank-{rank:03d}.log", encoding="utf-8")
        file.addFilter(RankFilter(rank, world_size))
        _handlers.append(file)
    for handler in _handlers:
        handler.setFormatter(EscapingFormatter(_FORMAT))
        logging.getLogger().addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    # Python's warnings would otherwise be printed once per rank, on two lines each.
    warnings.formatwarning = _one_line
    # Notes of megatron-core's and torch's developers to each other: every run would begin with six of them.
    for module in (r"megatron\.", r"torch\."):
        warnings.filterwarnings("ignore", module=module)
    logging.captureWarnings(True)


def stop() -> None:
    """Remove and close what `start` added."""
    logging.captureWarnings(False)
    warnings.formatwarning = _python_format
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {' '.join(str(message).split())}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


@contextmanager
def failures() -> Iterator[None]:
    """Within it every error is written to this rank's log with its traceback before it goes on.

    After start-up a ValueError is a bug, no user error, and is re-raised as RuntimeError. A StartError or RankError stays one.
    """
    try:
        yield
    except (RankError, StartError):
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("this rank failed")
        if isinstance(error, ValueError | OSError):
            raise RuntimeError(f"failed while training: {error}") from error
        raise
