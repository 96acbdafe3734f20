"""docs/extending.md, word for word: its code goes into a copy of the repository, its commands run there, its promises hold."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support import ROOT

DOCUMENT = ROOT / "docs/extending.md"
BLOCK = re.compile(
    r"^(?:New file `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`, after `(?P<line>[^`]+)`|At the end of `(?P<end>[^`]+)`):\n\n"
    r"```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def edits(section: str) -> dict[str, list[re.Match[str]]]:
    """The code blocks below a heading, by the file that each goes into."""
    text = DOCUMENT.read_text()
    body = re.split(r"^## ", text.split(f"\n## {section}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    found: dict[str, list[re.Match[str]]] = defaultdict(list)
    for block in BLOCK.finditer(body):
        found[block["new"] or block["file"] or block["end"]].append(block)
    assert body.count("\n```") == 2 * sum(map(len, found.values())), f"a code block of {section!r} names no file"
    return found


SECTIONS = {
    "A language family": 2,
    "A method": 1,
    "A vision tower": 2,
    "A data source": 1,
    "A recipe": 1,
    "A metric": 1,
    "A failpoint": 2,  # the schedule is no code
    "A benchmark": 2,
}
"""How many files each extension may touch."""


@pytest.mark.parametrize("section", SECTIONS)
def test_an_extension_touches_few_files(section: str) -> None:
    assert 1 <= len(edits(section)) <= SECTIONS[section]


def apply(copy: Path) -> None:
    """Write the page's code into a copy of the repository."""
    for section in SECTIONS:
        for name, blocks in edits(section).items():
            path = copy / name
            for block in blocks:
                if block["new"]:
                    assert not path.exists(), path
                    path.write_text(block["code"])
                elif block["end"]:
                    path.write_text(path.read_text() + block["code"])
                else:
                    content, line = path.read_text(), f"{block['line']}\n"
                    assert content.count(f"\n{line}") == 1, f"{name} has the line {block['line']!r} not once"
                    path.write_text(content.replace(f"\n{line}", f"\n{line}{block['code']}"))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the page's commands gave in the copy."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("himix_megatron", "pipelines", "tools", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "reference", "emoji"))
    apply(copy)
    done = subprocess.run(
        [sys.executable, "-c", "from tests.docs.test_extending import play; play()"],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}
    return found


def play() -> None:
    """In the copy: run everything, in one process, and print what came of it as JSON."""
    from himix_megatron.distributed import cpu_backend

    cpu_backend.activate_if_needed()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = {"tower": see(), "method": take_method(), "counting": count(), "source": preprocess_tables(), **convert_qwen3()}
        found["recipe"] = train()
    print(json.dumps(found | {"printed": printed.getvalue()}))


def see() -> list[int]:
    """The new tower's feature shape on two images, what its configuration says, and its parameters by both counts."""
    import torch
    from my_recipes import captions  # type: ignore[import-not-found]

    from himix_megatron.costs.memory import tower_parameters
    from himix_megatron.model.towers import build_tower

    config = captions()
    size = config.vision.image_size
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    features = tower(torch.randint(256, (2, 3, size, size), dtype=torch.uint8), torch.tensor([False, True]))
    assert torch.isfinite(features).all()
    assert len({tuple(row) for row in tower.position[0].tolist()}) == features.shape[1], "two patches share a position"
    sizes = [config.vision.max_tokens_per_image, config.vision.hidden_size]
    return [*features.shape, *sizes, sum(p.numel() for p in tower.parameters()), tower_parameters(config)]


def take_method() -> list[object]:
    """What the new method's flag gives: the layers that inject, and what a token sees."""
    from pipelines.cli import parse

    config = parse(["tiny_align", "--method", "sparse_himix"])
    return [*config.injection.injecting_layers(config.model.num_layers), config.injection.visibility]


