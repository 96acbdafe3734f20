"""The report of a comparison: what methods reach and cost, and which differences are more than chance.

Flows in: finished arms; out: report.md, report.json and pictures. A method is compared with the baseline at equal steps, and
at what the one of the two that spent less has spent of decoder FLOPs, of total FLOPs and of seconds. Between two measured
points each question's answer is interpolated, from none right before the first step. Pairs are of one seed, which saw the same
samples, and of one question; resamples draw both seeds and questions.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from himix_megatron.evaluation.scoring.bootstrap import crossed_interval
from himix_megatron.runtime.durable_files import publish
from pipelines.comparison.records import Arm, Point

AXES = {"step": "steps", "decoder_flops": "decoder FLOPs", "total_flops": "total FLOPs", "seconds": "seconds"}
SPENT = {"M parameters": ("parameters", 1e-6, ".2f"), "decoder GFLOP a step": ("decoder_flops_of_a_step", 1e-9, ".2f"),
         "GFLOP a step": ("total_flops_of_a_step", 1e-9, ".2f"), "s a step": ("step_seconds", 1, ".3f"),
         "samples/s": ("samples_per_second", 1, ".0f"), "peak GiB": ("memory_gib", 1, ".2f"),
         "first token, ms": ("first_token_seconds", 1e3, ".1f"), "answer tokens/s": ("tokens_per_second", 1, ".0f"),
         "right with images shuffled": ("shuffled_accuracy", 1, ".3f")}  # fmt: skip
"""Columns: which number of `summary`, its factor and form."""
Methods = dict[str, dict[int, Arm]]
"""The arms of one world and size, by method and seed."""


def write_report(arms: Sequence[Arm], folder: Path, baseline: str, words: Sequence[str]) -> Path:
    """Write report.md, report.json and pictures. Returns: the path of report.md. Raises: ValueError, as `notes_on`."""
    groups: dict[tuple[str, int], Methods] = {}
    for arm in arms:
        groups.setdefault((arm.world, arm.size), {}).setdefault(arm.method, {})[arm.seed] = arm
    content, pictures = [], []
    for (world, size), methods in sorted(groups.items()):
        content.append({"world": world, "size": size, "baseline": baseline, "notes": notes_on(world, methods),
                        "methods": {method: summary(runs) for method, runs in methods.items()},
                        "differences": differences(methods, baseline)})  # fmt: skip
        pictures.append(accuracy_picture(methods, folder, f"{world}-{size}"))
    for world in sorted({world for world, _ in groups}):
        sizes = [methods for (own, _), methods in sorted(groups.items()) if own == world]
        pictures += [loss_picture(sizes, folder, f"{world}-loss")] if len(sizes) > 1 else []
    number = sum(len(group["differences"]) for group in content)
    lines = [
        f"# {folder.name}\n\n    python -m pipelines.compare {shlex.join(words)}\n",
        "Accuracy: held-out answers exactly right. In brackets: 95 % bootstrap interval over seeds and questions. A difference",
        f"is significant where zero is outside; of {number} differences, chance alone makes some {number / 20:.0f} so. Of one",
        "to three seeds intervals are narrow: read them with the curves.\n",
        *(line for group in content for line in section(group)),
        *(f"![{name}]({name})" for name in pictures),
    ]
    publish(folder / "report.json", (json.dumps(content, indent=1) + "\n").encode())
    publish(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return folder / "report.md"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def marks_of(point: Point) -> npt.NDArray[np.float64]:
    """float[questions]: 1 where right, by kind of question."""
    return np.array([float(mark) for kind in sorted(point.correct) for mark in point.correct[kind]])


def answers_at(arms: Sequence[Arm], axis: str, amount: float) -> npt.NDArray[np.float64]:
    """float[arms, questions], 0 to 1: right answers when so much has been spent."""
    rows = []
    for curve in (arm.measured.curve for arm in arms):
        spent = [0.0, *(getattr(point, axis) for point in curve)]
        right = [np.zeros(len(marks_of(curve[0]))), *map(marks_of, curve)]
        after = min(int(np.searchsorted(spent, amount)), len(curve))
        share = (amount - spent[after - 1]) / (spent[after] - spent[after - 1])
        rows.append((1 - share) * right[after - 1] + share * right[after])
    return np.stack(rows)


def differences(methods: Methods, baseline: str) -> list[dict[str, Any]]:
    """Of each method's accuracy to the baseline's, when both have spent `amount` of an axis; none without the baseline."""
    found = []
    for method, axis in ((method, axis) for method in methods if method != baseline for axis in AXES):
        seeds = sorted(methods[method].keys() & methods.get(baseline, {}).keys())
        if not seeds:
            continue
        pair = [[methods[name][seed] for seed in seeds] for name in (method, baseline)]
        amount = min(getattr(arm.measured.curve[-1], axis) for arms in pair for arm in arms)
        own, other = (answers_at(arms, axis, amount) for arms in pair)
        interval = crossed_interval(own - other)
        verdict = "better" if interval.low > 0 else "worse" if interval.high < 0 else "not significant"
        found.append({"method": method, "axis": axis, "amount": amount, "seeds": seeds, "accuracy": float(own.mean()),
                      "difference": dataclasses.asdict(interval), "verdict": verdict})  # fmt: skip
    return found


def summary(runs: Mapping[int, Arm]) -> dict[str, Any]:
    """One method's numbers at the end, means over seeds."""
    measured = [arm.measured for arm in runs.values()]
    ends = [each.curve[-1] for each in measured]
    found: dict[str, Any] = {"seeds": sorted(runs), "steps": ends[0].step, "heldout_loss": [end.heldout_loss for end in ends]}
    for axis in ("decoder_flops", "total_flops"):
        found[f"{axis}_of_a_step"] = fmean(getattr(end, axis) / end.step for end in ends)
    for name in (name for name, _, _ in SPENT.values() if name not in found):
        found[name] = fmean(getattr(each, name) for each in measured)
    found["accuracy"] = dataclasses.asdict(crossed_interval(np.stack([marks_of(end) for end in ends])))
    found["accuracy_by_kind"] = {
        kind: fmean(end.correct[kind].count("1") / len(end.correct[kind]) for end in ends) for kind in sorted(ends[0].correct)
    }
    return found


