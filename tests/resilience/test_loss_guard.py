"""Losses and gradients that are not finite, spikes of the loss, replicas that differ, memory that runs out."""

from __future__ import annotations

import hashlib
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.config import Config, HealthConfig
from himix_megatron.data.loading.plan import START
from himix_megatron.resilience.journal import Journal
from himix_megatron.resilience.loss_guard import LossGuard
from himix_megatron.resilience.replica_check import bitwise_hash
from tests.support.processes import Ranks, resilience_config
from tests.support.ranks import run_ranks


def state_hash(model_chunks: list[Any], optimizer: Any) -> str:
    """Hex SHA-256 over the hashes of all parameters and all of the optimizer's state (fp32 main weights, moments, step
    counters), on all ranks; all ranks call it. The same at the same layout for the same training state, bit for bit."""
    from himix_megatron.distributed.megatron_config import optimizer_parts
    from himix_megatron.model.himix_model import unwrap_model

    own = hashlib.sha256()

    def add(tensor: Any) -> None:
        own.update(f"{int(bitwise_hash(torch.as_tensor(tensor)))} ".encode())

    for model_chunk in model_chunks:
        for parameter in unwrap_model(model_chunk).parameters():
            add(parameter)
    for part in optimizer_parts(optimizer):
        for group in () if part.is_stub_optimizer else part.optimizer.param_groups:
            for parameter in group["params"]:
                add(parameter)
                for _, value in sorted(part.optimizer.state.get(parameter, {}).items()):
                    add(value)
    gathered: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own.hexdigest())
    return " ".join(map(str, gathered))


