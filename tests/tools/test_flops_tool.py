"""`python -m tools.flops`: the paper's figures by model name, tables of recipes and of sizes, a plot, mistakes in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from himix_megatron.config import METHODS
from himix_megatron.costs.flops import image_flops, kv_cache_bytes
from pipelines.recipes import RECIPES
from tools.flops import PAPER, compare, paper_lines


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.flops", *words], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_papers_models_cost_what_is_published() -> None:
    lines = list(paper_lines())
    assert [line.split()[0] for line in lines] == ["Qwen2-0.5B", "TinyLlama-1.1B", "Llama-3.2-1B", "Llama-3.2-3B", "Vicuna-7B"]
    for line, (vanilla, himix) in zip(lines, ((837, 78), (1750, 161), (2040, 192)), strict=False):
        found = re.match(r"\S+ +(\d+) -> +(\d+) GFLOP", line)
        assert found is not None
        assert float(found[1]) == pytest.approx(vanilla, rel=0.01)
        assert float(found[2]) == pytest.approx(himix, rel=0.01)
    assert all(re.search(r"honest \d+\.\d times, with the tower \d+\.\d$", line) for line in lines)


def test_every_recipe_has_its_line() -> None:
    assert {recipe.removesuffix("_align") for recipe, _ in PAPER.values()} == {
        name.removesuffix("_align").removesuffix("_instruct") for name in RECIPES if not name.startswith("tiny_")
    }


def test_the_honest_ratio_is_smaller_and_the_tower_makes_it_smaller_still() -> None:
    for recipe, _ in PAPER.values():
        config = RECIPES[recipe]()
        found = compare(config, 64, 1, 32)
        ratios = [vanilla / himix for himix, vanilla in (found.paper, found.honest, found.with_tower)]
        assert ratios == sorted(ratios, reverse=True)
        assert found.with_tower[0] - found.honest[0] == pytest.approx(
            image_flops(config.vision, config.vision.max_patches_per_image)
        )


def test_fewer_vision_tokens_cost_less_on_both_sides() -> None:
    tiny = RECIPES["tiny_instruct"]()
    config = replace(tiny, vision=replace(tiny.vision, tower="tiny_native"))
    mean, largest = (compare(config, 64, 2, 32, tokens) for tokens in (18, None))
    assert largest == compare(config, 64, 2, 32, 36)
    for few, most in zip((*mean.honest, *mean.with_tower), (*largest.honest, *largest.with_tower), strict=True):
        assert few < most
    with pytest.raises(ValueError, match=r"--vision-tokens is 37, but the tower is tiny_native: its largest image has 36"):
        compare(config, 64, 2, 32, 37)


def test_without_images_himix_is_vanilla() -> None:
    found = compare(RECIPES["llama3_2_1b_instruct"](), 300, 0, 150)
    assert found.paper[0] == found.paper[1]
    assert found.honest[0] == found.honest[1]
    assert found.step[0] == found.step[1]


def test_a_recipes_table_and_plot(tmp_path: Path) -> None:
    done = run("llama3_2_3b_instruct", "--images", "2", "--plot", str(tmp_path / "flops.png"))
    assert done.returncode == 0, done.stderr
    assert "314 text tokens, 2 images of 729 tokens" in done.stdout
    for what in ("parameters: 3.68 B", "the paper's way", "honest", "hardware FLOPs", "optimizer", "total"):
        assert what in done.stdout
    assert (tmp_path / "flops.png").read_bytes().startswith(b"\x89PNG")


def test_the_methods_of_the_family_are_printed_for_a_model() -> None:
    done = run("qwen2_0_5b_instruct", "--methods", "--injection.reduce", "pool")
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.split(" text tokens")[1:]
    assert len(blocks) == 2
    for text, block in zip((64, 314), blocks, strict=True):
        rows = {name: [float(word) for word in words] for name, *words in map(str.split, block.splitlines()[2:9])}
        assert list(rows) == list(METHODS)
        for method, (decoder, tower, total, step, whole_step, first, image, sample) in rows.items():
            config = RECIPES["qwen2_0_5b_instruct"]()
            config = replace(config, injection=METHODS[method](config.model))
            found = compare(config, text, 1, text / 2)
            assert decoder == round(found.honest[0] / 1e9, 1)
            assert (step, whole_step) == (round(found.step[0].language / 1e9, 1), round(found.step[0].model / 1e9, 1))
            assert total == pytest.approx(decoder + tower, abs=0.11)
            assert first == pytest.approx(total - 2 * (text - 1) * 896 * 151936 / 1e9, abs=0.11)
            assert (image, sample) == tuple(round(kv_cache_bytes(config, n, 729) / 2**20, 2) for n in (0, text))
    # What was asked for is none of them.
    assert blocks[0].splitlines()[9].startswith("as given")


def test_a_cache_worked_by_hand() -> None:
    config = RECIPES["vicuna_7b_instruct"]()
    token = 2 * 32 * 128 * 2  # keys and values of 32 heads in bf16
    for method, layers in {"himix": 32, "vica": 8, "llama3_2_vision": 8, "tokens": 32}.items():
        own = replace(config, injection=METHODS[method](config.model))
        assert kv_cache_bytes(own, 0, 729) == layers * 729 * token
        assert kv_cache_bytes(own, 10, 0) == 32 * 10 * token
    merged = replace(config, injection=replace(config.injection, reduce="merge"))
    assert kv_cache_bytes(merged, 0, 729) == 32 * 14 * 14 * token


def test_a_recipes_fields_are_changed_by_their_flags() -> None:
    done = run("vicuna_7b_instruct", "--method", "tokens", "--train.micro-batch-samples", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"MiB of KV cache for one image +364.50 +364.50 +1.0\nGiB on one GPU, micro-batch of 2 +tokens", done.stdout
    )


def test_sizes_alone_are_enough() -> None:
    sizes = ("--layers", "12", "--hidden", "768", "--ffn", "2048", "--heads", "12", "--groups", "4", "--vocab", "32000")
    done = run(*sizes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sizes: 64 text tokens, 1 image of 729 tokens (siglip)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("llama",), "unknown recipe llama: There are tiny_align"),
        (("--layers", "3"), "--hidden, --ffn, --heads, --groups, --vocab missing"),
        (("tiny_align", "--text-tokens", "0"), "--text-tokens is 0: wanted 1 or more"),
        (("tiny_align", "--plot", "nowhere/x.png"), "there is no folder nowhere"),
        (("tiny_align", "--paper"), "--paper has its own models"),
        (("tiny_align", "--methods", "--images", "2"), "--methods compares samples of one image"),
        (("--method", "vica"), "--method changes a field of a recipe: name one (tiny_align"),
        (("tiny_align", "--method", "flamingo"), "--method is flamingo"),
        (("tiny_align", "--hidden", "100", "--heads", "3"), "does not divide into model.num_attention_heads"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line