def notes_on(world: str, methods: Methods) -> list[str]:
    """What is not alike among arms. Raises: ValueError where they were asked different questions."""
    arms, notes = [arm for runs in methods.values() for arm in runs.values()], []
    if len({arm.measured.heldout for arm in arms}) > 1:
        raise ValueError(f"arms of {world} were asked different held-out questions: use another EXPERIMENT for other data")
    for what, values in {
        "seeds; pairs are of those that both have": {" ".join(map(str, sorted(runs))) for runs in methods.values()},
        "settings": {arm.settings for arm in arms},
        "devices, so seconds differ with them": {arm.measured.device for arm in arms},
        **{f"samples with seed {seed}": {arm.measured.samples[:12] for arm in arms if arm.seed == seed}
           for seed in sorted({arm.seed for arm in arms})},
    }.items():  # fmt: skip
        notes += [f"different {what}: {'; '.join(sorted(values))}"] if len(values) > 1 else []
    lost = sum(arm.measured.lost_points for arm in arms)
    return [*notes, *([f"kills took the numbers of {lost} steps; the mean of the others stands in"] if lost else [])]


# ---- Markdown --------------------------------------------------------------------------------------------------------


def section(group: Mapping[str, Any]) -> list[str]:
    """A world's tables, and what is significant in words."""
    methods, by_method, baseline = group["methods"], {}, group["baseline"]
    for one in group["differences"]:
        by_method.setdefault(one["method"], {})[one["axis"]] = one
    kinds = list(next(iter(methods.values()))["accuracy_by_kind"])
    costs = [[name, *(f"{factor * own[key]:{form}}" for key, factor, form in SPENT.values())] for name, own in methods.items()]
    right = [[name, bracket(own["accuracy"], ".3f"), *(f"{own['accuracy_by_kind'][kind]:.3f}" for kind in kinds)]
             for name, own in methods.items()]  # fmt: skip
    lines = [f"## {group['world']}, width {group['size']}\n", *table(["at the end", "accuracy", *kinds], right)]
    if by_method:
        rows = [[method, *(cell(found[axis]) for axis in AXES)] for method, found in by_method.items()]
        lines += table([f"less {baseline}, at equal", *AXES.values()], rows)
    for verdict in ("better", "worse", "not significant"):
        said = [
            f"{method} ({', '.join(axes)})"
            for method, found in by_method.items()
            if (axes := [AXES[axis] for axis, one in found.items() if one["verdict"] == verdict])
        ]
        lines += [f"- **{verdict}**, against {baseline} at equal ...: {'; '.join(said)}"] if said else []
    return [*lines, *(f"- {note}" for note in group["notes"]), "", *table(["costs", *SPENT], costs)]


