"""The planner beside published training speeds of text-only GPT models, row by row.

Flows in: rows as published, each with its source; out: lines with the published and the predicted seconds of a step. Two rows
are calibrated on, one for each generation of GPUs: the share of the peak that large products reach (`machine.EFFICIENCY`).
All others are predictions. Figures are used as found in text. Megatron-LM's README shows its weak scaling table on H100 as
a picture only; of its rows the 70B one is quoted in a thread of its issues.

What the published FLOP/s count: Megatron-LM's A100 table counts recomputed layers (4 passes instead of 3); all H100 rows do
not, and nothing was recomputed there. All of them count attention as full rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from himix_megatron.config import ModelConfig
from himix_megatron.costs.flops import Work, decoder_layers
from tools.flops import bare_config
from tools.planner.cost import Job, Layout, StepTime, step_time
from tools.planner.machine import EFFICIENCY, Machine, machine_named

A100_TABLE = "Narayanan et al. 2021, arXiv 2104.04473, table 1 (Megatron-LM's weak scaling on A100)"
DGX_CLOUD = "NVIDIA DGX Cloud benchmarking recipes, github.com/NVIDIA/dgxc-benchmarking"
README = "Megatron-LM's README, github.com/NVIDIA/Megatron-LM"
THREAD = "its weak scaling table on H100, as quoted in github.com/NVIDIA/Megatron-LM/issues/1031"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One published measurement."""

    name: str
    source: str
    gpu: str
    gpus: int
    layers: int
    hidden: int
    heads: int
    groups: int | None = None
    """Key/value heads; None: as many as heads."""
    vocab: int
    sequence_tokens: int
    batch: int
    tensor: int
    pipeline: int = 1
    virtual: int = 1
    micro_batch: int = 1
    seconds: float
    """Seconds of a step as published, or from the published FLOP/s by the publication's own formula."""
    counts: str
    """What the published FLOP/s count."""
    assumed: str = ""
    """What the source does not say and is assumed."""

    @property
    def old(self) -> bool:
        """A row of 2021: attention not fused, everything recomputed, nothing overlapped, no sequence parallelism."""
        return self.gpu.startswith("a100")


def _table_seconds(row: tuple[int, ...], tflops: float, sequence: int = 2048, vocab: int = 51200) -> float:
    """Equation 3 of the paper, turned round: 96 B s l h^2 (1 + s / 6h + V / 16lh) FLOPs, recomputation counted."""
    _, hidden, layers, _, _, gpus, batch = row
    flops = 96 * batch * sequence * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (16 * layers * hidden))
    return flops / (gpus * tflops * 1e12)


def _a100_rows() -> Iterator[Row]:
    table = {
        "1.7B": ((24, 2304, 24, 1, 1, 32, 512), 137), "3.6B": ((32, 3072, 30, 2, 1, 64, 512), 138),
        "7.5B": ((32, 4096, 36, 4, 1, 128, 512), 142), "18.4B": ((48, 6144, 40, 8, 1, 256, 1024), 135),
        "39.1B": ((64, 8192, 48, 8, 2, 512, 1536), 138), "76.1B": ((80, 10240, 60, 8, 4, 1024, 1792), 140),
        "145.6B": ((96, 12288, 80, 8, 8, 1536, 2304), 148), "310.1B": ((128, 16384, 96, 8, 16, 1920, 2160), 155),
        "529.6B": ((128, 20480, 105, 8, 35, 2520, 2520), 163), "1008B": ((160, 25600, 128, 8, 64, 3072, 3072), 163),
    }  # fmt: skip
    for name, (sizes, tflops) in table.items():
        heads, hidden, layers, tensor, pipeline, gpus, batch = sizes
        yield Row(
            name=f"GPT {name}", source=A100_TABLE, gpu="a100-80gb", gpus=gpus, layers=layers, hidden=hidden, heads=heads,
            vocab=51200, sequence_tokens=2048, batch=batch, tensor=tensor, pipeline=pipeline,
            micro_batch=4 if pipeline == 1 else 1, seconds=_table_seconds(sizes, tflops), counts="recomputation counted",
            assumed=f"micro-batch {4 if pipeline == 1 else 1}, not interleaved",
        )  # fmt: skip


