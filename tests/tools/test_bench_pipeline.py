"""The pipeline's benchmark runs, and says yes or no by its own figures."""

from __future__ import annotations

from pathlib import Path

from tests.support.ranks import run_ranks
from tools.bench.pipeline import CACHED, PLACEMENTS, Arguments, bench, report, work


def ranks(size: int, folder: Path) -> None:
    run_ranks(work, size, folder, start_gloo=False)


def test_it_measures_every_placement_with_equal_losses(tmp_path: Path) -> None:
    said: list[str] = []
    arguments = Arguments(stages=(2,), steps=2, samples=4, layers=2, hidden=32)
    bench(arguments, tmp_path, said.append, start=ranks)  # sizes at which overheads rule: the ratio means nothing
    assert "2 stages: slowest over fastest rank" in said[0]
    spread = float(said[0].split("placements differ by ")[1].split()[0])
    assert spread <= 1e-5
    assert [line.split(", ")[1].split("  ")[0] for line in said[3:]] == [*PLACEMENTS, CACHED]


def test_a_missed_line_is_told() -> None:
    def found(cpu: list[float], loss: float) -> dict[str, object]:
        return {"cpu": cpu, "wall": 1.0, "losses": [loss]}

    sized = {"tower_seconds": 1.0, "decoder_seconds": 1.0}
    even = {name: found([1.0, 1.09], 2.0) for name in (*PLACEMENTS, CACHED)}
    assert report(Arguments(), sized, {2: even}, print)
    assert not report(Arguments(), sized, {2: even | {"replica_sharded": found([1.0, 1.2], 2.0)}}, print)
    assert not report(Arguments(), sized, {2: even | {"replicated": found([1.0, 1.0], 2.1)}}, print)
    # The other placements are measured to be compared with; cached features are rounded.
    assert report(Arguments(), sized, {2: even | {"first_stage": found([1.0, 3.0], 2.0), CACHED: found([1.0], 2.2)}}, print)
