"""How well do runs of growing size scale? A table, plots and a TensorBoard run, made from run folders.

    python -m tools.scaling_report runs/tiny_align-weak            a series of pipelines.scaling
    python -m tools.scaling_report runs                            every series in this folder
    python -m tools.scaling_report runs/a runs/b --out report      any runs, finished or not

Reported are text tokens per second (without padding), in all and per rank (GPU); efficiency, which is a rank's rate relative
to that of the smallest run; MFU and bubble, where runs wrote them; the median step time with its 10th and 90th percentile.
The first steps of each launch are left out. Runs that were killed, stopped or failed are named, and reported as far as they
came. Written into --out: report.md, PNG plots, and tensorboard/, where a step is a number of ranks. Exit code 0; 2 if no
argument is a run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated

from himix_megatron.config import Count, differences
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word
from pipelines.scaling import read_series_file
from tools.scaling_report.run_rates import SUMS, Run, read_run

MISSING = "-"
MAY_DIFFER = {"recipe", "run.dir", "run.ignore_stop_file", "train.global_batch_samples", "train.global_batch_packs"}
"""Settings that runs of one series need not share."""


@dataclass(frozen=True)
class Arguments:
    """Report how runs of growing size scale."""

    runs: Annotated[tuple[Path, ...], Word("RUNS")]
    """Run folders, series folders, or folders that hold series."""
    out: Path | None = None
    """Folder of the report, with a folder for each series. None: the series' own folder."""
    warmup_steps: Count = 3
    """First steps of each launch, which are not counted."""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that are compared with each other, smallest first."""

    name: str
    out: Path
    runs: list[Run]
    notes: list[str]

    @property
    def base(self) -> Run | None:
        """The smallest run with a rate."""
        return next((run for run in self.runs if run.per_gpu), None)

    def efficiency(self, run: Run) -> float | None:
        """A rank's rate against the smallest run's."""
        return run.per_gpu / self.base.per_gpu if run.per_gpu and self.base and self.base.per_gpu else None


def main() -> None:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.scaling_report", __doc__)
    for group in groups(arguments):
        group.out.mkdir(parents=True, exist_ok=True)
        notes = [*group.notes, *notes_on(group)]
        written = [group.out / "report.md", *plots(group), tensorboard(group)]
        written[0].write_text(markdown(group, notes), encoding="utf-8")
        print(f"{group.name}\n\n{terminal(rows(group))}\n")
        print("\n".join(f"- {note}" for note in notes))
        print(f"\nwritten: {' '.join(map(str, written))}\n")


# ---- what belongs together -------------------------------------------------------------------------------------------


def groups(arguments: Arguments) -> Iterator[Group]:
    """Each series, and what runs are left as one more group. Raises: ValueError for a folder that is neither."""
    loose: list[Path] = []
    for folder in arguments.runs:
        series = [file for file in (folder / "series.json", *sorted(folder.glob("*/series.json"))) if file.is_file()]
        if not series and not is_run(folder):
            raise ValueError(f"{folder} is neither a run folder nor a series, and holds none")
        if not series:
            loose.append(folder)
        for file in series:
            yield read_series(file, arguments)
    if loose:
        runs = sorted((read_run(folder, arguments.warmup_steps) for folder in loose), key=lambda run: run.num_gpus or math.inf)
        out = (arguments.out or Path("runs")) / "scaling_report"
        yield Group("runs", out, runs, differing(runs))


def is_run(folder: Path) -> bool:
    """Whether a run has begun here."""
    return (folder / "tensorboard").is_dir() or (folder / "config.json").is_file()


def read_series(file: Path, arguments: Arguments) -> Group:
    """The runs of a series.json, those that have not begun included."""
    content = read_series_file(file)
    runs, notes = [], [f"{content['mode']} scaling of {content['recipe']} {' '.join(content['flags'])}".rstrip()]
    for size, known in content["runs"].items():
        folder = (file.parent / known["run_dir"]).resolve()
        run = read_run(folder, arguments.warmup_steps, known | {"world_size": int(size)})
        runs.append(run)
        cpus = known.get("cpus", 0)
        if (run.num_gpus or 0) > cpus > 0 and "mfu" not in run.means:
            notes.append(f"{run.num_gpus} ranks shared {cpus} CPU cores: there, efficiency is mostly that of sharing them")
    out = file.parent if arguments.out is None else arguments.out / file.parent.name
    return Group(file.parent.name, out, runs, [*notes, *differing(runs)])


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ beside their size: then their rates compare more than that."""
    configs = [run.config for run in runs if run.config is not None]
    names = sorted({name for one in configs for name, _, _ in differences(configs[0], one)} - MAY_DIFFER)
    return [
        f"the runs differ in {name}: {', '.join(dict.fromkeys(json.dumps(attrgetter(name)(one)) for one in configs))}"
        for name in names
    ]


# ---- the table -------------------------------------------------------------------------------------------------------

HEAD = ("ranks", "batch", "steps", "step s", "10-90 %", "data wait s", "text tok/s", "per rank", "efficiency", "MFU", "bubble",
        "state")  # fmt: skip


