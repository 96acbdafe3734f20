"""The GPU check's runner, and that its comparisons see what is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from himix_megatron.config import check_ranks
from pipelines.cli import parse, parse_settings
from tests.support import ROOT
from tools.bench.measure import Line
from tools.doctor.software import nvidia_driver
from tools.gpu_check import correctness, end_to_end, layouts, processes
from tools.gpu_check.__main__ import Settings, check_gpus, chosen
from tools.gpu_check.reference import BF16_LIMIT, FP32_LIMIT, Heads, batches, random_batch
from tools.gpu_check.runner import Check, Context, run_checks


def context(out: Path, *, seconds: float = 60.0, tiny: bool = True) -> Context:
    return Context(out, tiny, time.monotonic() + seconds)


def check(name: str, *lines: Line, raises: Exception | None = None, **changes: Any) -> Check:
    def run(_: Context) -> Iterator[Line]:
        yield from lines
        if raises:
            raise raises

    return Check(**{"name": name, "stage": "correctness", "seconds": 1.0, "run": run} | changes)


def written(out: Path) -> list[dict[str, Any]]:
    """All lines but the header, and those that say how long it took."""
    header, *lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert {"device", "driver", "torch", "cuDNN", "NCCL", "transformer-engine", "megatron-core"} <= header.keys()
    return [line for line in lines if line.get("what") != "seconds that it took"]


def test_a_check_that_raises_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        check("broken", Line("first", 1.0, 2.0, at_most=True), raises=OSError("no such luck")),
        check("sound", Line("b", 3)),
    ]
    assert run_checks(checks, context(tmp_path)) == 1
    assert [(line["check"], line.get("what", line.get("error"))) for line in written(tmp_path)] == [
        ("broken", "first"), ("broken", "OSError: no such luck"), ("sound", "b"),
    ]  # fmt: skip
    assert "test_gpu_check.py" in (tmp_path / "errors.txt").read_text()
    shown = capsys.readouterr().out
    assert "1 missed or failed:" in shown
    assert shown.count("no such luck") == 2


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (3.0, 1), (float("nan"), 1)])
def test_a_missed_line_is_the_exit_code(value: float, code: int, tmp_path: Path) -> None:
    assert run_checks([check("a", Line("error", value, 2.0, at_most=True))], context(tmp_path)) == code
    assert not (tmp_path / "errors.txt").exists()
    assert written(tmp_path)[0]["holds"] is (code == 0)


def test_what_does_not_fit_into_the_budget_is_skipped_by_name(tmp_path: Path) -> None:
    checks = [check("long", Line("a", 1), seconds=1000.0), check("short", Line("b", 1))]
    assert run_checks(checks, context(tmp_path, tiny=False)) == 0
    assert [line["check"] for line in written(tmp_path) if "skipped" in line] == ["long"]
    assert [line["check"] for line in written(tmp_path) if "what" in line] == ["short"]


def test_correctness_comes_first_and_whole_before_speed_is_measured(tmp_path: Path) -> None:
    order: list[str] = []

    def slowly(_: Context) -> Iterator[Line]:
        time.sleep(0.3)
        order.append("beside")
        yield Line("a", 1)

    def note(name: str) -> Callable[[Context], Iterator[Line]]:
        return lambda _: iter([Line(name, 1)] if order.append(name) is None else [])

    checks = [
        check("speed", stage="performance", run=note("speed")),
        check("slow", run=slowly, beside=True),
        check("quick", run=note("quick")),
    ]
    assert run_checks(checks, context(tmp_path)) == 0
    assert order == ["quick", "beside", "speed"]


def test_names_are_unique_and_every_check_says_how_long_it_takes() -> None:
    checks = [*correctness.CHECKS, *layouts.CHECKS, *end_to_end.CHECKS]
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.seconds > 0 for check in checks)


def test_the_command_runs_real_checks(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.gpu_check", "--out", tmp_path, "--only", "core-torch-fp32", "continued-bf16"]
    mistaken = subprocess.Popen(
        [*words[:-2], "core-torch-fp23"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )  # beside the other
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["check"] for line in written(tmp_path)} == {"core-torch-fp32", "continued-bf16"}
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl"}
    _, said = mistaken.communicate(timeout=60)
    assert (mistaken.returncode, len(said.splitlines())) == (2, 1)
    assert "core-torch-fp23" in said


# ---- several ranks -----------------------------------------------------------------------------------------------------


def test_a_layout_of_two_ranks_trains_as_one(tmp_path: Path) -> None:
    """One of them, the cheapest: each starts torchrun and its ranks, and tests/integration/test_layouts.py has them all."""
    both = Context(tmp_path, tiny=True, deadline=time.monotonic() + 300, gpus=2)
    [name] = [name for name in layouts.layouts_of(2) if name.startswith("data 2")]
    learned, *compared = layouts.beside_one_rank(both, {name: layouts.layouts_of(2)[name]})
    assert learned.holds
    assert [line.what.split(" from ")[0].removeprefix("largest relative difference of 10 ") for line in compared] == [
        "losses", "gradient norms",
    ]  # fmt: skip
    assert all(0 < line.value < 1e-5 for line in compared)  # not 0: the ranks did add up in another order


def test_a_layout_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([None, processes.ProcessError("hung"), None, None])
    monkeypatch.setattr(layouts, "in_turn", lambda *_: next(ends))
    assert run_checks(layouts.CHECKS, Context(tmp_path, tiny=True, deadline=math.inf, gpus=2)) == 1
    lines = written(tmp_path)
    assert [line["value"] for line in lines[1:-1]] == [math.inf] * 6
    assert "1 of 3 layouts" in lines[-1]["error"]
    assert "hung" in (tmp_path / "errors.txt").read_text()


@pytest.mark.parametrize("gpus", [2, 3, 4, 6, 8, 16])
def test_layouts_fit_their_ranks(gpus: int) -> None:
    found = layouts.layouts_of(gpus)
    assert len(found) == (4 if gpus >= 4 and gpus % 2 == 0 else 3)
    sizes = {check_ranks(parse(["tiny_instruct", *layouts.sizes(gpus), *flags]), gpus) for flags in found.values()}
    assert sizes == {1, gpus, *([gpus // 2] if len(found) == 4 else [])}


def test_gpus_that_there_are_not_are_told_by_the_flag(tmp_path: Path) -> None:
    check_gpus(2, 2)
    check_gpus(2, 0)  # processes stand for them
    with pytest.raises(ValueError, match=r"^--gpus is 8, but this machine shows 2: give --gpus 2.*$"):
        check_gpus(8, 2)
    with pytest.raises(ValueError, match=r"^--gpus is 0: wanted 1 or more$"):
        parse_settings(Settings, ["--out", str(tmp_path), "--gpus", "0"], "python -m tools.gpu_check")
    [check] = layouts.CHECKS
    assert chosen([check], Settings(out=tmp_path)) == []
    assert chosen([check], Settings(out=tmp_path, gpus=2)) == [check]
    with pytest.raises(ValueError, match=r"--only layouts: .* give --gpus 2 or more"):
        chosen([check], Settings(out=tmp_path, only=("layouts",)))


# ---- the comparisons ---------------------------------------------------------------------------------------------------


def wrong_mask(query: Any, key: Any, value: Any, vision_kv: Any, layout: Any) -> Any:
    """As `is_causal` has it: aligned to the top left, the text sees too few of the keys."""
    repeats, text, vision, mixed = query.shape[2] // key.shape[2], 0, 0, []
    for num_text, num_vision in zip(layout.text_lengths, layout.vision_lengths, strict=True):
        own, seen = slice(text, text + num_text), vision_kv[vision : vision + num_vision]
        keys = torch.cat((seen[:, :, 0], key[own, 0])).repeat_interleave(repeats, 1)
        values = torch.cat((seen[:, :, 1], value[own, 0])).repeat_interleave(repeats, 1)
        heads = (x.transpose(0, 1)[None] for x in (query[own, 0], keys, values))
        mixed.append(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1).flatten(1))
        text, vision = text + num_text, vision + num_vision
    return torch.nn.functional.pad(torch.cat(mixed), (0, 0, 0, len(query) - text))[:, None]


def test_a_wrong_mask_is_far_outside_the_limits() -> None:
    worst, cpu = correctness.Worst(), torch.device("cpu")
    correctness.compare_core(worst, wrong_mask, random_batch(0, 30), Heads(4, 2, 16), "bf16", cpu)
    assert worst.figures["values"][0] > 10 * BF16_LIMIT
    assert worst.figures["gradients"][0] > 10 * BF16_LIMIT


def test_a_case_that_raises_is_told_after_the_others() -> None:
    worst = correctness.Worst()
    with worst.case("first"):
        raise KeyError("x")
    with worst.case("second"):
        worst.note("values", float("nan"), "second")
    worst.note("values", 1.0, "third")
    lines = worst.lines({"values": FP32_LIMIT})
    assert "second" in next(lines).what
    with pytest.raises(ExceptionGroup, match="1 cases"):
        next(lines)


def test_packs_of_every_kind_are_tried() -> None:
    tried = batches(90)
    assert {batch.packed for batch in tried} == {True, False}
    assert {count for batch in tried for count in batch.images} == {0, 1, 2, 3}
    assert any(1 in batch.text and len(batch.text) > 1 for batch in tried)
    assert all(sum(random_batch(seed, 90, multiple=16).rows[1:]) % 16 == 0 for seed in range(5))


def test_checks_that_start_at_once_share_a_folder() -> None:
    with ThreadPoolExecutor(8) as pool:
        rooms = list(pool.map(processes.scratch_folder, map(str, range(64))))
    assert len({room.parent for room in rooms}) == 1
    assert all(room.is_dir() for room in rooms)


def test_losses_of_two_runs_are_compared_step_by_step(tmp_path: Path) -> None:
    for name, numbers in {"one": [1.0, 2.0, 3.0], "other": [1.0, 2.5, 3.0], "short": [1.0, math.nan]}.items():
        (tmp_path / name / "ledger").mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": loss.hex()}) for step, loss in enumerate(numbers, 1)]
        (tmp_path / name / "ledger" / "steps.jsonl").write_text("\n".join(lines) + "\n")
    one = tmp_path / "one"
    assert processes.apart(one, tmp_path / "other", [1, 2, 3]) == pytest.approx(0.2)
    assert processes.apart(one, tmp_path / "other", [1, 3]) == 0
    assert processes.apart(one, tmp_path / "short", [1, 2]) == processes.apart(one, tmp_path / "none", [1]) == math.inf


def test_a_process_that_fails_is_told_with_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(processes.ProcessError, match=r"(?s)ended with 3, wanted 0.*the reason"):
        processes.python(context(tmp_path), "-c", "import sys; print('the reason'); sys.exit(3)")
    with pytest.raises(processes.ProcessError, match="when the budget ended"):
        processes.python(context(tmp_path, seconds=0.1), "-c", "import time; time.sleep(60)")
    error = processes.in_turn(context(tmp_path), [("builtins:int", "no number"), ("tools.gpu_check.end_to_end:copied",)])
    assert error
    assert "failed: builtins:int 'no number'" in str(error)
    assert "failed: tools.gpu_check.end_to_end:copied" in str(error)
    hidden = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'] == '')"
    assert processes.python(context(tmp_path), "-c", hidden, on_cpu=True).strip() == "True"


def test_the_budgets_end_is_that_of_ranks_in_sessions_of_their_own_too(tmp_path: Path) -> None:
    starts = "import subprocess as s, time; s.Popen(['sleep', '61.7'], start_new_session=True); time.sleep(60)"
    with pytest.raises(processes.ProcessError, match="when the budget ended"):
        processes.python(context(tmp_path, seconds=3.0), "-c", starts)
    assert ["sleep", "61.7"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27",
        "NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release",
    ],
)
def test_the_driver_is_known_by_its_kernel_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version").write_text(f"NVRM version: {name}\nGCC version:  gcc version 12.3.0\n")
    assert nvidia_driver(tmp_path / "version") == "580.65.06"
    assert nvidia_driver(tmp_path / "none") is None


def test_the_driver_is_asked_for_where_the_kernel_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version").touch()
    assert nvidia_driver(tmp_path / "version") == "of unknown version"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert nvidia_driver(tmp_path / "version") == "570.1"
