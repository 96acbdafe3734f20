"""Generation with a cache is generation without one: token for token, whatever is in a batch and however the model is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from himix_megatron.config import Config, InjectionConfig, VisionConfig
from himix_megatron.data.text.tokenizer import load_tokenizer
from himix_megatron.inference.sampling import Sampling, choose
from himix_megatron.inference.text_stream import TextStream
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

NUM_BATCHES, BATCH, MAX_NEW = 5, 15, 12
TIE = 1e-5
STOPS = tuple(range(0, 260, 13))
"""One token in thirteen, so that the answers of a batch end at different steps."""
KINDS = ("qwen2", "llama", "native")
"""native: images of different sizes, in their own aspect."""
IN_TEXT = InjectionConfig(
    fusion="tokens", adapter="shared", keys_values="text", norm="input", key_norm="shared", position="rotary",
    visibility="earlier",
)  # fmt: skip
INJECTIONS = {
    "in text": IN_TEXT,
    "in text, fewer": replace(IN_TEXT, reduce="pool"),
    "one stage": InjectionConfig(layers=(1,), position="rotary", visibility="earlier", adapter="shared"),
}
NATIVE = ("native", "in text, fewer", "one stage")


def config_for(kind: str, **layout: Any) -> Config:
    """A model whose answers depend on every image and word: at the usual deviation of weights they would hardly."""
    config = small_config(Path("none"), Path("none"), parts=("vision_kv",), **layout)
    other: dict[str, Any] = {
        "family": "llama",
        "num_query_groups": 4,
        "text_only_vision": "zero_image",
        "rope_scaling_factor": 8.0,
    }
    changes = other if kind == "llama" else {"tie_embeddings": True}
    vision = replace(config.vision, tower="tiny_native", image_size=32) if kind in NATIVE else config.vision
    injection = INJECTIONS.get(kind, config.injection)
    return replace(config, model=replace(config.model, init_std=0.3, **changes), vision=vision, injection=injection)


def random_prompts(draw: np.random.Generator, number: int, vision: VisionConfig) -> list[Any]:
    """1 to 20 random tokens each; no image, one or two, most of them somewhere in the text."""
    from himix_megatron.inference.generator import Prompt

    def image() -> np.ndarray[Any, Any]:
        width, height = vision.blank_size if vision.has_fixed_size else vision.input_size(*draw.integers(4, 60, 2).tolist())
        return draw.integers(0, 256, (3, height, width), dtype=np.uint8)

    prompts = []
    for _ in range(number):
        ids, images = draw.integers(0, 260, draw.integers(1, 21)), tuple(image() for _ in range(draw.integers(0, 3)))
        spare = np.random.default_rng(ids)  # what else is drawn stays as it is
        places = tuple(sorted(spare.integers(0, len(ids) + 1, len(images)).tolist()))
        prompts.append(Prompt(ids, images, places if spare.random() < 0.8 else ()))
    return prompts


def noting_answerer(config: Config, topology: Any) -> Any:
    """An Answerer that notes by how much each choice was ahead of the next best: per row of a part, part by part."""
    from himix_megatron.conversion.sharding import global_parameters
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.inference.generator import Answerer

    class Noting(Answerer):
        margins: list[list[float]]

        def _choose(self, own_BW: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
            parts = [torch.empty_like(own_BW) for _ in range(self.topology.tensor_size)]
            torch.distributed.all_gather(parts, own_BW, group=self.topology.tensor)
            best = torch.cat(parts, dim=-1)[:, :260].topk(2).values
            self.margins.append((best[:, 0] - best[:, 1]).tolist())
            return super()._choose(own_BW, sampling, draws_B)

    answerer = Noting(config, detect(), topology)
    answerer.margins = []
    with torch.no_grad():  # mcore begins biases at 0
        for name, parameter in global_parameters(answerer.model_chunks):
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return answerer


def with_answerers(
    layout: dict[str, int], *questions: Callable[[Any], Any], kinds: Sequence[str] = KINDS
) -> dict[str, list[Any]]:
    """On this rank: what each of the functions finds, given an Answerer of each kind."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    configs = {kind: config_for(kind, **layout) for kind in kinds}
    topology = init_distributed(configs[kinds[0]].parallel, seed=3)
    found = {kind: [ask(noting_answerer(config, topology)) for ask in questions] for kind, config in configs.items()}
    shutdown_distributed()
    return found


