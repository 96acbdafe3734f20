"""The doctor names what is wrong and what to do about it; only what training needs makes its exit code 1."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from himix_megatron.runtime.process import free_port
from tests.support import ROOT
from tools.doctor import __main__ as doctor
from tools.doctor import machine, network, software
from tools.doctor.finding import Finding
from tools.doctor.network import Member, judge_pairs, judge_versions, rounds_of


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)


def lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by what they are about."""
    monkeypatch.setattr(sys, "argv", ["doctor", *words, "--json"])
    code = doctor.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {finding["what"]: finding for finding in found}


def test_a_machine_that_can_train_is_told_so(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", str(mixed_dataset), "--folder", str(tmp_path), "--recipe", "tiny_align")
    code, found = lines(monkeypatch, capsys, *words)
    assert code == 0, found
    for what in (
        "python",
        "torch",
        "megatron-core",
        "ray",
        "tensorboard",
        "packages",
        "folder",
        "dataset",
        "tokenizer",
        "ports",
    ):
        assert found[what]["state"] in ("ok", "warning"), found[what]
    assert re.search(r"40 samples in \d+ shards", found["dataset"]["detail"])
    for what in (
        "gpu",
        "nccl",
        "transformer engine",
        "apex",
        "flash attention",
        "slurm",
        "shared memory",
        "browser",
        "network",
    ):
        assert any(name.startswith(what) for name in found), what
    assert not list(tmp_path.iterdir())


def test_what_is_missing_for_training_is_named_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", str(tmp_path), "--tower", str(tmp_path), "--tokenizer", str(tmp_path), "--folder", "/proc")
    code, found = lines(monkeypatch, capsys, *words)
    assert code == 1
    wanted = {
        "dataset": "is not a shard dataset (no manifest.json): make one with python -m pipelines.preprocess",
        "tower": "has no config.json",
        "tokenizer": str(tmp_path),
        "folder": "/proc (proc): ",
    }
    for what, words_ in wanted.items():
        assert found[what]["state"] == "broken"
        assert words_ in found[what]["detail"], found[what]


def test_a_damaged_dataset_is_broken(mixed_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed_dataset, tmp_path / "cut")
    tar = sorted((tmp_path / "cut" / "shards").glob("*.tar"))[1]
    os.truncate(tar, tar.stat().st_size - 512)
    assert "run the preprocessing again" in software.dataset(str(tmp_path / "cut")).detail
    shutil.copytree(mixed_dataset, tmp_path / "flipped")
    first = sorted((tmp_path / "flipped" / "shards").glob("*.tar"))[0]
    data = bytearray(first.read_bytes())
    data[512:600] = bytes(88)
    first.write_bytes(data)
    finding = software.dataset(str(tmp_path / "flipped"))
    assert (finding.state, finding.needed) == ("broken", True)
    assert "--verify" in finding.remedy


def test_another_models_tokenizer_is_broken() -> None:
    finding = software.tokenizer("bytes", 100)
    assert "has 260 tokens, the model 100" in finding.detail
    assert Finding.code([finding]) == 1


def test_fused_kernels_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """The namesake of Apex; flash attention that does not load; Transformer Engine without what it needs."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("import no_such_dependency\n")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('Pyramid')\n")
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    script = "from tools.doctor.software import fused_kernels\nfor one in fused_kernels(): print(one.what, one.state, one)"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^apex broken .*it is not NVIDIA Apex .*pip uninstall apex", shown, re.MULTILINE), shown
    assert re.search(r"^flash attention broken .*undefined symbol", shown, re.MULTILINE), shown
    assert re.search(r"^transformer engine broken .*it needs no_such_dependency, which is not installed", shown, re.MULTILINE)


def test_triton_that_finds_no_compiler_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    found = SimpleNamespace(triton=True)
    monkeypatch.setattr(software.metadata, "version", lambda _: "3.6.0")
    assert software.triton_kernels(found).state == "ok"  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(software, "_attend_in_triton", fail)
    finding = software.triton_kernels(found)  # type: ignore[arg-type]
    assert (finding.state, "Failed to find C compiler" in finding.detail, "python3-dev" in finding.remedy) == (
        "broken",
        True,
        True,
    )
    assert software.triton_kernels(SimpleNamespace(triton=False)).state == "missing"  # type: ignore[arg-type]


def test_packages_that_are_absent_or_of_another_version_are_named() -> None:
    found = {finding.what: finding for finding in software.packages(["no-such-thing >= 1", "numpy >= 99", "pillow >= 1"])}
    assert found["packages"].state == "broken"
    assert "no-such-thing is not installed; numpy is " in found["packages"].detail
    assert software.python((3, 9)).state == "broken"


def test_slurm_without_a_controller_is_broken_but_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.slurm().state == "missing"
    assert software.browser().state == "missing"
    (tmp_path / "sbatch").symlink_to("/bin/true")
    assert software.slurm().detail == "no srun and no scontrol"
    monkeypatch.undo()
    if shutil.which("scontrol"):
        conf = tmp_path / "slurm.conf"
        conf.write_text(f"ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort={free_port()}\nMessageTimeout=2\n")
        monkeypatch.setenv("SLURM_CONF", str(conf))
        finding = software.slurm()
        assert (finding.state, finding.needed) == ("broken", False)
        assert "no controller answers" in finding.detail


def test_limits_are_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        finding = machine.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (finding.state, finding.detail) == ("warning", "limit 512")
    assert "ulimit -n" in finding.remedy
    assert machine.space("free space", tmp_path / "none", 1.0, "make it").state == "broken"


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    """Somebody who accepts connections there and says nothing."""
    with socket.create_server(("127.0.0.1", port)):
        yield


def test_a_busy_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = next(port for port in range(20000, 32000) if port not in machine.listening())
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert [finding.state for finding in machine.ports()][-1] == "ok"
    with listening(port):
        several, master = machine.ports()
    assert str(port) in several.detail
    assert (master.state, master.needed) == ("broken", True)
    assert f"MASTER_PORT {port} is in use" in master.detail


# ---- several ranks -----------------------------------------------------------------------------------------------------


def start_rank(
    rank: int, port: int, folder: Path, *, address: str = "127.0.0.1", seconds: float = 20.0
) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-m", "tools.doctor", "--folder", str(folder), "--timeout-seconds", str(seconds)],
        cwd=ROOT, env={**os.environ, **{name: str(value) for name, value in place.items()}}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ranks_under_torchrun_measure_each_other(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tools.doctor"]
    done = subprocess.run([*torchrun, "--folder", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^ok +network +1 pairs of 1 node by TCP: [\d.]+ Gbit/s to [\d.]+ Gbit/s, latency \d+", done.stdout, re.MULTILINE
    )
    assert re.search(r"^ok +all-reduce +gloo, 2 ranks: 16 MiB in \d+ ms", done.stdout, re.MULTILINE)
    assert done.stdout.count("python  ") == 1, "rank 0 alone prints"


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path: Path) -> None:
    port = free_port()
    lead = start_rank(0, port, tmp_path, seconds=8)
    shown, _ = lead.communicate(timeout=120)
    assert lead.returncode == 1
    assert re.search(r"^broken +network +1 of 2 ranks did not come: 1: ", shown, re.MULTILINE), shown


def test_a_wrong_address_or_port_is_one_line_and_no_hang(tmp_path: Path) -> None:
    port = free_port()
    with listening(port):  # somebody else's, who does not answer
        ranks = [start_rank(1, port, tmp_path, seconds=5), start_rank(1, free_port(), tmp_path, seconds=5)]
        ranks.append(start_rank(1, port, tmp_path, address="no-such-node.invalid", seconds=5))
        shown = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (out, err) in zip(ranks, shown, strict=True):
        assert rank.returncode == 1
        assert len(re.findall(r"^broken +network +rank 1 of 2 cannot meet the others at ", out, re.MULTILINE)) == 1, out
        assert "Traceback" not in err


def test_a_pair_that_does_not_answer_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Member(1, "n2", "127.0.0.1", silent.getsockname()[1])
        begun = time.monotonic()
        with pytest.raises(OSError, match="timed out"):
            network.ask(peer, 0.5)
        assert time.monotonic() - begun < 5
    with pytest.raises(ConnectionRefusedError):
        network.ask(peer, 0.5)
    members = [Member(0, "n1", "10.0.0.1", 4000), Member(8, "n2", "10.0.0.2", 4001)]
    finding = judge_pairs(members, [(0, 1)], {0: {"error": "timed out"}})[0]
    assert finding.detail == "n1 (rank 0) and n2 (rank 8) do not reach each other: timed out (10.0.0.2:4001)"
    assert Finding.code([finding]) == 1


def measured(rate: float) -> dict[str, float | None]:
    return {"error": None, "latency_seconds": 1e-4, "bytes_per_second": rate}


def test_slow_pairs_and_versions_are_judged() -> None:
    members = [Member(rank, f"n{rank + 1}", "10.0.0.1", 1) for rank in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    found = judge_pairs(members, pairs, {0: measured(1.2e9), 1: measured(1.2e9), 2: measured(2e8)})
    assert [(finding.what, finding.state) for finding in found] == [("network", "ok"), ("slow pair", "warning")]
    assert found[1].detail == "n2 (rank 1) and n3 (rank 2): 1.6 Gbit/s, the median is 9.6 Gbit/s"
    same = judge_versions({"n1": {"torch": "2.13"}, "n2": {"torch": "2.13"}})
    other = judge_versions({"n1": {"torch": "2.13"}, "n2": {"torch": "2.12"}})
    assert [finding.state for finding in (*same, *other)] == ["ok", "broken"]
    assert other[0].detail == "torch: 2.13 on n1; 2.12 on n2"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 12])
def test_rounds_have_every_pair_of_few_and_a_ring_of_many_and_nobody_twice(count: int) -> None:
    rounds = rounds_of(count)
    pairs = [pair for one in rounds for pair in one]
    assert all(len({place for pair in one for place in pair}) == 2 * len(one) for one in rounds)
    assert len(set(pairs)) == len(pairs) == (count * (count - 1) // 2 if count <= 8 else count)
    assert {place for pair in pairs for place in pair} == (set(range(count)) if count > 1 else set())