def _weak_scaling(name: str, seconds: dict[int, float], per_gpu: float, **sizes: object) -> Iterator[Row]:
    """A model at several numbers of GPUs with proportional batches."""
    for gpus, taken in seconds.items():
        yield Row(
            name=name, source=DGX_CLOUD, gpu="h100-80gb", gpus=gpus, batch=round(gpus * per_gpu), seconds=taken,
            counts="recomputation not counted", **sizes,  # type: ignore[arg-type]
        )  # fmt: skip


def _h100_rows() -> Iterator[Row]:
    yield from _weak_scaling(
        "GPT-3 175B", {128: 8.309, 256: 8.408, 512: 8.42, 1024: 8.453, 2048: 8.49}, 2.0, layers=96, hidden=12288, heads=96,
        vocab=51200, sequence_tokens=2048, tensor=4, pipeline=8, virtual=12,
    )  # fmt: skip
    yield from _weak_scaling(
        "Nemotron-4 15B",
        {16: 2.812, 32: 2.824, 64: 2.845, 128: 2.859, 256: 2.852, 512: 2.875, 1024: 2.895, 2048: 2.887}, 4.0, layers=32,
        hidden=6144, heads=48, groups=8, vocab=256000, sequence_tokens=4096, tensor=4, micro_batch=4,
    )  # fmt: skip
    yield from _weak_scaling(
        "Nemotron-4 15B, TP2", {16: 2.746}, 4.0, layers=32, hidden=6144, heads=48, groups=8, vocab=256000,
        sequence_tokens=4096, tensor=2, micro_batch=2,
    )  # fmt: skip
    yield from _weak_scaling(
        "Nemotron-4 340B", {128: 4.61, 256: 4.67, 512: 4.7, 1024: 4.73, 2048: 4.84}, 0.25, layers=96, hidden=18432, heads=96,
        groups=8, vocab=256000, sequence_tokens=4096, tensor=8, pipeline=8, virtual=12,
    )  # fmt: skip
    sizes = {"layers": 96, "hidden": 12288, "heads": 96, "vocab": 131072, "sequence_tokens": 4096, "batch": 1152}
    for gpus, utilisation in ((96, 0.47), (4608, 0.42)):
        row = Row(
            name="GPT-3 175B, strong scaling", source=README, gpu="h100-80gb", gpus=gpus, tensor=8, pipeline=12, virtual=8,
            seconds=1.0, counts="recomputation not counted", assumed="TP8, PP12, VPP8, micro-batch 1", **sizes,  # type: ignore[arg-type]
        )  # fmt: skip
        yield replace(row, seconds=counted_flops(row) / (gpus * utilisation * 989e12))
    row = Row(
        name="GPT 70B", source=f"{README}: {THREAD}", gpu="h100-80gb", gpus=768, layers=80, hidden=8192, heads=64, vocab=131072,
        sequence_tokens=4096, batch=1536, tensor=8, pipeline=2, virtual=1, seconds=1.0, counts="recomputation not counted",
        assumed="80 layers of width 8192, batch 1536, micro-batch 1, not interleaved",
    )  # fmt: skip
    yield replace(row, seconds=counted_flops(row) / (768 * 420.5e12))


def counted_flops(row: Row) -> float:
    """Forward and backward of a step, attention as full rectangles, as Megatron-LM counts."""
    grouped = 2 * (row.groups or row.heads) / row.heads
    layer = (2 + grouped) * row.hidden**2 + 8 * row.hidden**2 + 2 * row.sequence_tokens * row.hidden
    return 6.0 * row.batch * row.sequence_tokens * (row.layers * layer + row.vocab * row.hidden)


