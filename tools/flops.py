"""What a model costs: parameters, memory, and FLOPs counted as in the paper and honestly, compared with vanilla.

    python -m tools.flops --paper                          the paper's five models, one line each
    python -m tools.flops qwen2_0_5b_align                 a recipe's table, for a sample of its usual length
    python -m tools.flops qwen2_0_5b_align --text-tokens 300 --images 2 --plot flops.png
    python -m tools.flops qwen2_0_5b_align --methods       every method of the family on the recipe's model, one line each
    python -m tools.flops qwen2_0_5b_align --method vica --injection.reduce merge      another way in for vision
    python -m tools.flops --layers 12 --hidden 768 --ffn 2048 --heads 12 --groups 4 --vocab 32000

Vanilla is the same decoder with the vision tokens in its text, as in LLaVA. The paper counts the forward pass, attention as
full rectangles, and the LM head on every token, vision tokens included. In the honest count text sees only what precedes it,
and the head runs on text alone (in training: on labelled tokens). `step` is the forward and backward pass of one sample.
A recipe's fields are changed by the same flags as in pipelines.pretrain.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from himix_megatron.config import (
    METHODS,
    Config,
    Count,
    CountOrZero,
    DataConfig,
    InjectionConfig,
    ModelConfig,
    OptimizerConfig,
    Positive,
    TrainConfig,
    VisionConfig,
)
from himix_megatron.costs.flops import (
    StepFlops,
    Work,
    decoder_tokens,
    forward_flops,
    head_flops,
    image_flops,
    kv_cache_bytes,
    patches_of,
    step_flops,
)
from himix_megatron.costs.memory import GIB, MicroBatch, RankMemory, model_parameters, rank_memory
from pipelines.cli import METHOD, parse, parse_settings, run_main
from pipelines.flags import Word, split_flags
from pipelines.recipes import RECIPES, clip_large_336, siglip_so400m_384

Given = TypeVar("Given")

PAPER = {
    "Qwen2-0.5B": ("qwen2_0_5b_align", (837, 78)),
    "TinyLlama-1.1B": ("tinyllama_1_1b_align", (1750, 161)),
    "Llama-3.2-1B": ("llama3_2_1b_align", (2040, 192)),
    "Llama-3.2-3B": ("llama3_2_3b_align", None),
    "Vicuna-7B": ("vicuna_7b_align", None),
}
"""Recipe, and the published GFLOP of the decoder, vanilla and HiMix, where the text at hand has them."""
PAPER_TEXT_TOKENS = 64
METHODS_TEXT_TOKENS = (64, 314)
"""The paper's, and the mean of mix665k's conversations."""
PROGRAM = "python -m tools.flops"
TOWERS = {"siglip": siglip_so400m_384, "clip": clip_large_336}
SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
    "vocab": "vocab_size",
}
"""A flag, and the field of ModelConfig that it sets."""


@dataclass(frozen=True)
class Arguments:
    """Print what a model costs: parameters, FLOPs, memory."""

    recipe: Annotated[str | None, Word("RECIPE")] = None
    """Recipe; the sizes below override its own."""
    methods: bool = False
    """Print every method of the family instead: at 64 and 314 text tokens, or at --text-tokens."""
    paper: bool = False
    """Print only the paper's five models, at 64 text tokens and one image."""
    text_tokens: Count | None = None
    """Text tokens of a sample. None: the recipe's usual number, else 64."""
    images: CountOrZero = 1
    """Images of a sample."""
    vision_tokens: Positive | None = None
    """Mean vision tokens of an image. None: those of the tower's largest image, which are every image's where its size is
    fixed."""
    label_share: float = 0.5
    """Share of the text tokens that have a label and go through the head in training."""
    micro_batch: Count | None = None
    """Samples of a forward pass, for the memory. None: the recipe's, else 1."""
    layers: Count | None = None
    """Decoder layers."""
    hidden: Count | None = None
    """Width of the decoder."""
    ffn: Count | None = None
    """Inner width of its SwiGLU MLP."""
    heads: Count | None = None
    """Query heads."""
    groups: Count | None = None
    """Key/value heads."""
    vocab: Count | None = None
    """Vocabulary size."""
    tower: Literal["siglip", "clip"] | None = None
    """Vision tower. None: the recipe's, else siglip."""
    plot: Path | None = None
    """PNG file to write: FLOPs over text length and over the number of images."""


