"""An exported folder answers as our model does: by transformers alone, cached or not, however prompts are batched."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.conversion.export import folder as export_folder
from himix_megatron.conversion.export.folder import export
from himix_megatron.conversion.export.parity import load_exported
from himix_megatron.data.shards.reader import ShardDataset
from tests.support import ROOT
from tests.support.data_fixtures import encoded, picture
from tests.support.exported_models import ask_elsewhere, export_random, processor_of, random_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config, train
from tools.compare_reference import Arguments, configuration, read

REFERENCES = sorted((ROOT / "tests" / "data" / "reference").glob("*.safetensors"))


def answer(out: Path, model: Any, questions: list[tuple[str, list[Any]]], **options: Any) -> list[str]:
    """One batch."""
    processor = processor_of(out)
    messages = [[{"role": "user", "content": question}] for question, _ in questions]
    images = [own for _, own in questions]
    inputs = processor(conversation=messages, images=images if any(images) else None)
    return processor.answers(model.generate(**inputs, **{"max_new_tokens": 12, **options}), inputs)


# ---- the model ------------------------------------------------------------------------------------------------------

MODELS: dict[str, Any] = {
    "tiny tower, qwen2": {},
    "tiny tower, llama, zero image": {"family": "llama", "text_only_vision": "zero_image"},
    "siglip, llama, tied, Llama 3's rope, wide heads": {
        "family": "llama", "tower": "siglip", "tie_embeddings": True, "rope_scaling_factor": 8.0, "rope_theta": 5e5,
        "head_dim": 24, "text_only_vision": "zero_image",
    },
    "clip, qwen2, a head each": {"tower": "clip", "num_query_groups": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every kind of model: its folder, and the largest differences."""
    out = {name: tmp_path_factory.mktemp("exported") / "folder" for name in MODELS}
    jobs = [(random_config(**MODELS[name]), out[name]) for name in MODELS]
    differences = run_ranks(export_all, 1, jobs, start_gloo=False)[0]
    return {name: (out[name], difference) for name, difference in zip(MODELS, differences, strict=True)}


def export_all(jobs: list[tuple[Any, Path]]) -> list[Any]:
    return [export_random(config, out)[:2] for config, out in jobs]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_answers_equal_ours(exported: dict[str, tuple[Path, Any]], name: str) -> None:
    logits, preference = exported[name][1]
    assert logits <= 2e-5
    assert preference == 0


@pytest.fixture(params=MODELS)
def model(exported: dict[str, tuple[Path, Any]], request: pytest.FixtureRequest) -> tuple[Path, Any]:
    out = exported[request.param][0]
    return out, load_exported(out)


@pytest.fixture
def one_model(exported: dict[str, tuple[Path, Any]]) -> tuple[Path, Any]:
    out = exported["tiny tower, qwen2"][0]
    return out, load_exported(out)


BATCH: list[tuple[str, list[Any]]] = [
    ("What?", [picture(1)]),
    ("And what are these two, in many more words?", [picture(2), picture(3)]),
    ("Nothing to see", []),
    ("Hm", [picture(4)]),
]


def test_a_batch_of_different_lengths_answers_as_each_prompt_alone(model: tuple[Path, Any]) -> None:
    out, loaded = model
    together = answer(out, loaded, BATCH)
    assert together == [answer(out, loaded, [question])[0] for question in BATCH]
    assert len(set(together)) == len(BATCH)


def test_the_cache_changes_no_answer_and_no_logit(model: tuple[Path, Any]) -> None:
    out, loaded = model
    inputs = processor_of(out)(conversation=[[{"role": "user", "content": q}] for q, _ in BATCH], images=[i for _, i in BATCH])
    options = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    kept = loaded.generate(**inputs, **options)
    again = loaded.generate(**inputs, **options, use_cache=False)
    assert torch.equal(kept.sequences, again.sequences)
    assert max(float((a - b).abs().max()) for a, b in zip(kept.logits, again.logits, strict=True)) < 2e-5


def test_each_image_is_encoded_and_projected_once(one_model: tuple[Path, Any]) -> None:
    out, loaded = one_model
    seen: list[int] = []
    projected: list[int] = []
    loaded.vision_tower.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    for layer in loaded.model.layers:
        layer.self_attn.k_proj_img.register_forward_hook(lambda *_: projected.append(1))
    answer(out, loaded, BATCH, eos_token_id=-1)
    assert seen == [4]
    assert len(projected) == len(loaded.model.layers)