def hashes_of(config: Config, poison: tuple[int, tuple[int, ...]] | None = None) -> tuple[int, list[str]]:
    """Train. `poison`: on this rank one gradient is not a number at these steps. Returns: the exit code, and the hash of
    parameters and optimizer after each step."""
    from himix_megatron.model.himix_model import unwrap_model
    from himix_megatron.training import loop, train_step

    found: list[str] = []
    norm, step = train_step.gradient_norm, loop.train_step
    calls = 0

    def poisoned(optimizer: Any) -> float:
        nonlocal calls
        calls += 1
        if poison is not None and torch.distributed.get_rank() == poison[0] and calls in poison[1]:
            # A weight that tensor ranks all hold, so that only rank 0's counts for the norm.
            weights = dict(unwrap_model(model_chunks[0]).named_parameters())
            name = next(name for name in weights if name.endswith("vision_norm.weight"))
            weights[name].main_grad.view(-1)[3] = math.nan
        return norm(optimizer)

    def noted(config: Config, run: Any, *arguments: Any) -> Any:
        nonlocal model_chunks
        model_chunks = run.model_chunks
        result = step(config, run, *arguments)
        found.append(state_hash(run.model_chunks, run.optimizer))
        return result

    model_chunks: list[Any] = []
    train_step.gradient_norm, loop.train_step = poisoned, noted
    return loop.pretrain(config), found


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2}, {"distributed_optimizer": True, "precision": "bf16"}],
    ids=["data 2", "tensor 2", "pipeline 2", "data 2, distributed bf16"],
)
def test_nan_on_one_rank_updates_no_rank(mixed_dataset: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    config = resilience_config(mixed_dataset, tmp_path, steps=4, **layout)
    results = run_ranks(hashes_of, 2, config, (1, (3,)), start_gloo=False)
    for code, hashes in results:
        assert code == 0
        assert hashes == results[0][1]  # of all ranks together
        assert hashes[2] == hashes[1]
        assert len(set(hashes)) == 3
    assert "step 3: the loss or a gradient is not finite" in (tmp_path / "log" / "rank-000.log").read_text()


def test_too_many_steps_that_are_not_finite_stop_the_run(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(mixed_dataset, tmp_path, health={"max_skipped_steps": 1})
    results = run_ranks(hashes_of, 2, config, (1, (2, 4)), start_gloo=False)
    assert [(code, len(hashes)) for code, hashes in results] == [(3, 4), (3, 4)]
    assert "2 of the last 1000 steps, more than health.max_skipped_steps 1" in (tmp_path / "STOP").read_text()


# ---- spikes --------------------------------------------------------------------------------------------------------


def judged(health: LossGuard, step: int, loss: float, *, can_roll_back: bool = True) -> str:
    health.begin_step(step, can_roll_back=can_roll_back)
    return health.check(loss, True).action


def test_a_spike_is_what_lies_k_deviations_above_the_recent_losses() -> None:
    for action, becomes in (("none", "update"), ("skip", "skip"), ("rollback", "rollback")):
        health = LossGuard(HealthConfig(spike_action=action, spike_sigmas=3, spike_window_steps=4))  # type: ignore[arg-type]
        assert [judged(health, step, loss) for step, loss in enumerate((9.0, 1.0, 50.0, 1.0), 1)] == ["update"] * 4
        for step, loss in enumerate((2.0, 2.2, 2.0, 2.2), 5):
            judged(health, step, loss)  # mean 2.1, deviation 0.1
        assert judged(health, 9, 2.39) == "update"
        assert judged(health, 10, 3.2) == becomes
    assert judged(health, 11, 3.2, can_roll_back=False) == "skip"


def test_rollbacks_and_skips_are_bounded() -> None:
    settings = HealthConfig(spike_action="rollback", spike_window_steps=2, max_rollbacks=2, max_skipped_steps=1)
    state = {"losses": [1.0, 1.0], "skipped": []}
    assert judged(LossGuard(settings, state, num_rollbacks=1), 5, 9.0) == "rollback"
    assert judged(LossGuard(settings, state, num_rollbacks=2), 5, 9.0) == "stop"
    health = LossGuard(replace(settings, spike_action="skip"), state)
    assert [judged(health, step, 9.0) for step in (5, 6)] == ["skip", "stop"]
    health = LossGuard(replace(settings, spike_action="skip"), state)
    assert [judged(health, step, 9.0) for step in (5, 1006)] == ["skip", "skip"]  # forgotten after 1,000 steps


def spiking(config: Config, die_at: int | None = None) -> tuple[int, list[str]]:
    """Train with a loss 100 times what it is where the data stands at 64 samples. `die_at`: kill this process in that step,
    once it has rolled back."""
    from himix_megatron.runtime import failpoints
    from himix_megatron.training import train_step

    count = train_step.count

    def count_with_spike(config: Config, topology: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        counts, *others = count(config, topology, batch, *arguments, **options)
        return (replace(counts, loss=100 * counts.loss) if batch.after.samples == 64 else counts), *others

    def die(point: str, _: bool) -> None:
        journal = config.run_dir / "journal.jsonl"
        if point == "step/end" and die_at is not None and '"rollback"' in journal.read_text():
            os.kill(os.getpid(), signal.SIGKILL)

    train_step.count = count_with_spike
    failpoints.listeners.append(die)
    return hashes_of(config)


ROLLBACK = {"spike_action": "rollback", "spike_window_steps": 4}


def test_a_rollback_leaves_the_spike_out_also_when_it_is_interrupted(mixed_dataset: Path, tmp_path: Path) -> None:
    """Checkpoints at 3 and 6, a spike in step 8: back to 6, on with the ninth batch. A kill right after changes nothing."""
    runs = {}
    for name, die_at in (("whole", None), ("killed", 7)):
        config = resilience_config(
            mixed_dataset,
            tmp_path / name,
            steps=10,
            checkpoint={"interval_steps": 3, "keep_last": 9},
            health=ROLLBACK,
            log={"ledger": True},
        )
        if die_at is not None:
            with pytest.raises(RuntimeError, match="rank 0 died"):
                run_ranks(spiking, 1, config, die_at, start_gloo=False)
        runs[name] = run_ranks(spiking, 1, config, start_gloo=False)[0]
    code, hashes = runs["whole"]
    assert code == 0
    assert len(hashes) == 8 + 4  # 7 steps and the spike; then 7 to 10
    assert runs["killed"][0] == 0
    assert runs["killed"][1] == hashes[-4:]
    log = (tmp_path / "whole" / "log" / "rank-000.log").read_text()
    assert re.search(r"step 8: loss \S+ is a spike \(limit .*\): going back", log)
    told = [line.split('"key": "')[1].split('"')[0] for line in (tmp_path / "whole" / "ledger" / "rank-000.jsonl").open()]
    assert len(told) == 8 * (7 + 4)
    steps = [set(told[first : first + 8]) for first in range(0, len(told), 8)]
    assert not steps[7] & steps[6]


# ---- replicas ------------------------------------------------------------------------------------------------------


def flip(config: Config, victim: int, name: str) -> int:
    """Train; on one rank a bit of a weight flips in step 2."""
    from himix_megatron.model.himix_model import unwrap_model
    from himix_megatron.training import loop

    step, calls = loop.train_step, 0

    def flipped(config: Config, run: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(config, run, *arguments)
        if calls == 2 and run.topology.rank == victim:
            weight = dict(unwrap_model(run.model_chunks[0]).named_parameters())[name].data
            weight.view(torch.int32).view(-1)[5] ^= 1
        return result

    loop.train_step = flipped
    return loop.pretrain(config)


@pytest.mark.parametrize(
    ("ranks", "layout", "who"),
    [
        (3, {"train": {"global_batch_samples": 6}}, "rank 2"),
        (2, {"tensor": 2}, r"one of ranks \[0, 1\]"),
        (4, {"tensor": 2}, r"one of ranks \[1, 3\]"),  # two groups of data ranks, one of which finds nothing
    ],
    ids=["data 3", "tensor 2", "tensor 2, data 2"],
)
def test_a_flipped_bit_is_found_and_named(
    mixed_dataset: Path, tmp_path: Path, ranks: int, layout: dict[str, Any], who: str
) -> None:
    name = "decoder.layers.1.self_attention.vision_norm.weight"
    config = resilience_config(
        mixed_dataset, tmp_path, health={"replica_check_steps": 2}, checkpoint={"interval_steps": 1}, **layout
    )
    assert run_ranks(flip, ranks, config, ranks - 1, name, start_gloo=False) == [3] * ranks
    reason = (tmp_path / "STOP").read_text()
    assert re.match(
        rf"after step 2 {who} holds other bits than its replicas in {re.escape(name)}\. .* checkpoint of step 1", reason
    )


def test_the_hash_of_a_tensor_sees_every_bit_and_every_place() -> None:
    tensor = torch.randn(70_000, generator=torch.Generator().manual_seed(1))  # two chunks
    seen = {int(bitwise_hash(tensor)), int(bitwise_hash(tensor.roll(1)))}
    for place in (0, 1, 69_999):
        for bit in range(32):
            changed = tensor.clone()
            changed.view(torch.int32)[place] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(torch.int32)
            seen.add(int(bitwise_hash(changed)))
    swapped = tensor.clone()
    swapped[[10, 11]] = tensor[[11, 10]]
    seen.add(int(bitwise_hash(swapped)))
    assert len(seen) == 3 + 3 * 32
    assert int(bitwise_hash(tensor)) == int(bitwise_hash(tensor.view(700, 100)))
    for dtype in (torch.bfloat16, torch.float64, torch.uint8, torch.int64):
        assert int(bitwise_hash(torch.ones(3, dtype=dtype))) != int(bitwise_hash(torch.zeros(3, dtype=dtype)))
    assert int(bitwise_hash(torch.tensor(0.0))) != int(bitwise_hash(torch.tensor(-0.0)))


# ---- memory --------------------------------------------------------------------------------------------------------


def use_up_the_memory(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "step/forward" and count == 2:
        torch.empty(1 << 50)


def test_out_of_memory_names_the_settings_to_lower(mixed_dataset: Path, tmp_path: Path) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path), 2, use_up_the_memory) as ranks:
        assert ranks.codes() == [1, 1]
        for rank in (0, 1):
            (line,) = [line for line in ranks.log(rank).splitlines() if "out of memory (" in line]
            for flag in (
                "--train.micro-batch-samples below 2",
                "--train.recompute selective or full",
                "--parallel.tensor above 1",
            ):
                assert flag in line
            assert "Traceback" not in ranks.log(rank)


def test_a_rollback_further_back_leaves_later_detours_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step, samples in ((1000, 10), (1500, 20), (500, 30), (700, 40)):
        journal.record_rollback(step, replace(START, samples=samples), "a spike")
    assert {step: place.samples for step, place in journal.rollback_data_offsets().items()} == {500: 30, 700: 40}