def read_words(cls: type[Given], program: str, description: str | None) -> tuple[Given, list[str]]:
    """The command line: a tool's own settings, and the flags that change fields of its recipe. Raises: ValueError."""
    words = split_flags(sys.argv[1:], lambda name: name == METHOD or "." in name)
    return parse_settings(cls, words.get(False, []), program, description), words.get(True, [])


def config_of(arguments: Arguments, flags: Sequence[str] = ()) -> Config:
    """The recipe with the fields and sizes given, or the sizes alone. Raises: ValueError."""
    given = {name: getattr(arguments, name) for name in SIZES if getattr(arguments, name) is not None}
    if arguments.recipe is None:
        if flags:
            raise ValueError(f"{flags[0]} changes a field of a recipe: name one ({', '.join(RECIPES)})")
        missing = [f"--{name}" for name in SIZES if name not in given]
        if missing:
            raise ValueError(
                f"name a recipe ({', '.join(RECIPES)}), or give all sizes: {', '.join(missing)} missing; or --paper"
            )
        config = bare_config(ModelConfig(family="llama", **{field: given[name] for name, field in SIZES.items()}))
    else:
        config = parse([arguments.recipe, *flags], PROGRAM)
        config = replace(config, model=replace(config.model, **{SIZES[name]: value for name, value in given.items()}))
    return config if arguments.tower is None else replace(config, vision=TOWERS[arguments.tower]())