def test_eager_and_sdpa_agree_and_bf16_is_near(exported: dict[str, tuple[Path, Any]]) -> None:
    from transformers import AutoModelForImageTextToText

    for out, _ in exported.values():
        inputs = processor_of(out)(conversation=[{"role": "user", "content": "What?"}], images=[picture(1)])
        logits = {}
        for name, options in {
            "sdpa": {"attn_implementation": "sdpa"},
            "eager": {"attn_implementation": "eager"},
            "bf16": {"dtype": torch.bfloat16},
        }.items():
            loaded = AutoModelForImageTextToText.from_pretrained(str(out), trust_remote_code=True, **options)
            logits[name] = loaded(**inputs).logits.float()
        assert float((logits["eager"] - logits["sdpa"]).abs().max()) < 2e-5
        assert float((logits["bf16"] - logits["sdpa"]).abs().max()) < 0.1 * float(logits["sdpa"].abs().max())


def test_beams_samples_and_lookup_work(one_model: tuple[Path, Any]) -> None:
    out, loaded = one_model
    greedy = answer(out, loaded, BATCH)
    assert answer(out, loaded, BATCH, num_beams=1, do_sample=True, top_k=1) == greedy
    beams = answer(out, loaded, BATCH, num_beams=3)
    assert beams == [answer(out, loaded, [question], num_beams=3)[0] for question in BATCH]
    torch.manual_seed(0)
    drawn = {answer(out, loaded, BATCH[:1], do_sample=True, temperature=2.0)[0] for _ in range(5)}
    assert len(drawn) > 1
    assert answer(out, loaded, BATCH[:1], prompt_lookup_num_tokens=3) == greedy[:1]


def test_a_cache_carries_the_image_to_the_next_turn(one_model: tuple[Path, Any]) -> None:
    from transformers import DynamicCache

    out, loaded = one_model
    processor = processor_of(out)
    messages = [{"role": "user", "content": "What?"}]
    inputs = processor(conversation=messages, images=[picture(1)])
    cache = DynamicCache()
    first = loaded.generate(**inputs, past_key_values=cache, max_new_tokens=6, eos_token_id=-1)
    more = torch.cat((first, processor(text="And why?")["input_ids"]), dim=1)
    mask = torch.ones_like(more)
    kept = loaded.generate(input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=6)
    pixels = {name: inputs[name] for name in ("pixel_values", "num_images")}
    fresh = loaded.generate(input_ids=more, attention_mask=mask, max_new_tokens=6, **pixels)
    assert torch.equal(kept, fresh)
    assert not torch.equal(fresh, loaded.generate(input_ids=more, attention_mask=mask, max_new_tokens=6))
    with pytest.raises(ValueError, match=r"hold .1. images, and .2. are given: new images need a new cache"):
        loaded(input_ids=more[:, -1:], past_key_values=cache, pixel_values=pixels["pixel_values"].repeat(1, 2, 1, 1, 1))


def test_a_cache_of_fixed_size_is_refused(one_model: tuple[Path, Any]) -> None:
    out, loaded = one_model
    with pytest.raises(ValueError, match="needs a cache that grows"):
        answer(out, loaded, BATCH[:1], cache_implementation="static")