def cell(one: Mapping[str, Any]) -> str:
    """Difference, interval, verdict, and at how much."""
    text = bracket(one["difference"], "+.3f")
    amount = f"{one['amount'] / 1e12:.3g} T" if one["axis"].endswith("flops") else f"{one['amount']:.0f}"
    return f"{text if one['verdict'] == 'not significant' else f'**{text}**'} at {amount}"


def bracket(interval: Mapping[str, float], form: str) -> str:
    """Value [low, high]."""
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, and an empty line."""
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)), ""]


# ---- pictures --------------------------------------------------------------------------------------------------------


def accuracy_picture(methods: Methods, folder: Path, title: str) -> str:
    """Accuracy over steps, decoder FLOPs and total FLOPs. Returns: the file's name."""
    figure, panels = _pyplot().subplots(1, 3, figsize=(15, 4.5), layout="constrained", sharey=True)
    for method, runs in methods.items():
        points = list(zip(*(arm.measured.curve for arm in runs.values()), strict=True))
        found = [crossed_interval(np.stack([marks_of(point) for point in each])) for each in points]
        for axis, panel in zip(AXES, panels, strict=False):
            spent = [0.0, *(fmean(getattr(point, axis) for point in each) for each in points)]
            panel.plot(spent, [0.0, *(one.value for one in found)], "o-", markersize=3, label=method)
            panel.fill_between(spent, [0.0, *(one.low for one in found)], [0.0, *(one.high for one in found)], alpha=0.15)
            panel.set(xlabel=AXES[axis], ylim=(0, 1))
    panels[0].set(ylabel="held-out accuracy, 95 % interval", title=title)
    panels[0].legend()
    return _saved(figure, folder, title)


def loss_picture(sizes: Sequence[Methods], folder: Path, title: str) -> str:
    """Held-out loss at the end over total FLOPs, a line for each method. Returns: the file's name."""
    figure, panel = _pyplot().subplots(figsize=(6, 4.5), layout="constrained")
    for method in dict.fromkeys(method for methods in sizes for method in methods):
        ends = [[arm.measured.curve[-1] for arm in methods[method].values()] for methods in sizes if method in methods]
        losses = [np.nanmean([end.heldout_loss or np.nan for end in each]) for each in ends]
        panel.plot([fmean(end.total_flops for end in each) for each in ends], losses, "o-", label=method)
    panel.set(xlabel="total FLOPs", ylabel="held-out loss", xscale="log", yscale="log", title=title)
    panel.legend()
    return _saved(figure, folder, title)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    return pyplot


def _saved(figure: Any, folder: Path, title: str) -> str:
    figure.savefig(folder / f"{title}.png", dpi=110)
    _pyplot().close(figure)
    return f"{title}.png"