def bare_config(model: ModelConfig) -> Config:
    """A decoder of these sizes on one GPU."""
    return Config(
        recipe="sizes",
        model=model,
        vision=siglip_so400m_384(),
        data=DataConfig(template="plain", max_text_tokens=2048),
        train=TrainConfig(trainable_parts=("language", "vision_kv"), global_batch_samples=1, precision="bf16"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )


def mean_vision_tokens(vision: VisionConfig, given: float | None) -> float:
    """--vision-tokens as given, or those of the tower's largest image. Raises: ValueError if no images can have that mean."""
    most = vision.max_tokens_per_image
    if given is not None and (given > most or (given < most and vision.has_fixed_size)):
        wanted = f"all its images have {most}" if vision.has_fixed_size else f"its largest image has {most}"
        raise ValueError(f"--vision-tokens is {given:g}, but the tower is {vision.tower}: {wanted}")
    return float(most) if given is None else given


@dataclass(frozen=True)
class Comparison:
    """A configuration and vanilla on one sample."""

    paper: tuple[float, float]
    """Forward of the decoder and its head, FLOPs."""
    honest: tuple[float, float]
    with_tower: tuple[float, float]
    step: tuple[StepFlops, StepFlops]


def compare(config: Config, text: float, images: float, labels: float, each: float | None = None) -> Comparison:
    """The four counts. `labels`: tokens that go through the head in a training step; `each`: as `mean_vision_tokens`."""
    each = mean_vision_tokens(config.vision, each)
    vision, encoding = images * each, Work.encoding([patches_of(config.vision, each)]) * images
    ours, theirs, plain = ([text], [decoder_tokens(config, vision)]), ([text], [vision]), vanilla(config)
    tower = forward_flops(config, encoding).tower

    def forward(head: float, head_of_vanilla: float, causal: bool) -> tuple[float, float]:
        own = Work.of(*ours, head_tokens=head, causal=causal)
        other = Work.concatenated(*theirs, head_tokens=head_of_vanilla, causal=causal)
        return forward_flops(config, own).language, forward_flops(plain, other).language

    own, other = forward(text, text, causal=True)
    trained = Work.of(*ours, head_tokens=labels), Work.concatenated(*theirs, head_tokens=labels)
    return Comparison(
        paper=forward(text, text + vision, causal=False),
        honest=(own, other),
        with_tower=(own + tower, other + tower),
        step=(step_flops(config, trained[0] + encoding), step_flops(plain, trained[1] + encoding, inputs_train=True)),
    )


def vanilla(config: Config) -> Config:
    """The configuration of which a count without vision tokens is that of the plain decoder."""
    return replace(config, injection=InjectionConfig())


def method_lines(config: Config, text: int, each: float, label_share: float) -> Iterator[str]:
    """One line for each method on one sample with an image of `each` tokens; and one for the settings' own if they are none."""
    points = {name: make(config.model) for name, make in METHODS.items()}
    points |= {} if config.injection in points.values() else {"as given": config.injection}
    yield f"{f'{text} text tokens':<18}{'forward, GFLOP':^30}{'step, GFLOP':^20}{'first token':>12}{'KV cache, MiB':^22}"
    yield (
        f"{'':<18}{'decoder':>10}{'tower':>10}{'total':>10}{'decoder':>10}{'total':>10}{'GFLOP':>12}{'an image':>11}"
        f"{'sample':>11}"
    )
    for name, injection in points.items():
        try:
            own = replace(config, injection=injection)
        except ValueError as error:
            yield f"{name:<18}{error}"
            continue
        found = compare(own, text, 1, label_share * text, each)
        step, forward, total = found.step[0], found.honest[0], found.with_tower[0]
        first = total - head_flops(own.model, text_tokens=text - 1)
        flops = "".join(f"{number / 1e9:>10.1f}" for number in (forward, total - forward, total, step.language, step.model))
        cache = "".join(f"{kv_cache_bytes(own, tokens, each) / 2**20:>11.2f}" for tokens in (0, text))
        yield f"{name:<18}{flops}{first / 1e9:>12.1f}{cache}"


def paper_lines() -> Iterator[str]:
    """One line for each of the five models."""
    for name, (recipe, published) in PAPER.items():
        found = compare(RECIPES[recipe](), PAPER_TEXT_TOKENS, 1, PAPER_TEXT_TOKENS)
        himix, vanilla = found.paper
        said = f"published {published[0]} -> {published[1]}" if published else "published: no figure at hand"
        yield (
            f"{name:<15}{vanilla / 1e9:8.0f} ->{himix / 1e9:5.0f} GFLOP, {vanilla / himix:4.1f} times ({said}); honest "
            f"{_ratio(found.honest):.1f} times, with the tower {_ratio(found.with_tower):.1f}"
        )


def _ratio(pair: tuple[float, float]) -> float:
    return pair[1] / pair[0]


def table(config: Config, text: int, images: int, each: float, label_share: float, micro_batch: int) -> Iterator[str]:
    """A recipe's or given sizes' table. `each`: mean vision tokens of an image."""
    vision, own = config.vision, model_parameters(config)
    yield (
        f"{config.recipe}: {text} text tokens, {images} image{'' if images == 1 else 's'} of {each:g} tokens "
        f"({vision.tower}), trains {', '.join(config.train.trainable_parts)}"
    )
    yield (
        f"parameters: {_count(own.total)}: language {_count(own.language)}, vision K/V {_count(own.vision_kv)}, tower "
        f"{_count(own.tower)}; trained {_count(own.trained(config))}"
    )
    found, name = compare(config, text, images, label_share * text, each), name_of(config)
    yield f"{'GFLOP of one sample':<44}{name:>10}{'vanilla':>10}{'ratio':>7}"
    steps = found.step
    for what, ours, theirs in (
        ("forward, decoder, the paper's way", *found.paper),
        ("forward, decoder, honest", *found.honest),
        ("forward, with the tower, honest", *found.with_tower),
        ("step, decoder", steps[0].language, steps[1].language),
        ("step, with the tower: model FLOPs", steps[0].model, steps[1].model),
        ("step, with what is recomputed: hardware FLOPs", steps[0].hardware, steps[1].hardware),
    ):
        yield f"{what:<44}{ours / 1e9:>10.1f}{theirs / 1e9:>10.1f}{theirs / ours:>7.1f}"
    caches = kv_cache_bytes(config, 0, each), kv_cache_bytes(vanilla(config), each, 0)
    yield f"{'MiB of KV cache for one image':<44}{caches[0] / 2**20:>10.2f}{caches[1] / 2**20:>10.2f}{_ratio(caches):>7.1f}"
    yield from _memory(config, text, images * each, micro_batch)


def _memory(config: Config, text: int, vision: float, micro_batch: int) -> Iterator[str]:
    """Memory of one rank that holds the whole model, at so many text and vision tokens a sample."""
    single = replace(
        config,
        parallel=replace(config.parallel, tensor=1, pipeline=1, virtual_pipeline=1, sequence=False),
        train=replace(config.train, global_batch_samples=micro_batch, micro_batch_samples=micro_batch),
    )
    own, other = (
        rank_memory(
            held, 0, data_size=1, vision_tokens_per_step=vision * micro_batch,
            micro_batch=MicroBatch(text_tokens=micro_batch * s, vision_tokens=micro_batch * n, rows=micro_batch),
        )
        for held, s, n in ((single, text, vision), (vanilla(single), text + vision, 0))
    )  # fmt: skip
    yield f"{f'GiB on one GPU, micro-batch of {micro_batch}':<44}{name_of(config):>10}{'vanilla':>10}{'ratio':>7}"
    for what in (*RankMemory.__dataclass_fields__, "total"):
        ours, theirs = getattr(own, what), getattr(other, what)
        ratio = f"{theirs / ours:>7.1f}" if ours else ""
        yield f"{what:<44}{ours / GIB:>10.2f}{theirs / GIB:>10.2f}{ratio}"


def name_of(config: Config) -> str:
    """HiMix, or what its way in for vision is called."""
    if config.injection == InjectionConfig():
        return "HiMix"
    return next((name for name, make in METHODS.items() if make(config.model) == config.injection), "as given")


def _count(number: float) -> str:
    """1.24 B, 494 M."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def plot(config: Config, text: int, images: int, each: float, path: Path) -> None:
    """Decoder FLOPs of a sample's forward pass: over its text's length, and over its number of images, of `each` tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tower = image_flops(config.vision, patches_of(config.vision, each))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    lengths, counts = [16 * 2 ** (k / 4) for k in range(29)], list(range(1, 17))
    for axis, places, samples, title in (
        (left, lengths, [(s, images) for s in lengths], f"text tokens ({images} image{'' if images == 1 else 's'})"),
        (right, counts, [(text, k) for k in counts], f"images ({text} text tokens)"),
    ):
        found = [compare(config, s, k, s, each) for s, k in samples]
        for way, style in (("paper", "--"), ("honest", "-")):
            for which, name, colour in ((1, "vanilla", "tab:red"), (0, name_of(config), "tab:blue")):
                values = [getattr(item, way)[which] / 1e9 for item in found]
                label = f"{name}, {'honest' if way == 'honest' else 'the way of the paper'}"
                axis.plot(places, values, style, color=colour, label=label)
        axis.plot(places, [k * tower / 1e9 for _, k in samples], ":", color="grey", label="tower")
        axis.set_xlabel(title)
        axis.set_yscale("log")
        axis.grid(visible=True, alpha=0.3)
    left.set_xscale("log", base=2)
    left.set_ylabel("GFLOP, forward, one sample")
    left.legend()
    figure.suptitle(f"{config.recipe}: decoder with head")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def check(arguments: Arguments) -> None:
    """Raises: ValueError naming the flag."""
    if not 0 < arguments.label_share <= 1:
        raise ValueError(f"--label-share is {arguments.label_share}: wanted above 0, at most 1")
    if arguments.paper and arguments.recipe is not None:
        raise ValueError(f"--paper has its own models: leave {arguments.recipe} out, or --paper")
    if arguments.methods and (arguments.paper or arguments.plot is not None or arguments.images != 1):
        raise ValueError("--methods compares samples of one image: leave --paper, --plot and --images out")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        raise ValueError(f"--plot {arguments.plot}: there is no folder {arguments.plot.parent}")


def main() -> int:
    """The command line."""
    arguments, flags = read_words(Arguments, PROGRAM, __doc__)
    check(arguments)
    if arguments.paper:
        print(*paper_lines(), sep="\n")
        return 0
    config = config_of(arguments, flags)
    text = arguments.text_tokens or (config.parallel.split_text_tokens if arguments.recipe else PAPER_TEXT_TOKENS)
    micro_batch = arguments.micro_batch or config.micro_batch
    each = mean_vision_tokens(config.vision, arguments.vision_tokens)
    if arguments.methods:
        print(f"{config.recipe}: one image of {each:g} tokens, trains {', '.join(config.train.trainable_parts)}")
        for number in [arguments.text_tokens] if arguments.text_tokens else METHODS_TEXT_TOKENS:
            print(*method_lines(config, number, each, arguments.label_share), sep="\n")
        return 0
    print(*table(config, text, arguments.images, each, arguments.label_share, micro_batch), sep="\n")
    if arguments.plot is not None:
        plot(config, text, arguments.images, each, arguments.plot)
        print(f"plot: {arguments.plot}")
    return 0


if __name__ == "__main__":
    run_main(main)