def test_chat_templates_own_way_in_is_the_same(one_model: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = one_model
    processor = processor_of(out)
    (tmp_path / "a.png").write_bytes(encoded(picture(3, mode="RGBA"), "PNG"))
    content = [{"type": "image", "path": tmp_path / "a.png"}, {"type": "text", "text": "What?"}]
    wanted = processor(conversation=[{"role": "user", "content": "<image>\nWhat?"}], images=[str(tmp_path / "a.png")])
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    for found in (
        processor(conversation=[{"role": "user", "content": content}]),
        processor.apply_chat_template([{"role": "user", "content": content}], **options),
    ):
        assert found.keys() == wanted.keys() == {"input_ids", "attention_mask", "pixel_values", "num_images"}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_it_can_be_trained_on(one_model: tuple[Path, Any]) -> None:
    out, loaded = one_model
    inputs = processor_of(out)(conversation=[{"role": "user", "content": "What?"}], images=[picture(1)])
    whole = loaded.train()(**inputs, labels=inputs["input_ids"])
    loaded.gradient_checkpointing_enable()
    again = loaded(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert again.loss.item() == pytest.approx(whole.loss.item())
    again.loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def labelled(out: Path) -> list[dict[str, torch.Tensor]]:
    """Eight samples as Trainer takes them, with pictures or without, and labels of different numbers."""
    asked = [[{"role": "user", "content": "What is it?"}] for _ in range(8)]
    inputs = processor_of(out)(conversation=asked, images=[[picture(k)] if k % 2 else [] for k in range(8)])
    labels = inputs["input_ids"].clone()
    for k in range(8):
        labels[k, : k + 1] = -100
    return [{**{name: tensor[k] for name, tensor in inputs.items()}, "labels": labels[k]} for k in range(8)]


def test_a_step_is_the_same_in_one_batch_and_in_many(one_model: tuple[Path, Any]) -> None:
    """As Trainer does it: the sum over micro-batches, each divided by the labels of all of them."""
    out, loaded = one_model
    samples, found = labelled(out), []
    count = sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)
    for size in (8, 4, 2, 1):
        loaded.train().zero_grad()
        losses = []
        for first in range(0, 8, size):
            part = {name: torch.stack([sample[name] for sample in samples[first : first + size]]) for name in samples[0]}
            losses.append(loaded(**part, num_items_in_batch=count).loss)
            losses[-1].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in loaded.parameters() if p.grad is not None])
        found.append((sum(loss.item() for loss in losses), float(norm)))
    assert all(step == pytest.approx(found[0], rel=1e-4) for step in found), found


def test_transformers_trainer_takes_the_same_step_however_it_accumulates(one_model: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    from transformers import Trainer, TrainingArguments

    out, found = one_model[0], []
    for size in (8, 4, 2, 1):
        options: dict[str, Any] = {
            "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1, "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "use_cpu": True, "max_grad_norm": 1e9, "disable_tqdm": True,
            "remove_unused_columns": False,
        }  # fmt: skip
        arguments = TrainingArguments(output_dir=str(tmp_path / str(size)), **options)
        trainer = Trainer(model=load_exported(out), args=arguments, train_dataset=labelled(out))
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]))
    assert all(step == pytest.approx(found[0], rel=1e-3) for step in found), found


def test_a_pipeline_takes_samples_with_and_without_pictures_together(one_model: tuple[Path, Any]) -> None:
    from transformers import pipeline

    out, loaded = one_model
    ask = pipeline("image-text-to-text", model=loaded, processor=processor_of(out), device="cpu")
    picture_part = {"type": "image", "image": picture(1)}
    chats = [
        [{"role": "user", "content": [*([picture_part] if k % 2 else []), {"type": "text", "text": f"What{'?' * k}"}]}]
        for k in range(4)
    ]
    options = {"return_full_text": False, "max_new_tokens": 8}
    together = [row[0]["generated_text"] for row in ask(text=chats, batch_size=2, **options)]
    assert together == [ask(text=chat, **options)[0]["generated_text"] for chat in chats]
    assert len(set(together)) > 1
    with pytest.raises(ValueError, match="names an image by a text"):
        ask(text=[{"role": "user", "content": [{"type": "image", "url": "/etc/fstab"}]}])


