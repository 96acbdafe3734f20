"""The planner refuses what cannot fit, agrees with published and measured step times, and prints a command that runs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from himix_megatron.config import METHODS, check_ranks
from himix_megatron.costs.hardware import DEVICES, device_of
from pipelines.cli import parse
from pipelines.recipes import RECIPES
from tools import plan as tool
from tools.planner import published
from tools.planner.cost import step_time
from tools.planner.layouts import Plan, Sample, job_of, layout_of, micro_batch_work, plan_of, plans
from tools.planner.machine import EFFICIENCY, machine_named

SAMPLE = Sample(text_tokens=314, longest_text=2048, images=1, vision_tokens=729, label_share=0.5)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.plan", *words], capture_output=True, text=True, check=False, timeout=120
    )


# ---- published ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: f"{row.name} on {row.gpus} {row.gpu}")
def test_published_steps_are_predicted_within_15_percent(row: published.Row) -> None:
    assert abs(published.error(row)) <= 0.15


def test_two_rows_at_most_are_calibrated_on() -> None:
    rows = [row for row in published.ROWS if published.is_calibrated(row)]
    assert len(rows) == len({row.gpu for row in rows}) == 2
    for row in rows:
        assert published.calibrate(row) == pytest.approx(EFFICIENCY[row.gpu.split("-")[0]], abs=0.001)


def test_a_published_rate_is_turned_into_seconds_as_its_source_counts() -> None:
    # The paper's own example: GPT-3 175B, 300 billion tokens on 1024 A100 at 140 TFLOP/s take 34 days.
    days = 300e9 / (1536 * 2048) * published._table_seconds((96, 12288, 96, 8, 12, 1024, 1536), 140) / 86400
    assert days == pytest.approx(34, abs=1)
    # NVIDIA's recipe: 0.473 of 989 TFLOP/s for Nemotron-4 340B at 4.606 s on 256 GPUs, batch 64.
    [row] = [row for row in published.ROWS if row.name == "Nemotron-4 340B" and row.gpus == 256]
    assert published.counted_flops(row) / (256 * 989e12 * 4.606) == pytest.approx(0.473, abs=0.001)


def test_every_published_row_says_what_it_counts_and_where_it_is_from() -> None:
    lines = list(published.compared())
    assert len(lines) == 1 + len(published.ROWS) + 1 + len({row.source for row in published.ROWS})
    assert all("recomputation" in line for line in lines[1 : 1 + len(published.ROWS)])


# ---- the model ---------------------------------------------------------------------------------------------------------


def best(recipe: str, gpus: int, gpu: str = "h100-80gb") -> Plan:
    return tool.choose(RECIPES[recipe](), machine_named(gpu, None), gpus, SAMPLE)[0]


def test_parts_of_a_step_add_up_and_layouts_are_ordered() -> None:
    machine = machine_named("h100-80gb", None)
    found = tool.choose(RECIPES["llama3_2_3b_instruct"](), machine, 16, SAMPLE)
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    for plan in found:
        time = plan.time
        parts = time.compute + time.tower + time.tensor + time.pipeline + time.data + time.optimizer + time.bubble
        assert time.total == pytest.approx(parts)
        assert plan.peak_gib <= machine.memory_gib
        assert plan.layout.ranks == 16
        assert 0 < plan.utilisation(machine, tower=False) < plan.utilisation(machine, tower=True) < 0.7


def test_more_virtual_stages_leave_less_bubble_and_hold_more() -> None:
    machine, config = machine_named("h100-80gb", None), RECIPES["vicuna_7b_instruct"]()
    found = {
        plan.layout.virtual_pipeline: plan
        for plan in plans(config, machine, 4, SAMPLE)
        if (plan.layout.pipeline, plan.config.micro_batch, plan.layout.recompute) == (4, 4, "none")
    }
    assert found[1].time.bubble > found[2].time.bubble > found[4].time.bubble
    assert found[1].memory[0].activations < found[2].memory[0].activations


def test_recomputing_takes_time_and_saves_memory() -> None:
    machine, config = machine_named("h100-80gb", None), RECIPES["vicuna_7b_instruct"]()
    none, full = (
        next(
            plan
            for plan in plans(config, machine, 8, SAMPLE)
            if (plan.layout.tensor, plan.config.micro_batch, plan.layout.recompute) == (8, 4, recompute)
        )
        for recompute in ("none", "full")
    )
    assert full.seconds > 1.2 * none.seconds
    assert full.memory[0].activations < 0.2 * none.memory[0].activations
    assert full.flops.model == none.flops.model
    assert full.flops.hardware > none.flops.hardware


def test_a_slower_network_costs_data_parallelism() -> None:
    config = RECIPES["vicuna_7b_instruct"]()
    layout = replace(layout_of(config, 64), overlap_data=False)
    computed, _, _ = micro_batch_work(config, SAMPLE)
    job = job_of(config, computed, 1, 0.0)
    fast, slow = (step_time(machine_named("h100-80gb", name), layout, job) for name in ("ib-ndr-400", "ethernet-100"))
    assert slow.data > 10 * fast.data
    assert (slow.compute, slow.bubble) == (fast.compute, fast.bubble)


def test_packs_are_planned_too() -> None:
    arguments = tool.Arguments(
        recipe="llama3_2_1b_instruct", gpus=8, global_batch=16, pack_max_text_tokens=4096, pack_max_vision_tokens=8748
    )
    config, sample = tool.settings(arguments)
    plan = tool.choose(config, machine_named("h100-80gb", None), 8, sample)[0]
    assert plan.config.micro_batch == 1
    # 12 images, or 4096 tokens of text: the images fill a pack first.
    assert plan.samples == pytest.approx(16 * 12)
    words = shlex.split(tool.command(plan, 8))
    assert parse(words[words.index("llama3_2_1b_instruct") :]) == plan.config


def test_images_of_other_sizes_are_planned_by_their_tokens() -> None:
    tiny = RECIPES["tiny_instruct"]()
    config = replace(tiny, vision=replace(tiny.vision, tower="tiny_native", image_size=96))  # at most 144 tokens

    def first(tokens: float) -> Plan:
        return tool.choose(config, machine_named("h100-80gb", None), 2, replace(SAMPLE, vision_tokens=tokens))[0]

    few, many = first(36), first(144)
    assert many.flops.tower > 4 * few.flops.tower  # attention is within an image
    assert many.flops.language > few.flops.language
    assert many.memory[0].features > few.memory[0].features
    assert many.memory[0].activations == few.memory[0].activations  # those of the largest images


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "gpus"), [("qwen2_0_5b_align", 8), ("llama3_2_3b_instruct", 64), ("vicuna_7b_instruct", 4)])
def test_the_printed_command_is_one_that_a_run_accepts(recipe: str, gpus: int) -> None:
    plan = best(recipe, gpus)
    words = shlex.split(tool.command(plan, 8))
    config = parse(words[words.index(recipe) :])
    assert config == plan.config
    assert check_ranks(config, gpus) == plan.layout.data


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_and_its_command_parses(method: str) -> None:
    flags = ["--method", method, "--parallel.split", "balanced"]
    config, sample = tool.settings(tool.Arguments(recipe="vicuna_7b_instruct", gpus=8), flags)
    plan = tool.choose(config, machine_named("a100-80gb", None), 8, sample)[0]
    words = shlex.split(tool.command(plan, 8, flags))
    assert parse(words[words.index("vicuna_7b_instruct") :]) == plan.config
    assert plan.config.injection == METHODS[method](config.model)
    assert 0 < plan.utilisation(machine_named("a100-80gb", None), tower=True) < 1


def test_planned_seconds_follow_the_method() -> None:
    """On one layout: what costs more FLOPs takes longer, and stages without vision hold no features."""

    def plan(method: str) -> Plan:
        config = RECIPES["vicuna_7b_instruct"]()
        parallel = replace(config.parallel, tensor=4, pipeline=2)
        config = replace(config, injection=METHODS[method](config.model), parallel=parallel)
        return plan_of(config, machine_named("a100-80gb", None), 1, SAMPLE)

    found = {method: plan(method) for method in METHODS}
    order = sorted(METHODS, key=lambda method: found[method].time.compute + found[method].time.tensor)
    assert order == sorted(METHODS, key=lambda method: found[method].flops.language)
    # ViCA's layers are all in the first half; the tower's own memory is on every stage.
    assert found["vica"].memory[1].features < found["vica"].memory[0].features == found["himix"].memory[1].features


def test_the_list_ends_with_memory_of_each_stage_and_the_command() -> None:
    done = run("vicuna_7b_instruct", "--gpus", "8", "--gpu", "a100-40gb", "--global-batch", "64", "--show", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "layouts fit" in lines[0]
    assert lines[1].split()[:4] == ["TP", "PP", "VPP", "DP"]
    assert all(len(line.split()) + 1 == len(lines[1].split()) for line in lines[2:5])  # "step s" is two words
    assert lines[-1].startswith("torchrun --nproc-per-node 8 -m pipelines.pretrain vicuna_7b_instruct")
    assert any(line.startswith("  stage 0: ") for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("vicuna_7b_instruct", "--gpus", "2", "--gpu", "a100-40gb"), "does not fit on 2 x a100-40gb"),
        (("vicuna_7b_instruct", "--gpus", "8", "--gpu", "v100"), "--gpu is v100: there are a100-40gb, a100-80gb"),
        (
            ("vicuna_7b_instruct", "--gpus", "16", "--interconnect", "rfc1149"),
            "--interconnect is rfc1149: there are ib-hdr-200",
        ),
        (("vicuna_8b_instruct", "--gpus", "8"), "unknown recipe vicuna_8b_instruct: did you mean vicuna_7b_instruct?"),
        (("vicuna_7b_instruct",), "--gpus must be given"),
        (("vicuna_7b_instruct", "--gpus", "12"), "it must be a multiple of --gpus-per-node (8)"),
        (
            ("vicuna_7b_instruct", "--gpus", "8", "--vision-tokens", "700"),
            "--vision-tokens is 700, but the tower is siglip: all",
        ),
        (("vicuna_7b_instruct", "--gpus", "8", "--global-batch", "0"), "--global-batch is 0: wanted 1 or more"),
        ((), "no recipe given"),
    ],
)
def test_mistakes_are_one_line_and_say_what_is_known(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line
    assert not done.stdout


def test_what_cannot_fit_is_refused_with_what_is_too_big_and_by_how_much() -> None:
    with pytest.raises(
        ValueError, match=r"a rank holds 6\d\.\d GiB, 2\d\.\d more than the 39\.4 there are; the most are optimizer"
    ) as refused:
        best("vicuna_7b_instruct", 2, "a100-40gb")
    assert "use more GPUs" in str(refused.value)


def test_cuda_names_are_known() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA H100 PCIe": "h100-80gb-pcie",
        "NVIDIA H100 NVL": "h100-94gb-nvl",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA H200": "h200-141gb",
        "NVIDIA B200": "b200-180gb",
    }
    for cuda_name, name in names.items():
        device = device_of(cuda_name)
        assert device is not None
        assert device.name == name
    assert device_of("Tesla V100-SXM2-16GB") is None
    assert all(device.source for device in DEVICES)