def compare(answerer: Any, num_batches: int, sampling: Sampling | None = None) -> dict[str, Any]:
    """Cached and recomputed answers to random prompts; and where they first differ, the reference's margin there."""
    draw = np.random.default_rng(5)
    num_parts = answerer.config.parallel.pipeline if answerer.config.parallel.virtual_pipeline > 1 else 1
    answers, differing, ties, tokens = [], [], 0, 0
    for _ in range(num_batches):
        prompts = random_prompts(draw, BATCH, answerer.config.vision)
        cached = answerer.answer(prompts, STOPS, MAX_NEW, sampling=sampling)
        answerer.margins = []
        wanted = answerer.answer(prompts, STOPS, MAX_NEW, sampling=sampling, cached=False)
        # The interleaved pipeline chooses for a part of the batch at a time; stages but the last choose nothing.
        steps = [list(chain(*answerer.margins[i : i + num_parts])) for i in range(0, len(answerer.margins), num_parts)]
        for row, (ours, theirs) in enumerate(zip(cached, wanted, strict=True)):
            tokens += len(theirs)
            margins = [step[row] for step in steps[: len(theirs) + 1]]
            ties += sum(margin < TIE for margin in margins)
            if ours != theirs:
                at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                at = min(len(ours), len(theirs)) if at < 0 else at
                differing.append((margins[at] if margins else 1.0, ours, theirs))
        answers += cached
    return {"answers": answers, "tokens": tokens, "ties": ties, "differing": differing}


greedy = partial(compare, num_batches=NUM_BATCHES)
greedy_few = partial(compare, num_batches=2)
drawn = partial(compare, num_batches=2, sampling=Sampling(temperature=0.8, top_p=0.9, seed=11))


@pytest.mark.parametrize("size", [1, 2])
def test_cached_answers_are_the_recomputed_ones(size: int) -> None:
    results = run_ranks(with_answerers, size, {"tensor": size}, greedy, drawn, start_gloo=False)
    for kind in KINDS:
        found, drawn_found = results[0][kind]
        answers = found["answers"]
        assert len(answers) * len(KINDS) == NUM_BATCHES * BATCH * len(KINDS) > 200
        assert {0, MAX_NEW} < {len(answer) for answer in answers}  # some end at once, some never
        assert len({tuple(answer) for answer in answers}) > 50  # the model does tell its prompts apart
        assert all(margin < TIE for margin, _, _ in found["differing"]), found["differing"]
        assert not drawn_found["differing"]
        print(f"tensor {size}, {kind}: {len(answers)} answers, {len(found['differing'])} differ;", end=" ")
        print(f"{found['tokens']} tokens, {found['ties']} ties")
    assert all(result == results[0] for result in results)


def laid_out(answerer: Any) -> list[Any]:
    """For some prompts in two parts of a schedule: each row's ids and which vision token of the part each token is."""
    prompts = random_prompts(np.random.default_rng(7), 12, answerer.config.vision)
    found = []
    for part in answerer._parts(prompts, 2, None):
        flat = torch.full((part.given.text_ids.numel(),), -1)
        rows = part.given.vision_rows
        flat[rows] = torch.arange(len(rows))
        found.append((part.given.text_ids.tolist(), flat.view(part.given.text_ids.shape).tolist(), part.last.tolist()))
    return found