def test_a_text_alone_goes_on_with_a_cached_picture(one_model: tuple[Path, Any]) -> None:
    from transformers import DynamicCache

    out, loaded = one_model
    processor, cache = processor_of(out), DynamicCache()
    loaded(**processor(conversation=[{"role": "user", "content": "What?"}], images=[picture(1)]), past_key_values=cache)
    more = processor(text="And why?")
    mask = torch.ones(1, cache.get_seq_length() + more["input_ids"].shape[1], dtype=torch.long)
    kept = loaded(**{**more, "attention_mask": mask}, past_key_values=cache).logits
    assert kept.shape[1] == more["input_ids"].shape[1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"input_ids": None}, r"input_ids are missing"),
    "1-d ids": ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"input_ids is \[5\]: wanted \[samples, tokens\]"),
    "ids of floats": ({"input_ids": torch.zeros(2, 5)}, r"input_ids are torch.float32"),
    "a list of ids": ({"input_ids": [[1, 2]]}, r"input_ids is no tensor: wanted one of \[samples, tokens\]"),
    "narrow mask": ({"attention_mask": torch.ones(2, 4)}, r"attention_mask is \[2, 4\]: wanted \[2, 5\]"),
    "many positions": ({"position_ids": torch.zeros(2, 7)}, r"position_ids is \[2, 7\]: wanted \[samples, 5\]"),
    "few labels": ({"labels": torch.zeros(2, 3)}, r"labels is \[2, 3\]: wanted \[2, 5\]"),
    "4-d pixels": ({"pixel_values": torch.zeros(2, 3, 16, 16)}, r"pixel_values is .*: wanted \[2, images, 3, 16, 16\]"),
    "another side": ({"pixel_values": torch.zeros(2, 1, 3, 24, 24)}, r"pixel_values is .*: wanted \[2, images, 3, 16, 16\]"),
    "another batch": ({"pixel_values": torch.zeros(3, 1, 3, 16, 16)}, r"pixel_values is .*: wanted \[2, images, 3, 16, 16\]"),
    "uint8 pixels": ({"pixel_values": torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8)}, r"pixel_values are torch.uint8"),
    "3-d features": ({"image_features": torch.zeros(2, 4, 24)}, r"image_features is .*: wanted \[2, images, tokens, 24\]"),
    "too many": ({"num_images": torch.tensor([5, 1])}, r"num_images is \[5, 1\]: wanted 0 to 1"),
    "negative": ({"num_images": torch.tensor([1, -1])}, r"num_images is \[1, -1\]: wanted 0 to 1"),
    "another number of numbers": ({"num_images": torch.tensor([1])}, r"num_images is \[1\]: wanted \[2\]"),
    "no pictures": ({"pixel_values": None, "num_images": torch.tensor([1, 0])}, r"num_images is \[1, 0\]: wanted 0 to 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_together_is_one_line(one_model: tuple[Path, Any], name: str) -> None:
    right = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "pixel_values": torch.zeros(2, 1, 3, 16, 16)}
    one_model[1](**right)
    with pytest.raises(ValueError, match=WRONG[name][1]) as caught:
        one_model[1](**right | WRONG[name][0])
    assert "\n" not in str(caught.value)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_many_shards_load_as_one(one_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = one_model[1].state_dict()
    assert (one_model[0] / "model.safetensors").is_file()
    monkeypatch.setattr(export_folder, "write_folder", partial(export_folder.write_folder, max_shard_bytes=20_000))
    export(whole, random_config(), tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    again = load_exported(tmp_path / "many").state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_an_existing_folder_is_left_alone_and_a_failed_one_is_removed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there exists"):
        export({}, random_config(), tmp_path / "there")
    (tmp_path / "out.writing").mkdir()
    with pytest.raises(ValueError, match=r"out\.writing exists"):
        export({}, random_config(), tmp_path / "out")
    (tmp_path / "out.writing").rmdir()
    missing = dataclasses.replace(random_config().data, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no such folder"):
        export({}, dataclasses.replace(random_config(), data=missing), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_weights_that_the_code_does_not_want_are_named(exported: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = load_exported(exported["tiny tower, qwen2"][0]).state_dict()
    lost = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.v_proj_img" not in name}
    export(lost, random_config(), tmp_path / "lost")
    with pytest.raises(ValueError, match=r"missing keys .*model\.layers\.1\.self_attn\.v_proj_img"):
        load_exported(tmp_path / "lost")


# ---- from the authors' weights to answers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int]]]:
    """Each reference file's exported folder, and what our model would add to its first row."""
    out = [tmp_path_factory.mktemp("reference") / "folder" for _ in REFERENCES]
    tokens = run_ranks(references_to_hf, 1, REFERENCES, out, start_gloo=False)[0]
    return {file.stem: pair for file, *pair in zip(REFERENCES, out, tokens, strict=True)}  # type: ignore[misc]


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_the_authors_logits_come_out_of_the_exported_folder(file: Path, references: dict[str, tuple[Path, list[int]]]) -> None:
    out, tokens = references[file.stem]
    given = read(file).tensors
    loaded, real, vision = load_exported(out), given["attention_mask"].bool(), given["vision"][:, None].float()
    with torch.no_grad():
        found = loaded(input_ids=given["input_ids"], attention_mask=given["attention_mask"], image_features=vision).logits
    difference = float((found - given["logits"])[real].abs().max())
    print(f"{file.stem}: {difference:.1e}")
    assert difference <= 2e-5
    ids = given["input_ids"][:1]
    added = loaded.generate(input_ids=ids, image_features=vision[:1], max_new_tokens=8, eos_token_id=-1)
    assert added[0, ids.shape[1] :].tolist() == tokens


def references_to_hf(files: list[Path], out: list[Path]) -> list[list[int]]:
    return [reference_to_hf(*pair) for pair in zip(files, out, strict=True)]


def reference_to_hf(file: Path, out: Path) -> list[int]:
    """Reference weights -> himix -> gathered -> exported. Returns: the tokens that our model would add to the first row,
    recomputing the whole text at each."""
    from himix_megatron.conversion.authors_layout import from_authors, to_authors
    from himix_megatron.conversion.sharding import gather, scatter
    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks
    from himix_megatron.model.schedule import run_logits
    from himix_megatron.model.stage_input import StageInput
    from himix_megatron.model.towers import build_tower

    reference = read(file)
    config = configuration(Arguments(file=file), reference)
    topology = init_distributed(config.parallel, seed=1)
    model_chunks = build_model_chunks(config, detect(), topology, torch.nn.Identity(), trains=False)
    scatter(model_chunks, from_authors(reference.weights, config.model), topology)
    ids = reference.tensors["input_ids"][:1]
    for _ in range(8):
        features = reference.tensors["vision"][0].float()
        images = ImageTable.of_features([[len(features)]])
        given = StageInput(ids, features, torch.zeros(1, dtype=torch.bool), images)
        (logits,) = run_logits(model_chunks, [given], lambda _, logits: logits)
        ids = torch.cat((ids, logits[:, -1:, : config.model.vocab_size].argmax(-1)), dim=1)
    weights = to_authors(gather(model_chunks, lambda parameter: parameter, topology, config.model.vocab_size), config.model)
    shutdown_distributed()
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    weights |= {f"vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    export(weights, config, out)
    return ids[0, -8:].tolist()


def test_a_trained_run_answers_the_same_by_transformers_alone(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path / "run", parts=("language", "vision_kv", "tower"), steps=120)
    run_ranks(train, 1, config, start_gloo=False)
    ours = run_ranks(evaluate_and_convert, 1, tmp_path / "run", mixed_dataset, tmp_path / "out", start_gloo=False)[0]
    (tmp_path / "work").mkdir()
    assert ask_elsewhere(tmp_path / "out", ShardDataset(mixed_dataset), tmp_path / "work") == ours
    assert len(set(ours)) > 2


def evaluate_and_convert(run: Path, data: Path, out: Path) -> list[str]:
    from pipelines.evaluate import Arguments as Asked
    from pipelines.evaluate import evaluate
    from tools.conversions import himix_to_hf
    from tools.convert import HimixToHf

    evaluate(Asked(run=run, data=data))
    himix_to_hf(HimixToHf(checkpoint=run, out=out))
    lines = (run / "evaluation" / f"{data.name}.answers.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


@pytest.mark.slow
def test_the_quickstarts_model_answers_the_held_out_questions_the_same(tmp_path: Path) -> None:
    run, data = ROOT / "runs" / "quickstart" / "instruct", ROOT / "runs" / "quickstart" / "shards" / "heldout"
    recorded = run / "evaluation" / "heldout.answers.jsonl"
    if not recorded.is_file():
        pytest.skip("runs/quickstart is absent: make quickstart")
    run_ranks(convert, 1, run, tmp_path / "out", start_gloo=False)
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    (tmp_path / "work").mkdir()
    answers = ask_elsewhere(tmp_path / "out", ShardDataset(data), tmp_path / "work")
    correct = sum(answer == line["expected"] for answer, line in zip(answers, lines, strict=True))
    print(f"{correct} of {len(lines)} correct")
    assert answers == [line["answer"] for line in lines]


def convert(run: Path, out: Path) -> None:
    from tools.conversions import himix_to_hf
    from tools.convert import HimixToHf

    himix_to_hf(HimixToHf(checkpoint=run, out=out))