def predict(row: Row, machine: Machine) -> StepTime:
    """Seconds of a step. The MLP has two matrices of width 4h: as many products as three of 8h/3."""
    replicas = row.gpus // (row.tensor * row.pipeline)
    model = ModelConfig(
        family="llama", num_layers=row.layers, hidden_size=row.hidden, ffn_hidden_size=round(8 * row.hidden / 3),
        num_attention_heads=row.heads, num_query_groups=row.groups or row.heads, vocab_size=row.vocab,
    )  # fmt: skip
    tokens = row.micro_batch * row.sequence_tokens
    work = Work.of([row.sequence_tokens] * row.micro_batch, [0] * row.micro_batch, head_tokens=tokens)
    chunks = row.pipeline * row.virtual
    layout = Layout(
        tensor=row.tensor, pipeline=row.pipeline, virtual_pipeline=row.virtual, data=replicas, sequence=not row.old,
        recompute="full" if row.old else "none", chunk_layers=(row.layers // chunks,) * chunks, vision_chunks=(False,) * chunks,
        distributed_optimizer=not row.old, overlap_data=not row.old, split_hops=True,
        overlap_tensor=0.0 if row.old else 0.5,
    )  # fmt: skip
    grouped = 2 * (row.groups or row.heads) / row.heads
    parameters = row.layers / row.pipeline * (10 + grouped) * row.hidden**2 / row.tensor + row.vocab * row.hidden / row.tensor
    job = Job(
        model=model, parts=("language",), micro_batch=work, layers=tuple(decoder_layers(bare_config(model), work)),
        num_micro_batches=row.batch // (replicas * row.micro_batch), vocab_size=row.vocab, trained_parameters=parameters,
        fused_attention=not row.old,
    )  # fmt: skip
    return step_time(machine, layout, job)


ROWS = (*_a100_rows(), *_h100_rows())
CALIBRATED = (("GPT 145.6B", 1536), ("GPT-3 175B", 512))
"""Name and GPUs of the rows that EFFICIENCY was taken from."""


def is_calibrated(row: Row) -> bool:
    """Whether a constant was fitted to this row."""
    return (row.name, row.gpus) in CALIBRATED


def calibrate(row: Row) -> float:
    """The efficiency that makes the prediction of a row exact: by bisection, a step is the shorter the higher it is."""
    machine = machine_named(row.gpu, None)
    low, high = 0.3, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        tried = replace(machine, product_flops=middle * machine.peak_flops)
        low, high = (middle, high) if predict(row, tried).total > row.seconds else (low, middle)
    return (low + high) / 2


def error(row: Row) -> float:
    """Predicted over published seconds, less one."""
    return predict(row, machine_named(row.gpu, None)).total / row.seconds - 1


def compared() -> Iterator[str]:
    """The table, line by line."""
    yield f"{'model':<28}{'GPUs':>6}  {'layout':<17}{'published':>10}{'predicted':>10}{'error':>9}{'MFU':>7}  FLOP/s counted"
    for row in ROWS:
        machine = machine_named(row.gpu, None)
        seconds = predict(row, machine).total
        layout = f"TP{row.tensor} PP{row.pipeline} VPP{row.virtual}"
        mfu = counted_flops(row) / (row.gpus * machine.peak_flops * row.seconds)
        note = "fitted" if is_calibrated(row) else f"{100 * (seconds / row.seconds - 1):+.1f} %"
        assumed = f"; assumed: {row.assumed}" if row.assumed else ""
        yield (
            f"{row.name:<28}{row.gpus:>6}  {layout:<17}{row.seconds:>8.2f} s{seconds:>8.2f} s{note:>9}{100 * mfu:>6.1f}%  "
            f"{row.counts}{assumed}"
        )
    errors = sorted(abs(error(row)) for row in ROWS if not is_calibrated(row))
    yield (
        f"{len(errors)} rows predicted: median error {100 * errors[len(errors) // 2]:.1f} %, largest {100 * errors[-1]:.1f} %; "
        f"calibrated on 2 rows: products reach {EFFICIENCY['a100']} of an A100's peak, {EFFICIENCY['h100']} of an H100's"
    )
    for source in dict.fromkeys(row.source for row in ROWS):
        yield f"source: {source}"
