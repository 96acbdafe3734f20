"""The GPU's performance check runs on a CPU at tiny sizes, and what it says of packs, memory and machines is right."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

from himix_megatron.costs.flops import Work
from himix_megatron.costs.memory import GIB
from tools import plan as tool
from tools.bench.measure import Line
from tools.bench.training import Decoder, Packs, inputs_of, lengths_of
from tools.gpu_check import performance, profiles, rates, training_run
from tools.gpu_check.performance import predicted_seconds
from tools.gpu_check.reference import Heads
from tools.gpu_check.runner import Context
from tools.planner.machine import Machine, machine_named, machine_of_file

ON_GPU = Context(Path(), tiny=False, deadline=math.inf)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tiny=True, deadline=time.monotonic() + 600)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "STEP_SECONDS", {})


def lines_of(name: str, context: Context) -> list[Line]:
    [check] = [check for check in performance.CHECKS if check.name == name]
    return list(check.run(context))


def test_checks_run_tiny_on_a_cpu(context: Context) -> None:
    names = ["decoder_0.5b", "loss_0.5b", "torch_3b", "concatenation_3b", "fp8_3b", "machine", "tower"]
    lines = {name: lines_of(name, context) for name in names}
    assert all(lines.values())
    assert all(math.isfinite(line.value) for found in lines.values() for line in found)
    assert any("optimizer's step" in line.what for line in lines["decoder_0.5b"])
    assert sum("that gain over the FLOPs' one" in line.what for line in lines["concatenation_3b"]) == 4
    assert any(line.what.startswith("qwen2_0_5b: the planner's") for line in lines["machine"])
    assert "aten::" in (context.out / "profiles.txt").read_text()
    assert all(line.holds for line in lines["tower"])


def test_checks_have_one_word_names_and_fit_the_time_that_a_machine_is_lent_for() -> None:
    checks = [*performance.CHECKS, *training_run.CHECKS]
    assert len({check.name for check in checks}) == len(checks)
    assert sum(check.seconds for check in checks if not check.name.startswith("torch")) <= 240


def test_packs_fill_their_rows_and_count_what_they_are() -> None:
    packs = Packs.of(8192, 26, 2, 729)
    assert packs.samples == 52
    assert 2 * 8192 - 52 <= packs.text_tokens <= 2 * 8192
    assert packs.text_lengths[0] != packs.text_lengths[1]
    inside = packs.concatenated()
    assert inside.row_tokens % 128 == 0
    assert inside.text_tokens == packs.text_tokens
    work, other = packs.work(), inside.work()
    assert other.text_tokens == work.text_tokens + work.vision_tokens == packs.text_tokens + 52 * 729
    assert other.vision_tokens == other.vision_pairs == 0
    assert work.head_tokens == other.head_tokens == pytest.approx(packs.text_tokens / 2, rel=0.02)
    assert lengths_of(100, 200, 0) == (1,) * 200


def test_a_step_with_images_inside_the_text_has_no_vision_and_as_many_labels() -> None:
    config = performance.configuration(performance.MODELS["qwen2_0_5b"], Context(Path(), tiny=True, deadline=0), "torch")
    beside = Packs.of(96, 3, 2, 36)
    for packs, images in ((beside, 3), (beside.concatenated(), 0)):
        for given, lengths in zip(inputs_of(packs, config, torch.device("cpu")), beside.text_lengths, strict=True):
            assert given.images.shape == (36 * images, 128)
            assert len(given.blank) == images
            assert len(given.image_table) == images
            assert int((given.labels >= 0).sum()) == sum(max(0, length - 1 - length // 2) for length in lengths)
            assert sum(given.packed_lengths) == sum(lengths) + (0 if images else 3 * 36)


def test_without_images_a_step_gives_gradients_to_the_language_model_alone() -> None:
    config = performance.configuration(performance.MODELS["qwen2_0_5b"], Context(Path(), tiny=True, deadline=0), "torch")
    with performance.built(config) as own:
        own.step_on(Packs.of(96, 3, 1, 36).concatenated())()
        norms = {
            name: float(p.main_grad.norm()) for name, p in own.model_chunks[0].module.named_parameters() if p.requires_grad
        }
    assert all(math.isfinite(norm) for norm in norms.values())
    vision = {name: norm for name, norm in norms.items() if "vision" in name}
    assert vision
    assert not any(vision.values())
    assert all(norm > 0 for name, norm in norms.items() if name not in vision)


def test_what_a_model_holds_fits_an_80_gb_gpu() -> None:
    for model in performance.MODELS.values():
        config = performance.configuration(model, ON_GPU, "te")
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, layer_spec="te"),
            train=dataclasses.replace(config.train, precision="bf16"),
        )
        packs = performance.packs_of(model, ON_GPU, config)
        assert performance.expected_memory(config, packs, optimizer=model.optimizer).total < 75 * GIB
        for _, beside, inside in performance.pairs(model, ON_GPU, 729):
            if model.name == "vicuna_7b":
                continue  # not compared with concatenation
            for packs in (beside, inside):
                images = 729 * len(packs.text_lengths[0]) if packs.images == "beside" else 0
                assert images <= 729 * 320
                own = dataclasses.replace(packs, tokens_per_image=729 if images else 0)
                assert performance.expected_memory(config, own, optimizer=False).total < 75 * GIB


def test_gaps_between_kernels_are_idle() -> None:
    found = profiles.Profile({"a": [0.1, 0.2], "b": [0.1]})
    assert found.idle_share(0.5) == pytest.approx(0.2)
    text = found.table("title", 0.5)
    assert "idle 20.0 %" in text
    assert text.index("  a\n") < text.index("  b\n")


# ---- the machine file --------------------------------------------------------------------------------------------------


def made_machine() -> Machine:
    config = performance.configuration(performance.MODELS["llama3_2_3b"], ON_GPU, "te")
    products = {product: product.flops / 600e12 for product in rates.products_of(config, 8192, 26 * 729)}
    row = rates.attention_row(Heads(24, 8, 128), Packs.of(8192, 26, 1, 729), (1e-3, 3e-3))
    return rates.measured_machine(products, [row], {"copy": 2.7e12, "passing": 2.4e12, "layer_seconds": 1e-3})


def test_a_machine_is_read_as_it_was_written(tmp_path: Path) -> None:
    file, machine = tmp_path / "machine.json", made_machine()
    rates.write_machine(file, machine, "conditions")
    read = machine_of_file(file)
    assert read.product_rate(8192, 3072, 16384) == pytest.approx(600e12, rel=1e-3)
    assert read.passing == pytest.approx(2.4e12)
    assert len(read.products) == len(machine.products)
    assert machine_of_file(file, "ethernet-100", 4).network_bytes_per_second < read.network_bytes_per_second
    config = performance.configuration(performance.MODELS["llama3_2_3b"], ON_GPU, "te")
    packs = performance.packs_of(performance.MODELS["llama3_2_3b"], ON_GPU, config)
    assert predicted_seconds(config, packs, read) == pytest.approx(predicted_seconds(config, packs, machine), rel=1e-3)


def test_rates_between_measured_shapes_lie_between_theirs() -> None:
    machine = dataclasses.replace(
        machine_named("h100-80gb", None),
        products=((1024, 1024, 1024, 300e12), (8192, 8192, 8192, 700e12)),
        attention=((14, 64, 314, 200e12, 250e12), (24, 128, 314, 400e12, 350e12)),
    )
    assert machine.product_rate(1024, 1024, 1024) == pytest.approx(300e12)
    assert 300e12 < machine.product_rate(4096, 2048, 4096) < 700e12
    assert machine.attention_rates(24, 128, 314) == pytest.approx((400e12, 350e12))
    assert machine_named("h100-80gb", None).product_rate(1, 1, 1) == machine_named("h100-80gb", None).product_flops


def test_a_measured_attention_is_found_by_its_own_packs() -> None:
    """The planner knows a micro-batch's sums only; from them it must come to the length the row was written with."""
    packs = Packs.of(8192, 26, 1, 729)
    row, work = rates.attention_row(Heads(24, 8, 128), packs, (1e-3, 3e-3)), packs.work()
    assert 2 * work.text_pairs / work.text_tokens - 1 == pytest.approx(row[2])
    assert row[3] * 1e-3 == pytest.approx(4 * 24 * 128 * (work.text_pairs + work.vision_pairs))
    one = Work.of([314], [729], head_tokens=0)
    assert 2 * one.text_pairs / one.text_tokens - 1 == pytest.approx(314)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "wanted an object"),
        ('{"machine": {"speed": 1}}', "it has a field machine.speed"),
        ('{"machine": {"name": "x"}}', "the field machine.peak_flops is missing"),
        ('{"machine": {"product_flops": "fast"}}', 'machine.product_flops is "fast", wanted a number'),
        ('{"machine": {"products": [[1, 2]]}}', "machine.products[0] is a list, wanted a list of 4"),
    ],
)
def test_a_bad_machine_file_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "machine.json"
    if text is not None:
        file.write_text(text)
        if "missing" not in said:
            values = json.loads(text)["machine"] if '{"machine"' in text else None
            if values is not None:
                full = dataclasses.asdict(made_machine())
                file.write_text(json.dumps({"machine": full | values}))
    with pytest.raises(ValueError, match="--machine-file") as refused:
        machine_of_file(file)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_planner_takes_measured_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    rates.write_machine(file, made_machine(), "conditions")
    tool.plan(tool.Arguments(recipe="llama3_2_3b_instruct", gpus=8, machine_file=file, show=1))
    assert "measured: " in capsys.readouterr().out


def test_a_decoder_is_built_and_gone() -> None:
    config = performance.configuration(performance.MODELS["qwen2_0_5b"], Context(Path(), tiny=True, deadline=0), "torch")
    with performance.built(config) as own:
        assert isinstance(own, Decoder)
        assert own.model_chunks
    assert not own.model_chunks