def rows(group: Group) -> list[tuple[str, ...]]:
    """The table's cells, its head first."""

    def cell(value: float | None, form: str) -> str:
        return MISSING if value is None else format(value, form)

    table: list[tuple[str, ...]] = [HEAD]
    for run in group.runs:
        means = run.means
        table.append((
            cell(run.num_gpus, "d"),
            cell(run.global_batch, "d"),
            f"{run.measured_steps}",
            cell(run.step_seconds, ".3f"),
            MISSING if run.spread is None else f"{run.spread[0]:.3f}-{run.spread[1]:.3f}",
            cell(means.get("data_wait_seconds"), ".3f"),
            cell(means.get("text_tokens_per_second"), ",.0f"),
            cell(run.per_gpu, ",.0f"),
            cell(group.efficiency(run), ".3f"),
            cell(means.get("mfu"), ".3f"),
            cell(means.get("bubble"), ".3f"),
            run.state,
        ))  # fmt: skip
    return table


def notes_on(group: Group) -> list[str]:
    """What the table does not say by itself."""
    notes = [f"steps: measured ones, after warm-up; efficiency: text tok/s per rank against {_name(group.base)}"]
    wants = {"text_tokens_per_second": "", "mfu": ", which takes a GPU whose peak is known",
             "bubble": ", which takes several pipeline stages"}  # fmt: skip
    for key, why in wants.items():
        without = [_name(run) for run in group.runs if run.measured_steps and key not in run.means]
        if without:
            notes.append(f"{SUMS[key]} was not written by {', '.join(without)}{why}")
    notes += [f"{_name(run)} has not finished: {run.state}" for run in group.runs if run.state != "finished"]
    return notes + [f"{_name(run)}: {note}" for run in group.runs for note in run.notes]


def _name(run: Run | None) -> str:
    return "none, since no run has a rate" if run is None else run.folder.name


def terminal(table: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            value.ljust(width) if column == len(widths) - 1 else value.rjust(width)
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def markdown(group: Group, notes: Sequence[str]) -> str:
    """report.md."""
    head, *body = [f"| {' | '.join(value.replace('|', '/') for value in row)} |" for row in rows(group)]
    rule = f"|{'---:|' * (len(HEAD) - 1)}---|"
    pictures = [f"![{name}]({name}.png)" for name in PLOTS]
    return "\n".join([f"# {group.name}", "", head, rule, *body, "", *(f"- {note}" for note in notes), "", *pictures, ""])


# ---- plots and TensorBoard -------------------------------------------------------------------------------------------

PLOTS = ("throughput", "efficiency", "step_time")


def plots(group: Group) -> list[Path]:
    """throughput.png, efficiency.png and step_time.png over the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    measured = [run for run in group.runs if run.per_gpu]
    sizes: list[int] = [run.num_gpus or 0 for run in measured]
    files = []
    for name in PLOTS:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        axes.set(xlabel="ranks (GPUs)", xscale="log", title=f"{group.name}: {name.replace('_', ' ')}")
        if name == "throughput":
            axes.plot(sizes, [run.means["text_tokens_per_second"] for run in measured], "o-", label="measured")
            base = measured[0].per_gpu if measured else None
            axes.plot(sizes, [size * (base or 0) for size in sizes], "--", color="grey", label="ideal")
            axes.set(ylabel="text tokens per second", yscale="log" if measured else "linear")
            axes.legend()
        elif name == "efficiency":
            axes.plot(sizes, [group.efficiency(run) or 0.0 for run in measured], "o-")
            axes.axhline(1.0, linestyle="--", color="grey")
            axes.set(ylabel="efficiency against the smallest run")
            axes.set_ylim(bottom=0)
        else:
            middles = [run.step_seconds or 0 for run in measured]
            spreads = [run.spread or (0.0, 0.0) for run in measured]
            below = [middle - low for middle, (low, _) in zip(middles, spreads, strict=True)]
            above = [high - middle for middle, (_, high) in zip(middles, spreads, strict=True)]
            axes.errorbar(sizes, middles, [below, above], fmt="o-", capsize=4)
            axes.set(ylabel="seconds of a step: median, 10th to 90th percentile")
            axes.set_ylim(bottom=0)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        files.append(group.out / f"{name}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files


def tensorboard(group: Group) -> Path:
    """A run in which a step is a number of GPUs; an earlier report's is replaced."""
    from torch.utils.tensorboard import SummaryWriter

    folder = group.out / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for run in group.runs:
            points = {
                "scaling/efficiency": group.efficiency(run),
                "scaling/text_tokens_per_second": run.means.get("text_tokens_per_second"),
                "scaling/text_tokens_per_second_per_rank": run.per_gpu,
                "scaling/step_seconds": run.step_seconds,
                "scaling/mfu": run.means.get("mfu"),
                "scaling/bubble_fraction": run.means.get("bubble"),
            }
            for tag, value in points.items():
                if value is not None and run.num_gpus:
                    writer.add_scalar(tag, value, run.num_gpus)
    return folder


if __name__ == "__main__":
    run_main(main)
