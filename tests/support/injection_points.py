"""Points of the space of `injection`, and samples for them, drawn from a seed.

Flows out: a Case, which is a Config for one rank and micro-batches of samples. It depends on its seed and number alone. What
contradicts itself is what Config refuses: it is drawn anew.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from himix_megatron.config import (
    METHODS,
    Config,
    DataConfig,
    InjectionConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Part,
    TrainConfig,
    VisionConfig,
)
from tests.support.injection_reference import IGNORED, Image, Sample, trains, weight_shapes
from tests.support.key_norms import NAME as NORMED_KEYS

CHOICES: dict[str, tuple[Any, ...]] = {
    "adapter": ("none", "shared", "per_layer"),
    "keys_values": ("own", "text"),
    "norm": ("own", "input", "none"),
    "key_norm": ("own", "shared", "none"),
    "position": ("none", "learned", "rotary", "rotary_image"),
    "visibility": ("all", "earlier", "latest"),
    "gate": ("none", "tanh", "zero"),
    "local_text": (False, True),
    "reduce": ("none", "merge", "pool"),
}
"""All fields of InjectionConfig but `fusion` and the layers, and all their values."""
FUSIONS = {"joint": 4, "separate": 4, "block": 3, "tokens": 1}
"""Each with its share: more choices remain to the first."""
NUM_LAYERS = 4
VOCABULARY = 96
ALL_PARTS: tuple[Part, ...] = ("language", "vision_kv", "tower")
PARTS: tuple[tuple[Part, ...], ...] = (ALL_PARTS, ALL_PARTS, ALL_PARTS[:2], ALL_PARTS[1:2], ALL_PARTS[:1], ALL_PARTS[1:])
"""What may train."""
FAMILIES = ("llama", "qwen2", NORMED_KEYS)


@dataclass(frozen=True)
class Case:
    """One thing to compute both ways."""

    name: str
    config: Config
    micro_batches: tuple[tuple[Sample, ...], ...]
    packed: bool
    seed: int
    """Of weights and pixels."""
    sequence: bool = False
    """Whether activations are split along the text, at any layout with tensor ranks."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for micro_batch in self.micro_batches for sample in micro_batch)

    @property
    def tower_trains(self) -> bool:
        return "tower" in self.config.train.trainable_parts

    def at(self, parallel: ParallelConfig) -> Config:
        """The configuration in a layout of ranks."""
        sequence = parallel.sequence or (self.sequence and parallel.tensor > 1)
        return replace(self.config, parallel=replace(parallel, sequence=sequence))


def tiny_config(
    injection: InjectionConfig,
    *,
    packed: bool,
    family: str = "llama",
    tower: str = "tiny",
    vision_width: int = 32,
    feature_layers: tuple[int, ...] = (),
    parts: tuple[Part, ...] = ("language", "vision_kv"),
    recompute: Any = "none",
    **of_model: Any,
) -> Config:
    """A decoder of 4 layers of width 64, and a tower of 3 whose images have 9 tokens, or up to 9 in their own aspect.

    Raises: ValueError for choices that contradict each other.
    """
    batch: dict[str, int] = {"global_batch_packs": 2} if packed else {"global_batch_samples": 2}
    budgets = {"pack_max_text_tokens": 64, "pack_max_vision_tokens": 256} if packed else {}
    sizes: dict[str, Any] = {
        "num_layers": NUM_LAYERS, "hidden_size": 64, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "vocab_size": VOCABULARY, "layer_spec": "torch", "rope_theta": 100.0,
    }  # fmt: skip
    return Config(
        recipe="injection",
        model=ModelConfig(family=family, **(sizes | of_model)),
        vision=VisionConfig(
            tower=tower, image_size=24, patch_size=8, hidden_size=vision_width, num_layers=3, num_attention_heads=2,
            ffn_hidden_size=32, feature_layer=-1, feature_layers=feature_layers,
        ),
        injection=injection,
        data=DataConfig(datasets=("none",), template="tiny", max_text_tokens=64, **budgets),
        train=TrainConfig(
            trainable_parts=parts,
            micro_batch_samples=1, precision="fp32", recompute=recompute, **batch,
        ),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )  # fmt: skip