def convert_qwen3() -> dict[str, object]:
    """A random Qwen3 folder through tools.convert, which compares logits with transformers."""
    from himix_megatron.checkpoint.manifest import find_checkpoint
    from himix_megatron.conversion.authors_layout import shapes
    from himix_megatron.conversion.checkpoint_io import read_config
    from himix_megatron.costs.memory import model_parameters
    from tests.support.model_folders import make_language, make_tower
    from tools.conversions import hf_to_himix
    from tools.convert import HfToHimix

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97}
    make_language(Path("models/Qwen3-0.6B"), model_type="qwen3", **sizes)
    make_tower(Path("models/siglip-so400m-patch14-384"))
    out = Path("runs/start")
    hf_to_himix(HfToHimix(language=Path("models/Qwen3-0.6B"), vision=Path("models/siglip-so400m-patch14-384"), out=out, seed=3))
    config = read_config(find_checkpoint(str(out)))
    published, counted = shapes(config.model, config.vision.hidden_size), model_parameters(config)
    return {
        "norms": sum(name.endswith("k_norm.weight") for name in published),
        "parameters": [sum(map(math.prod, published.values())), counted.language + counted.vision_kv],
    }


def preprocess_tables() -> dict[str, object]:
    """Two good rows and one without its image."""
    from PIL import Image

    from pipelines.preprocess import Settings, preprocess

    folder = Path("my-tables")
    folder.mkdir()
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / name)
    (folder / "colours.tsv").write_text("red.png\ta red image\nnone.png\tno image\nblue.png\ta blue image\n")
    given = Settings(
        source="my_sources:TsvReader", input=(folder,), out="data/captions", engine="local", num_workers=1, max_bad_fraction=0.5
    )
    manifest = preprocess(given)
    return {"samples": manifest.num_samples, "quarantined": dict(manifest.quarantined)}


def count() -> dict[str, float]:
    """The benchmark's figure of a right and a wrong answer."""
    from himix_megatron.evaluation import runner

    file = Path("questions.jsonl")
    rows = [{"question_id": i, "image": "red.png", "text": "How many?", "answer": 2} for i in range(2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    questions, counting = runner.read_questions("counting", file, None, None), runner.BENCHMARKS["counting"]
    assert counting.tallies
    assert counting.figures
    tallies = counting.tallies([(questions[0], "2 of them"), (questions[1], "three")])
    return counting.figures({name: sum(tally.get(name, 0.0) for tally in tallies) for name in tallies[0]})


def train() -> dict[str, object]:
    """The recipe's run, with the schedule of faults, and the new metric's points."""
    from himix_megatron.training.loop import pretrain
    from pipelines.cli import parse
    from tests.support.small_runs import history

    words = "my_recipes:captions --run.dir runs/captions --run.fault-injection faults.jsonl"
    code = pretrain(parse(words.split()), None)
    return {"code": code, "points": history(Path("runs/captions"))["data/answer_token_fraction"]}


def test_a_family_of_the_page_computes_what_transformers_computes(played: dict[str, object]) -> None:
    assert re.search(
        r"logits of the whole model on 48 tokens, compared with transformers: largest difference", str(played["printed"])
    )
    assert played["norms"] == 4, "each layer's key norm is converted"
    published, counted = played["parameters"]  # type: ignore[misc]
    assert published == counted


def test_a_method_of_the_page_is_chosen_by_its_name(played: dict[str, object]) -> None:
    assert played["method"] == [1, 3, "earlier"]


def test_a_tower_of_the_page_gives_as_many_tokens_as_its_configuration_says(played: dict[str, object]) -> None:
    images, tokens, width, wanted_tokens, wanted_width, parameters, counted = played["tower"]  # type: ignore[misc]
    assert (images, tokens, width) == (2, wanted_tokens, wanted_width)
    assert parameters == counted


def test_a_source_of_the_page_makes_a_dataset(played: dict[str, object]) -> None:
    assert played["source"] == {"samples": 2, "quarantined": {"missing_image": 1}}


def test_a_recipe_of_the_page_trains_and_its_metric_is_in_tensorboard(played: dict[str, object]) -> None:
    recipe: dict[str, object] = played["recipe"]  # type: ignore[assignment]
    assert recipe["code"] == 0
    points: list[float] = recipe["points"]  # type: ignore[assignment]
    assert points
    assert all(0 < value < 1 for value in points)


def test_a_failpoint_of_the_page_is_reached(played: dict[str, object]) -> None:
    assert "step/reduced" in str(played["log"])


def test_a_benchmark_of_the_page_has_figures(played: dict[str, object]) -> None:
    assert played["counting"] == {"accuracy_percent": 50.0}