def test_prompts_are_laid_out_as_a_loop_would() -> None:
    kinds = ("in text", "in text, fewer")
    (found,) = run_ranks(partial(with_answerers, kinds=kinds), 1, {}, laid_out, start_gloo=False)
    for kind in kinds:
        config = config_for(kind)
        prompts = random_prompts(np.random.default_rng(7), 12, config.vision)
        for own, (ids, numbers, last) in zip((prompts[:6], prompts[6:]), found[kind][0], strict=True):
            vision = 0
            for prompt, row_ids, row_numbers, row_last in zip(own, ids, numbers, last, strict=True):
                wanted = []
                places = prompt.image_places or (0,) * len(prompt.images)
                for i in range(len(prompt.ids) + 1):
                    for image, place in zip(prompt.images, places, strict=True):
                        if place == i:
                            rows, columns = (side // config.vision.patch_size for side in image.shape[1:])
                            count = rows * columns if kind == "in text" else -(-rows // 2) * -(-columns // 2)
                            wanted += [(0, vision + n) for n in range(count)]
                            vision += count
                    wanted += [(int(token), -1) for token in prompt.ids[i : i + 1]]
                assert row_last == len(wanted) - 1
                wanted += [(0, -1)] * (len(row_ids) - len(wanted))
                assert list(zip(row_ids, row_numbers, strict=True)) == wanted


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str)
def test_cached_answers_are_the_recomputed_ones_where_vision_is_in_the_text_or_in_one_stage(layout: dict[str, int]) -> None:
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    results = run_ranks(partial(with_answerers, kinds=tuple(INJECTIONS)), size, layout, greedy_few, start_gloo=False)
    for kind in INJECTIONS:
        found = results[-1][kind][0]
        assert all(margin < TIE for margin, _, _ in found["differing"]), found["differing"]
        assert all(result[kind][0]["answers"] == found["answers"] for result in results)
        assert len({tuple(answer) for answer in found["answers"]}) > 12


@pytest.mark.parametrize("layout", [{"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_every_stage_keeps_its_own_cache(layout: dict[str, int]) -> None:
    size = layout.get("tensor", 1) * layout["pipeline"]
    results = run_ranks(with_answerers, size, layout, greedy_few, start_gloo=False)
    for kind in KINDS:
        assert not results[-1][kind][0]["differing"]
        assert all(result[kind][0]["answers"] == results[0][kind][0]["answers"] for result in results)


def what_is_computed(answerer: Any) -> dict[str, Any]:
    """The shapes that go through head and vision projections during one answer of 8 tokens to 6 prompts."""
    from himix_megatron.model.himix_model import unwrap_model

    model = unwrap_model(answerer.model_chunks[0])
    head, vision, text = [], [], []
    model.output_layer.register_forward_hook(lambda _, given, out: head.append(tuple(out[0].shape[:2])))
    for layer in model.decoder.layers:
        layer.self_attention.linear_vision_kv.register_forward_pre_hook(lambda _, given: vision.append(tuple(given[0].shape)))
        layer.mlp.register_forward_pre_hook(lambda _, given: text.append(tuple(given[0].shape)))
    prompts = random_prompts(np.random.default_rng(1), 6, answerer.config.vision)
    answerer.answer(prompts, (), 8)
    vision_tokens = max(sum(image[0].size // 64 for image in prompt.images) for prompt in prompts)
    longest = max(len(prompt.ids) for prompt in prompts)
    return {"head": head, "vision": vision, "text": text, "vision_tokens": vision_tokens, "longest": longest}


def alone_and_together(answerer: Any) -> dict[str, Any]:
    """Answers to 8 prompts in several ways."""
    prompts = random_prompts(np.random.default_rng(2), 8, answerer.config.vision)
    seen: dict[int, list[int]] = {}

    def watch(row: int, ids: list[int]) -> bool:
        assert ids[:-1] == seen.get(row, [])
        seen[row] = list(ids)
        return len(ids) == row

    def sampled(number: int, seed: int) -> list[list[int]]:
        answers: list[list[int]] = answerer.answer(prompts[:number], (), 10, sampling=Sampling(temperature=1.0, seed=seed))
        return answers

    return {
        "seed 1": sampled(8, 1),
        "seed 2": sampled(8, 2),
        "seed 1 again": sampled(8, 1),
        "seed 1, first alone": sampled(1, 1),
        "greedy": answerer.answer(prompts, (), 10),
        "greedy, each alone": [answerer.answer([prompt], (), 10)[0] for prompt in prompts],
        "watched": answerer.answer(prompts, (), 10, watch=watch),
        "seen": seen,
    }


@pytest.fixture(scope="module")
def looked_at() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = run_ranks(with_answerers, 1, {}, what_is_computed, alone_and_together, start_gloo=False)[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_projected_once_and_only_last_tokens_reach_the_head(looked_at: Any, kind: str) -> None:
    found = looked_at[kind][0]
    assert found["vision"] == [(found["vision_tokens"], 6, 32)] * 4
    assert found["text"] == [(found["longest"], 6, 64)] * 4 + [(1, 6, 64)] * 4 * 7
    assert found["head"] == [(1, 6)] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_depends_on_its_prompt_and_seed_and_on_nothing_beside(looked_at: Any, kind: str) -> None:
    found = looked_at[kind][1]
    assert found["seed 1 again"] == found["seed 1"] != found["seed 2"]
    assert found["seed 1, first alone"] == found["seed 1"][:1]
    assert found["greedy, each alone"] == found["greedy"]
    # Answer n is ended by its watcher after n tokens; answer 0 never.
    assert found["watched"] == [answer[: row or 10] for row, answer in enumerate(found["greedy"])]
    assert [found["seen"][row] for row in range(8)] == found["watched"]


# ---- the choice of a token -----------------------------------------------------------------------------------------


def test_draws_follow_the_probabilities() -> None:
    chances = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000

    def frequencies(**settings: float) -> list[float]:
        tokens = choose(chances.log().float().expand(10_000, -1), Sampling(**settings), draws)  # type: ignore[arg-type]
        return (torch.bincount(tokens, minlength=5) / 10_000).tolist()

    assert frequencies(temperature=1.0) == pytest.approx(chances.tolist(), abs=2e-4)
    # 0.4 and 0.3 do not reach 0.75, with 0.15 they do.
    assert frequencies(temperature=1.0, top_p=0.75) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], abs=2e-4)
    assert frequencies(temperature=1.0, top_p=0.01) == [0, 1, 0, 0, 0]
    assert frequencies(temperature=0.0) == [0, 1, 0, 0, 0]
    sharper = (chances**2 / (chances**2).sum()).tolist()
    assert frequencies(temperature=0.5) == pytest.approx(sharper, abs=2e-4)


def test_the_largest_draw_finds_a_token() -> None:
    draws = torch.full((4,), 1 - 2**-53, dtype=torch.float64)
    for top_p in (1.0, 0.9, 1e-9):
        tokens = choose(torch.randn(4, 1000), Sampling(temperature=2.0, top_p=top_p), draws)
        assert ((tokens >= 0) & (tokens < 1000)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", v) for v in (-0.1, float("nan"), float("inf"), 1e-320)]
    + [("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")), ("seed", -1), ("seed", 2**64)],
)
def test_sampling_refuses_what_means_nothing(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]


# ---- text as it comes ----------------------------------------------------------------------------------------------


def streamed(text: str, *stops: str) -> tuple[list[str], str, bool]:
    """The pieces written for a text that comes byte by byte; all of it; whether a stop ended it."""
    pieces: list[str] = []
    stream = TextStream(load_tokenizer("bytes"), stops, pieces.append)
    ids = list(text.encode())
    ended = any(stream.push(ids[:n]) for n in range(1, len(ids) + 1))
    return pieces, stream.finish(), ended


def test_text_is_written_as_soon_as_it_is_certain() -> None:
    assert streamed(" red") == (["r", "e", "d"], "red", False)
    pieces, text, _ = streamed("ünd 🙂!")
    assert pieces == ["ü", "n", "d", " ", "🙂", "!"]
    assert text == "ünd 🙂!"


def test_a_stop_text_is_never_shown_and_what_only_began_like_one_is() -> None:
    assert streamed("red\n\nUSER: why", "\nUSER", "END") == (["r", "e", "d", "\n"], "red\n", True)
    pieces, text, ended = streamed("an EN", "END")
    assert (pieces, text, ended) == (["a", "n", " ", "EN"], "an EN", False)
    assert streamed("aab", "ab") == (["a"], "a", True)
    assert streamed("stop", "stop") == ([], "", True)
    assert streamed("x🙂y", "🙂") == (["x"], "x", True)


def test_a_cut_character_is_shown_at_the_end() -> None:
    stream = TextStream(load_tokenizer("bytes"))
    stream.push([*b"a", 0xF0, 0x9F])
    assert stream.text == "a"
    assert stream.finish().startswith("a\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("stops", [[""], ["x" * 257], ["x"] * 17], ids=["empty", "long", "many"])
def test_a_stop_text_that_is_empty_or_costs_too_much_is_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="a stop string is empty or too long, or there are too many"):
        TextStream(load_tokenizer("bytes"), stops)