def preset_case(method: str, *, packed: bool, parts: tuple[Part, ...] | None = None, seed: int = 1) -> Case:
    """A published method: rows of images' features, or packs whose images have different sizes and whose tower trains.

    Args: parts: what trains; None: everything, of rows all but the tower.
    """
    draw = random.Random(f"{method} {packed} {seed}")
    number = list(METHODS).index(method)
    config = tiny_config(
        InjectionConfig(),
        packed=packed,
        family=FAMILIES[(number + packed) % len(FAMILIES)],
        tower="tiny_native" if packed else "tiny",
        parts=parts or (ALL_PARTS if packed else ALL_PARTS[:2]),
        tie_embeddings=packed,
    )
    config = replace(config, injection=METHODS[method](config.model))
    name = f"{method}, {'packed' if packed else 'dense'}, {' '.join(config.train.trainable_parts)}"
    return _case(name, config, draw, packed=packed, seed=seed)


def point_case(seed: int, number: int) -> Case:
    """A random point of the space, with random samples, packed."""
    draw = random.Random(f"injection {seed} {number}")
    fusion = draw.choices(list(FUSIONS), list(FUSIONS.values()))[0]
    while True:
        try:
            config = _draw_config(draw, fusion)
        except ValueError:
            continue
        if any(trains(config, name) for name in weight_shapes(config)):
            break
    case = _case(f"seed {seed} number {number}", config, draw, packed=True, seed=seed * 1000 + number)
    return replace(case, sequence=draw.random() < 0.5)


def _draw_config(draw: random.Random, fusion: str) -> Config:
    layers: dict[str, Any] = draw.choice(
        [{}, {"every_layers": draw.randint(2, 4)}, {"layers": tuple(sorted(draw.sample(range(4), draw.randint(1, 3))))}]
    )
    injection = InjectionConfig(
        fusion=fusion,  # type: ignore[arg-type]
        **layers,
        **{name: draw.choice(values) for name, values in CHOICES.items()},
    )
    groups = draw.choice([2, 4])
    return tiny_config(
        injection,
        packed=True,
        family=draw.choice(FAMILIES),
        tower=draw.choice(["tiny", "tiny_native"]),
        vision_width=draw.choice([16, 32, 64]),  # the second is never the text's width, the others may be
        feature_layers=draw.choice([(), (), (-1, -2), (-3, -1), (-1, -2, -3)]),
        parts=draw.choice(PARTS),
        recompute=draw.choice(["none", "none", "full", "selective"]),
        num_query_groups=groups,
        head_dim=draw.choice([None, 8]),
        tie_embeddings=draw.random() < 0.3,
    )


def _case(name: str, config: Config, draw: random.Random, *, packed: bool, seed: int) -> Case:
    number = draw.randint(2, 3)
    if packed:
        micro_batches = [
            [_sample(draw, config, draw.choice([1, *[draw.randint(3, 11)] * 4])) for _ in range(number)] for _ in "12"
        ]
    else:
        micro_batches = [[_sample(draw, config, draw.randint(7, 11)) for _ in range(number)] for _ in "12"]
    # Whatever is drawn, some text sees an image: else nothing of vision would have a gradient.
    first = micro_batches[0][0]
    if len(first.ids) < 3 or not any(image.place <= 1 for image in first.images):
        micro_batches[0][0] = _sample(draw, config, 8, places=(1, 1, 5))
    return Case(name, config, tuple(map(tuple, micro_batches)), packed, seed)


def _sample(draw: random.Random, config: Config, length: int, places: tuple[int, ...] | None = None) -> Sample:
    """Random words; no image to three, of which the tower sees any size that it can."""
    ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
    answers = [token > 0 and draw.random() < 0.8 for token in range(length)] + [False]
    labels = tuple(ids[i + 1] if answers[i + 1] else IGNORED for i in range(length))
    if places is None:
        kinds = (0, length, draw.randint(0, length), draw.randint(0, length))
        number = draw.choice([0, 1, 1, 2, 3])
        places = tuple(draw.choice(kinds) for _ in range(number))
        if number > 1 and draw.random() < 0.4:
            places = (places[0], *places[:-1])  # neighbours that no text divides
    side = config.vision.image_size // config.vision.patch_size
    grids = [(side, side)] if config.vision.has_fixed_size else [(3, 3), (1, 9), (2, 4), (4, 2), (1, 1), (3, 2), (2, 3), (5, 1)]
    return Sample(ids, labels, tuple(Image(*draw.choice(grids), place) for place in sorted(places)))
