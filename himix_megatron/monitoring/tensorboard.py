"""TensorBoard, written by rank 0. Flows in: numbers by tag, samples with answers; out: RUN/tensorboard.

A resumed run writes into the same folder and purges the points beyond its checkpoint, so that each step appears once.
docs/monitoring.md explains every tag.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, scalar

from ..config import Config, to_json
from ..data.loading.plan import SamplingPlan
from ..data.loading.webdataset_stream import Stream
from ..distributed.fused_kernels import Kernels
from ..distributed.megatron_config import kernel_lines
from ..distributed.topology import Topology
from .environment import describe_environment

if TYPE_CHECKING:
    from .sample_predictions import Answered

logger = logging.getLogger(__name__)

PAGES = {
    "Is it learning?": {
        "loss": ["train/loss$", "validation/loss$"],
        "loss by dataset": ["loss_by_dataset/.*"],
        "gradient norm, before clipping": ["train/grad_norm.*"],
        "learning rate": ["train/learning_rate"],
    },
    "Is it fast?": {
        "tokens per second": [r"throughput/\w+_tokens_per_second$"],
        "tokens per second and GPU": [r"throughput/\w+_tokens_per_second_per_rank"],
        "samples and images per second": ["throughput/(samples|images)_per_second$"],
        "model TFLOP/s and GPU": [r"compute/\w+_tflops_per_second_per_rank"],
        "MFU": [r"compute/\w+_mfu"],
        "vision tokens of an image": ["data/vision_tokens_per_image"],
        "seconds of a step": ["time/step_seconds", "time/data_wait_seconds", r"pipeline/stage_\d+_busy_seconds"],
        "busy stages and bubble": [r"pipeline/stage_\d+_busy_fraction", "pipeline/bubble_fraction"],
        "fill of packs or rows, share of padding": ["data/(text|vision)_packing_efficiency", "compute/padding_fraction"],
    },
    "Is it healthy?": {
        "wall time by cause": [r"goodput/\w+_seconds"],
        "share of the wall time that trained": ["goodput/step_fraction"],
        "peak memory, GiB": ["memory/.*"],
        "samples not read, cut, left out, quarantined": [r"data/\w+_samples"],
        "standstill of saves, seconds": ["checkpoint/blocking_seconds"],
        "steps without an update, rollbacks": ["health/.*"],
    },
}
"""Layout of the custom scalars: one page a question, whose charts show tags (regular expressions)."""

COMPARED = (
    *("train/loss", "validation/loss", "time/step_seconds", "throughput/text_tokens_per_second_per_rank"),
    *("compute/model_tflops_per_second_per_rank", "memory/peak_gib"),
)
"""Results that the page of hyper-parameters shows."""


class TensorBoardReporter:
    """Writes RUN/tensorboard."""

    def __init__(self, config: Config, plan: SamplingPlan | Stream, kernels: Kernels, topology: Topology, *, first_step: int):
        """`first_step`: steps done so far; points of later steps, which a killed launch left behind, are purged."""
        self._folder = config.run_dir / "tensorboard"
        self._data_points = data_points(plan)
        begins, self._ends = _hyper_parameters(config, topology)
        self._writer: SummaryWriter | None = None
        self._purge_step = first_step + 1 if first_step else None
        pages = {page: {chart: ["Multiline", tags] for chart, tags in charts.items()} for page, charts in PAGES.items()}
        rows = describe_environment(config.parallel, topology, kernel_lines(config, kernels))
        environment = table(("what", "value"), rows)

        def begin(writer: SummaryWriter) -> None:
            writer.add_custom_scalars(pages)
            writer.add_text("run/settings", settings_table(config), first_step)
            writer.add_text("run/environment", environment, first_step)
            for summary in begins:
                _add(writer, summary)

        self._write(begin)

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """On an error of the disk only these points are lost: the next call opens a new file. (The library's writer thread ends
        at its first error, which a later call raises.)"""
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, max_queue=100, flush_secs=10)
                self._purge_step = None  # a later file purges nothing
            write(self._writer)
        except OSError as error:
            logger.error("TensorBoard's points are lost until its file can be written again: %s", error)
            self._writer = None

    def points(self, step: int, points: Mapping[str, float], at: float | None = None) -> None:
        """Write numbers by tag as one event. `at`: their time in seconds since 1970; None: now."""
        values = [scalar(tag, value).value[0] for tag, value in points.items()]  # type: ignore[no-untyped-call]
        self._write(lambda writer: _add(writer, Summary(value=values), step, at))

    def step(self, step: int, points: dict[str, float], at: float) -> None:
        """Write the numbers of an interval. `at`: when its last step ended."""
        self.points(step, points | self._data_points, at)

    def predictions(self, step: int, answered: Sequence[Answered]) -> None:
        """Show samples with question, expected and given answer: as images, and as text that can be searched and copied."""
        rows = [(str(number), one.key, one.question, one.expected, one.given) for number, one in enumerate(answered)]

        def add(writer: SummaryWriter) -> None:
            for number, one in enumerate(answered):
                writer.add_image(f"pictures/sample_{number}", one.drawn(), step, dataformats="HWC")
            writer.add_text("pictures/answers", table(("sample", "key", "question", "expected", "given"), rows), step)

        self._write(add)

    def close(self) -> None:
        """Write out what is pending."""

        def end(writer: SummaryWriter) -> None:
            _add(writer, self._ends)
            writer.close()

        self._write(end)


def _add(writer: SummaryWriter, summary: Any, step: int | None = None, at: float | None = None) -> None:
    """Write a finished summary. SummaryWriter's own methods write one event for each number, and put hyper-parameters into
    another run."""
    writer._get_file_writer().add_summary(summary, step, at)  # type: ignore[no-untyped-call]


def data_points(plan: SamplingPlan | Stream) -> dict[str, float]:
    """Numbers of the datasets, which are the same at every step; none of a stream."""
    if isinstance(plan, Stream):
        return {}
    return {
        "data/dropped_samples": sum(plan.left_out.values()),
        "data/quarantined_samples": sum(sum(part.manifest.quarantined.values()) for part in plan.datasets.parts),
    }


def _hyper_parameters(config: Config, topology: Topology) -> tuple[list[Any], Any]:
    """Summaries of the HParams plug-in for the run's own folder; `SummaryWriter.add_hparams` would create another run.

    Returns: the summaries for the beginning, and the one for the end.
    """
    model, train, parallel = config.model, config.train, config.parallel
    values = {
        "recipe": config.recipe,
        "parts": " ".join(train.trainable_parts),
        "ranks": topology.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "data_parallel": topology.data_size,
        "sequence": _yes(parallel.sequence),
        "distributed_optimizer": _yes(parallel.distributed_optimizer),
        "recompute": train.recompute,
        "precision": train.precision,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "vision_tokens_per_image": config.vision.max_tokens_per_image,
        "global_batch": config.global_batch,
        "micro_batch": config.micro_batch,
        "packed": _yes(config.data.packs),
        "learning_rate": config.optimizer.learning_rate,
        "seed": train.seed,
    }
    experiment, begins, ends = hparams(values, dict.fromkeys(COMPARED, 0.0))  # type: ignore[no-untyped-call]
    return [experiment, begins], ends


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def settings_table(config: Config) -> str:
    """Every setting of the run, as Markdown."""
    tree = json.loads(to_json(config))
    rows = []
    for section, values in tree.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            rows.append((f"{section}.{name}".rstrip("."), value if isinstance(value, str) else json.dumps(value)))
    return table(("setting", "value"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or " "
