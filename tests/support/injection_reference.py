"""What every way of vision into the decoder computes, in float64: explicit masks, whole softmaxes, one sample at a time.

Flows in: a Config's sizes and choices, whole weights by the names of our checkpoints, samples, and the tower's features of
each image; out: logits, the answer loss, and the gradient of every weight and of the features. Nothing here is shared with the
library but the settings. There are two forms: `general` follows every choice of `injection`, and PRESETS has each published
method's own equations, written separately; tests/model/test_injection_reference.py holds one against the other.

Shape letters: n text tokens, T vision tokens of a sample, H text width, W width of what makes vision keys, Q query heads, G
key/value heads, D head width, L hidden states of the tower.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from himix_megatron.config import Config

IGNORED = -100
IMAGE_NUMBERS = 64
"""Rows of the table of image numbers; later images share its last row."""


@dataclass(frozen=True)
class Image:
    """One image of a sample."""

    rows: int
    """Of the tower's tokens."""
    columns: int
    place: int
    """Text tokens of the sample before it."""


@dataclass(frozen=True)
class Sample:
    """A text and its images, these in the order of their places."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """Of each token the one that follows it, or -100 where that is no answer."""
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Outcome:
    """What a model makes of samples."""

    logits: tuple[Tensor, ...]
    """Of each sample float[n, vocabulary]: those that predict what follows each text token. Where vision stands in the sequence
    they belong to the last of the vision tokens between the two."""
    loss: float
    """Mean over all answer tokens."""
    gradients: dict[str, Tensor]
    """Of the loss, by the weight's name."""
    of_features: tuple[Tensor, ...]
    """The same of each image's features."""
    scales: dict[str, float]
    """Of each gate the norm of what its gradient is the sum of, a number of either sign for each token."""


# ---- weights -----------------------------------------------------------------------------------------------------------


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every weight of the decoder and of its way to vision, by name."""
    model, vision, injection = config.model, config.vision, config.injection
    hidden, inner, head = model.hidden_size, model.ffn_hidden_size, model.channels_per_head
    queries, keys = model.num_attention_heads * head, model.num_query_groups * head
    biased = model.family == "qwen2"
    features = vision.hidden_size * (4 if injection.reduce == "merge" else 1)
    levels = len(vision.feature_layers) or 1
    width = features if injection.adapter == "none" else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (model.vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size, hidden)

    def matrix(name: str, outputs: int, inputs: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def adapter(name: str) -> None:
        matrix(f"{name}.linear_fc1", hidden, features, bias=True)
        matrix(f"{name}.linear_fc2", hidden, hidden, bias=True)

    if injection.adapter == "shared":
        adapter("vision_input.adapter")
    if injection.position == "learned":
        side = vision.image_size // vision.patch_size
        longest = side if vision.tower == "tiny" else side**2
        if injection.reduce != "none":
            longest = (longest + 1) // 2
        for table, number in (("row", longest), ("column", longest), ("image", IMAGE_NUMBERS)):
            shapes[f"vision_input.{table}_positions"] = (number, levels * features)
    for layer in range(model.num_layers):
        of_layer = f"decoder.layers.{layer}."
        attention = f"{of_layer}self_attention."
        shapes[f"{attention}linear_qkv.layer_norm_weight"] = (hidden,)
        matrix(f"{attention}linear_qkv", queries + 2 * keys, hidden, bias=biased)
        matrix(f"{attention}linear_proj", hidden, queries, bias=False)
        shapes[f"{of_layer}mlp.linear_fc1.layer_norm_weight"] = (hidden,)
        matrix(f"{of_layer}mlp.linear_fc1", 2 * inner, hidden, bias=False)
        matrix(f"{of_layer}mlp.linear_fc2", hidden, inner, bias=False)
        if norms_keys(config):
            shapes[f"{attention}q_layernorm.weight"] = shapes[f"{attention}k_layernorm.weight"] = (head,)
        if layer not in injecting_layers(config):
            continue
        own = f"{of_layer}vision_block." if injection.fusion == "block" else attention
        if injection.adapter == "per_layer":
            adapter(f"{own}vision_adapter")
        if injection.norm == "own":
            shapes[f"{own}vision_norm.weight"] = (width,)
        if injection.keys_values == "own":
            matrix(f"{own}linear_vision_kv", 2 * keys, width, bias=biased)
        if injection.fusion == "block":
            for name, length in (
                ("input_layernorm", hidden),
                ("pre_mlp_layernorm", hidden),
                ("q_norm", head),
                ("k_norm", head),
            ):
                shapes[f"{own}{name}.weight"] = (length,)
            matrix(f"{own}linear_q", queries, hidden, bias=biased)
            matrix(f"{own}linear_proj", hidden, queries, bias=False)
            matrix(f"{own}mlp.linear_fc1", 2 * inner, hidden, bias=False)
            matrix(f"{own}mlp.linear_fc2", hidden, inner, bias=False)
            shapes[f"{own}attention_gate"] = shapes[f"{own}mlp_gate"] = (1,)
            continue
        if norms_keys(config) and injection.key_norm == "own":
            shapes[f"{attention}vision_key_norm.weight"] = (head,)
        if injection.fusion == "separate" and injection.gate == "tanh":
            shapes[f"{attention}vision_gate"] = (1,)
        if injection.fusion == "separate" and injection.gate == "zero":
            matrix(f"{attention}linear_vision_proj", hidden, queries, bias=False)
    return shapes


def norms_keys(config: Config) -> bool:
    """Whether the family norms queries and keys (tests/support/key_norms.py)."""
    return config.model.family == "normed_keys"


def trains(config: Config, name: str) -> bool:
    """Whether a weight trains: by its name it belongs to the tower, to what brings vision in, or to the language model."""
    part = "tower" if name.startswith("tower.") else "vision_kv" if "vision_" in name else "language"
    return part in config.train.trainable_parts


def injecting_layers(config: Config) -> tuple[int, ...]:
    """Layers with vision parameters, from 0."""
    injection, number = config.injection, config.model.num_layers
    if injection.fusion == "tokens":
        return ()
    if injection.layers:
        return injection.layers
    return tuple(layer for layer in range(number) if (layer + 1) % injection.every_layers == 0)


def drawn_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """float32 weights of a size at which every part matters, none of them 0: what starts at 0 would hide what lies behind."""
    return {name: _drawn(name, shape, seed) for name, shape in weight_shapes(config).items()}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
    if name.endswith("_gate"):
        return numbers.sign() * (0.5 + numbers.abs() / 2)
    if "norm" in name:
        return 1 + 0.3 * numbers
    if name.endswith("bias"):
        return 0.3 * numbers
    if "embedding" in name or "positions" in name:
        return numbers
    return numbers * shape[-1] ** -0.5


# ---- pieces ------------------------------------------------------------------------------------------------------------


class Pieces:
    """What all methods are made of, on the weights of one model; `used` has the names that were read."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]):
        self.config, self.model, self.injection, self.weights = config, config.model, config.injection, weights
        self.used: set[str] = set()
        self.terms: dict[str, list[Tensor]] = {}
        """Of each gate what it multiplies each token with, of every sample."""
        self.heads_of_group = config.model.num_attention_heads // config.model.num_query_groups

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if f"{name}.bias" in self.weights else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        """x / rms(x) * w."""
        return x / (x.square().mean(-1, keepdim=True) + self.model.norm_eps).sqrt() * self.weight(name)

    def gate(self, name: str, number: int) -> Tensor:
        """tanh of a gate's one number, float[n, 1] for n tokens."""
        each = torch.tanh(self.weight(name)).expand(number, 1)
        if each.requires_grad:
            each.retain_grad()
        self.terms.setdefault(name, []).append(each)
        return each

    def input_norm(self, layer: int, x: Tensor) -> Tensor:
        return self.norm(x, f"decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight")

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.weight("embedding.word_embeddings.weight")[list(ids)]

    def logits(self, x: Tensor) -> Tensor:
        head = "output_layer.weight" if "output_layer.weight" in self.weights else "embedding.word_embeddings.weight"
        return self.norm(x, "decoder.final_layernorm.weight") @ self.weight(head).T

    def qkv(self, layer: int, normed: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, Q, D], keys and values [n, G, D] by the text's projections; the first two normed where the family does,
        then turned to `positions`."""
        attention = f"decoder.layers.{layer}.self_attention."
        groups, head = self.model.num_query_groups, self.model.channels_per_head
        together = self.linear(normed, f"{attention}linear_qkv").view(len(normed), groups, self.heads_of_group + 2, head)
        query, key, value = together[:, :, :-2].flatten(1, 2), together[:, :, -2], together[:, :, -1]
        if norms_keys(self.config):
            query, key = self.norm(query, f"{attention}q_layernorm.weight"), self.norm(key, f"{attention}k_layernorm.weight")
        if positions is not None:
            query, key = self.rotate(query, positions), self.rotate(key, positions)
        return query, key, value

    def vision_kv(self, name: str, vision: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, G, D] by a vision projection of their own."""
        both = self.linear(vision, name).view(len(vision), self.model.num_query_groups, 2, self.model.channels_per_head)
        return both[:, :, 0], both[:, :, 1]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """float[m, heads, D] turned; channel i and channel i + D/2 are a pair."""
        half = x.shape[-1] // 2
        frequencies = self.model.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions.double()[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """float[n, Q * D]: softmax over what each query sees, bool[n, m]; 0 where it sees nothing."""
        key, value = (x.repeat_interleave(self.heads_of_group, 1) for x in (key, value))
        scores = torch.einsum("nqd,mqd->qnm", query, key) / math.sqrt(query.shape[-1])
        shares = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
        return torch.einsum("qnm,mqd->nqd", shares, value).flatten(1)

    def adapter(self, x: Tensor, name: str) -> Tensor:
        x = self.linear(x, f"{name}.linear_fc1")
        return self.linear(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), f"{name}.linear_fc2")

    def swiglu(self, x: Tensor, name: str) -> Tensor:
        gate, up = self.linear(x, f"{name}.linear_fc1").chunk(2, -1)
        return self.linear(gate * torch.sigmoid(gate) * up, f"{name}.linear_fc2")

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's MLP adds."""
        mlp = f"decoder.layers.{layer}.mlp"
        return self.swiglu(self.norm(x, f"{mlp}.linear_fc1.layer_norm_weight"), mlp)

    def text_layer(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """A whole layer without vision."""
        mixed = self.attend(*self.qkv(layer, self.input_norm(layer, x), positions), causal(len(x)))
        x = x + self.linear(mixed, f"decoder.layers.{layer}.self_attention.linear_proj")
        return x + self.mlp(layer, x)


Form = Callable[[Pieces, Sample, Sequence[Tensor]], Tensor]
"""A sample and its images' features, each float[rows * columns, L * V], to its logits, as in `Outcome`."""


def causal(number: int) -> Tensor:
    """bool[n, n]: each sees itself and what is before it."""
    return torch.arange(number)[:, None] >= torch.arange(number)


def outcome(
    config: Config,
    weights: Mapping[str, Tensor],
    samples: Sequence[Sample],
    features: Sequence[Sequence[Tensor]],
    form: Form | None = None,
) -> Outcome:
    """Run samples and go back. `features`: of each sample's images; `form`: None: `general`.

    A weight that nothing reads is an error of the test: AssertionError.
    """
    pieces = Pieces(config, {name: weight.double().detach().requires_grad_() for name, weight in weights.items()})
    given = [[image.double().detach().requires_grad_() for image in own] for own in features]
    logits = [(form or general)(pieces, sample, own) for sample, own in zip(samples, given, strict=True)]
    total, number = torch.zeros((), dtype=torch.float64), 0
    for sample, own in zip(samples, logits, strict=True):
        for scores, label in zip(own, sample.labels, strict=True):
            if label != IGNORED:
                total, number = total + torch.logsumexp(scores, 0) - scores[label], number + 1
    loss = total / number
    loss.backward()  # type: ignore[no-untyped-call]
    leftover = pieces.weights.keys() - pieces.used if any(sample.images for sample in samples) else set()
    assert not leftover, f"never read: {sorted(leftover)}"
    return Outcome(
        logits=tuple(own.detach() for own in logits),
        loss=float(loss.detach()),
        gradients={name: _gradient(weight) for name, weight in pieces.weights.items()},
        of_features=tuple(_gradient(image) for own in given for image in own),
        scales={name: _norm_of_terms(each, pieces.weights[name]) for name, each in pieces.terms.items()},
    )


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _norm_of_terms(each: Sequence[Tensor], gate: Tensor) -> float:
    by_token = torch.cat([_gradient(own) for own in each])
    return float((by_token * (1 - torch.tanh(gate.detach()) ** 2)).norm())


# ---- any combination of choices ----------------------------------------------------------------------------------------


def general(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """Every choice as `injection` says."""
    injection, layers = p.injection, injecting_layers(p.config)
    levels, tokens_of = _vision(p, sample, features)
    if injection.fusion == "tokens":
        return _in_sequence(p, sample, levels[0], tokens_of)
    places = torch.tensor([image.place for image, number in zip(sample.images, tokens_of, strict=True) for _ in range(number)])
    text, num_vision = torch.arange(len(sample.ids)), int(sum(tokens_of))
    before = places[None] <= text[:, None]  # [n, T]: the image is at or before the token
    if injection.visibility == "all":
        visible = torch.ones(len(text), num_vision, dtype=torch.bool)
    elif injection.visibility == "earlier":
        visible = before
    else:
        latest = torch.where(before, places, -1).amax(1, keepdim=True) if num_vision else text[:, None]
        visible = before & (places == latest)
    positions = text + before.sum(1) if injection.position == "rotary" else text
    vision_positions: Tensor | None = None
    if injection.position == "rotary":
        vision_positions = places + torch.arange(num_vision)
    elif injection.position == "rotary_image":
        vision_positions = places
    x = p.embed(sample.ids)
    for layer in range(p.model.num_layers):
        if layer not in layers:
            x = p.text_layer(layer, x, positions)
            continue
        seen = levels[layers.index(layer) * len(levels) // len(layers)]
        if injection.fusion == "block":
            x = _block(p, layer, x, seen, visible, positions, vision_positions)
            x = p.text_layer(layer, x, positions)
            continue
        attention = f"decoder.layers.{layer}.self_attention."
        query, key, value = p.qkv(layer, p.input_norm(layer, x), positions)
        vision_key, vision_value = _keys_values(p, layer, seen, vision_positions)
        if injection.fusion == "joint":
            mixed = p.attend(
                query,
                torch.cat((vision_key, key)),
                torch.cat((vision_value, value)),
                torch.cat((visible, causal(len(text))), 1),
            )
            update = p.linear(mixed, f"{attention}linear_proj")
        else:
            alone = p.attend(query, key, value, causal(len(text)))
            local = _local(sample) if injection.local_text else torch.zeros(len(text), len(text), dtype=torch.bool)
            second = p.attend(
                query, torch.cat((vision_key, key)), torch.cat((vision_value, value)), torch.cat((visible, local), 1)
            )
            second = second * visible.any(1, keepdim=True)
            if injection.gate == "tanh":
                gate = p.gate(f"{attention}vision_gate", len(x))
                update = p.linear(alone + gate * second, f"{attention}linear_proj")
            else:
                update = p.linear(alone, f"{attention}linear_proj") + p.linear(second, f"{attention}linear_vision_proj")
        x = x + update
        x = x + p.mlp(layer, x)
    return p.logits(x)


def _vision(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Of each of L levels float[T, width], after `reduce`, learned positions and a shared adapter; tokens of each image."""
    num_levels, width = len(p.config.vision.feature_layers) or 1, p.config.vision.hidden_size
    by_level: list[list[Tensor]] = [[] for _ in range(num_levels)]
    tokens_of = []
    for number, (image, given) in enumerate(zip(sample.images, features, strict=True)):
        grid = given.view(image.rows, image.columns, num_levels, width)
        reduced = _reduced(grid, p.injection.reduce)
        if p.injection.position == "learned":
            tables = [p.weight(f"vision_input.{name}_positions") for name in ("row", "column", "image")]
            rows, columns, in_order = (table.view(len(table), num_levels, -1) for table in tables)
            reduced = reduced + rows[: reduced.shape[0], None] + columns[None, : reduced.shape[1]]
            reduced = reduced + in_order[min(number, IMAGE_NUMBERS - 1)]
        tokens_of.append(reduced.shape[0] * reduced.shape[1])
        for level, parts in enumerate(by_level):
            parts.append(reduced[:, :, level].flatten(0, 1))
    merged = width * (4 if p.injection.reduce == "merge" else 1)
    nothing = torch.zeros(0, merged, dtype=torch.float64)
    levels = [torch.cat([nothing, *parts]) for parts in by_level]
    if p.injection.adapter == "shared":
        levels = [p.adapter(level, "vision_input.adapter") for level in levels]
    return levels, tokens_of


def _reduced(grid: Tensor, how: str) -> Tensor:
    """float[rows, columns, L, V] to float[ceil(rows/2), ceil(columns/2), L, V or 4V]."""
    if how == "none":
        return grid
    rows, columns = grid.shape[:2]
    lines = []
    for row in range(0, rows, 2):
        line = []
        for column in range(0, columns, 2):
            corners = [(row + i, column + j) for i in (0, 1) for j in (0, 1)]
            found = [grid[r, c] if r < rows and c < columns else None for r, c in corners]
            if how == "merge":
                line.append(torch.cat([torch.zeros_like(grid[0, 0]) if token is None else token for token in found], -1))
            else:
                there = [token for token in found if token is not None]
                line.append(torch.stack(there).sum(0) / len(there))
        lines.append(torch.stack(line))
    return torch.stack(lines)


def _keys_values(p: Pieces, layer: int, seen: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """A layer's vision keys and values, each float[T, G, D]; of a block where there is one."""
    injection, of_layer = p.injection, f"decoder.layers.{layer}."
    own = f"{of_layer}vision_block." if injection.fusion == "block" else f"{of_layer}self_attention."
    if injection.adapter == "per_layer":
        seen = p.adapter(seen, f"{own}vision_adapter")
    if injection.norm == "own":
        seen = p.norm(seen, f"{own}vision_norm.weight")
    elif injection.norm == "input":
        seen = p.input_norm(layer, seen)
    if injection.keys_values == "own":
        key, value = p.vision_kv(f"{own}linear_vision_kv", seen)
    else:
        groups, head = p.model.num_query_groups, p.model.channels_per_head
        together = p.linear(seen, f"{of_layer}self_attention.linear_qkv").view(len(seen), groups, p.heads_of_group + 2, head)
        key, value = together[:, :, -2], together[:, :, -1]
    if injection.fusion == "block":
        key = p.norm(key, f"{own}k_norm.weight")
    elif norms_keys(p.config) and injection.key_norm != "none":
        key = p.norm(key, f"{own}{'vision_key_norm' if injection.key_norm == 'own' else 'k_layernorm'}.weight")
    return key if positions is None else p.rotate(key, positions), value


def _block(
    p: Pieces, layer: int, x: Tensor, seen: Tensor, visible: Tensor, positions: Tensor, vision_positions: Tensor | None
) -> Tensor:
    """x behind a cross-attention block of its own."""
    block = f"decoder.layers.{layer}.vision_block."
    query = p.linear(p.norm(x, f"{block}input_layernorm.weight"), f"{block}linear_q")
    query = p.norm(query.view(len(x), p.model.num_attention_heads, -1), f"{block}q_norm.weight")
    if vision_positions is not None:
        query = p.rotate(query, positions)
    mixed = p.attend(query, *_keys_values(p, layer, seen, vision_positions), visible)
    x = x + p.gate(f"{block}attention_gate", len(x)) * p.linear(mixed, f"{block}linear_proj")
    added = p.swiglu(p.norm(x, f"{block}pre_mlp_layernorm.weight"), f"{block}mlp") * visible.any(1, keepdim=True)
    return x + p.gate(f"{block}mlp_gate", len(x)) * added


def _local(sample: Sample) -> Tensor:
    """bool[n, n]: the text from the place of the latest images, or before any from its beginning, up to each token."""
    number = len(sample.ids)
    seen = torch.zeros(number, number, dtype=torch.bool)
    for token in range(number):
        seen[token, max([image.place for image in sample.images if image.place <= token], default=0) : token + 1] = True
    return seen


def _in_sequence(p: Pieces, sample: Sample, vision: Tensor, tokens_of: Sequence[int]) -> Tensor:
    """Vision tokens stand in the text."""
    text, images, order = p.embed(sample.ids), list(torch.split(vision, list(tokens_of))), []
    for token in range(len(sample.ids) + 1):
        order += [own for own, image in zip(images, sample.images, strict=True) if image.place == token]
        order.append(text[token : token + 1])
    x = torch.cat(order)
    for layer in range(p.model.num_layers):
        x = p.text_layer(layer, x, torch.arange(len(x)))
    return p.logits(x)[predicting_rows(p.config, sample)]


def predicting_rows(config: Config, sample: Sample) -> list[int]:
    """Of each text token the row, in the sequence of its sample, whose logits predict what follows it: its own, or that of the
    last vision token behind it, where vision stands in the sequence."""
    if config.injection.fusion != "tokens":
        return list(range(len(sample.ids)))
    halve = 1 if config.injection.reduce == "none" else 2
    sizes = [(image.place, -(-image.rows // halve) * -(-image.columns // halve)) for image in sample.images]
    return [token + sum(number for place, number in sizes if place <= token + 1) for token in range(len(sample.ids))]


# ---- the published methods, each by its own equations ------------------------------------------------------------------


def himix(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """out = W_o softmax(q [W_vk u ; k]) [W_vv u ; v], u the layer's norm of the features; all images, no positions."""
    x, count = p.embed(sample.ids), torch.arange(len(sample.ids))
    vision = torch.cat([torch.zeros(0, p.config.vision.hidden_size, dtype=torch.float64), *features])
    for layer in range(p.model.num_layers):
        attention = f"decoder.layers.{layer}.self_attention."
        query, key, value = p.qkv(layer, p.input_norm(layer, x), count)
        vision_key, vision_value = p.vision_kv(f"{attention}linear_vision_kv", p.norm(vision, f"{attention}vision_norm.weight"))
        if norms_keys(p.config):
            vision_key = p.norm(vision_key, f"{attention}vision_key_norm.weight")
        x = x + p.linear(
            _joint(p, query, key, value, vision_key, vision_value, [range(len(vision))] * len(x)), f"{attention}linear_proj"
        )
        x = x + p.mlp(layer, x)
    return p.logits(x)


def saisa(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """A decoder over the whole sequence whose vision tokens are made anew for each layer by its MLP, and ask for nothing."""
    return _over_the_sequence(p, sample, features, tuple(range(p.model.num_layers)), None)


def vica(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """The same in some layers only, with one MLP for all; elsewhere text alone, at its places in the sequence."""
    return _over_the_sequence(p, sample, features, p.injection.layers, "vision_input.adapter")


def mplug_owl3(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """One MLP; in some layers own projections of the vision behind the layer's norm, at the image's place in the text; text
    that comes before an image does not see it."""
    x, count = p.embed(sample.ids), torch.arange(len(sample.ids))
    images = [p.adapter(own, "vision_input.adapter") for own in features]
    for layer in range(p.model.num_layers):
        if layer not in p.injection.layers:
            x = p.text_layer(layer, x, count)
            continue
        attention = f"decoder.layers.{layer}.self_attention."
        query, key, value = p.qkv(layer, p.input_norm(layer, x), count)
        keys, values, places = [key[:0]], [value[:0]], []
        for image, own in zip(sample.images, images, strict=True):
            own_key, own_value = p.vision_kv(f"{attention}linear_vision_kv", p.input_norm(layer, own))
            if norms_keys(p.config):
                own_key = p.norm(own_key, f"{attention}vision_key_norm.weight")
            keys.append(p.rotate(own_key, torch.full((len(own),), image.place)))
            values.append(own_value)
            places += [image.place] * len(own)
        seen = [[j for j, place in enumerate(places) if place <= token] for token in range(len(x))]
        x = x + p.linear(_joint(p, query, key, value, torch.cat(keys), torch.cat(values), seen), f"{attention}linear_proj")
        x = x + p.mlp(layer, x)
    return p.logits(x)


def latest_window(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """Self-attention, and beside it, in each window that begins with images and ends before the next, causal attention over the
    images and the text of the window; both with an output projection of its own."""
    text, vision = _sequence(sample)
    x = p.embed(sample.ids)
    images = torch.cat([x[:0], *(p.adapter(own, "vision_input.adapter") for own in features)])
    places = sorted({image.place for image in sample.images})
    for layer in range(p.model.num_layers):
        attention = f"decoder.layers.{layer}.self_attention."
        query, key, value = p.qkv(layer, p.input_norm(layer, x), text)
        _, image_key, image_value = p.qkv(layer, p.input_norm(layer, images), vision)
        windows = [torch.zeros(places[0] if places else len(x), query[0].numel(), dtype=torch.float64)]
        for place, end in zip(places, [*places, len(x)][1:], strict=True):
            own = [
                j for image, tokens in zip(sample.images, _tokens(sample), strict=True) if image.place == place for j in tokens
            ]
            keys = torch.cat((image_key[own], key[place:end]))
            seen = torch.cat((torch.ones(end - place, len(own), dtype=torch.bool), causal(end - place)), 1)
            windows.append(p.attend(query[place:end], keys, torch.cat((image_value[own], value[place:end])), seen))
        alone = p.attend(query, key, value, causal(len(x)))
        x = x + p.linear(alone, f"{attention}linear_proj") + p.linear(torch.cat(windows), f"{attention}linear_vision_proj")
        x = x + p.mlp(layer, x)
    return p.logits(x)


def llama3_2_vision(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """Before some layers cross-attention to the latest image and an MLP, both behind tanh gates; without positions."""
    x, count = p.embed(sample.ids), torch.arange(len(sample.ids))
    images = torch.cat([torch.zeros(0, p.config.vision.hidden_size, dtype=torch.float64), *features])
    heads, head = p.model.num_attention_heads, p.model.channels_per_head
    seen = torch.zeros(len(x), len(images), dtype=torch.bool)
    for token in range(len(x)):
        earlier = [image.place for image in sample.images if image.place <= token]
        for image, tokens in zip(sample.images, _tokens(sample), strict=True):
            if earlier and image.place == max(earlier):
                seen[token, list(tokens)] = True
    for layer in range(p.model.num_layers):
        if (layer + 1) % p.injection.every_layers == 0:
            block = f"decoder.layers.{layer}.vision_block."
            query = p.linear(p.norm(x, f"{block}input_layernorm.weight"), f"{block}linear_q").view(len(x), heads, head)
            key, value = p.vision_kv(f"{block}linear_vision_kv", images)
            query, key = p.norm(query, f"{block}q_norm.weight"), p.norm(key, f"{block}k_norm.weight")
            mixed = p.linear(p.attend(query, key, value, seen), f"{block}linear_proj")
            x = x + p.gate(f"{block}attention_gate", len(x)) * mixed
            update = p.swiglu(p.norm(x, f"{block}pre_mlp_layernorm.weight"), f"{block}mlp")
            x = x + p.gate(f"{block}mlp_gate", len(x)) * torch.where(seen.any(1)[:, None], update, 0)
        x = p.text_layer(layer, x, count)
    return p.logits(x)


def tokens(p: Pieces, sample: Sample, features: Sequence[Tensor]) -> Tensor:
    """A causal decoder over the whole sequence."""
    text, vision = _sequence(sample)
    x = torch.zeros(len(text) + len(vision), p.model.hidden_size, dtype=torch.float64).index_copy(0, text, p.embed(sample.ids))
    for own, of_image in zip(features, _tokens(sample), strict=True):
        x = x.index_copy(0, vision[list(of_image)], p.adapter(own, "vision_input.adapter"))
    for layer in range(p.model.num_layers):
        x = p.text_layer(layer, x, torch.arange(len(x)))
    return p.logits(x)[torch.cat((text[1:], torch.tensor([len(x)]))) - 1]


PRESETS: dict[str, Form] = {
    form.__name__: form for form in (himix, saisa, vica, mplug_owl3, latest_window, llama3_2_vision, tokens)
}
"""By the names of `himix_megatron.config.METHODS`."""


def _joint(
    p: Pieces,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    vision_key: Tensor,
    vision_value: Tensor,
    visible: Sequence[Sequence[int]],
) -> Tensor:
    """One softmax over the vision tokens that each text token sees, by number, and the text up to itself."""
    seen = torch.tensor([[j in own for j in range(len(vision_key))] for own in visible], dtype=torch.bool)
    keys, values = torch.cat((vision_key, key)), torch.cat((vision_value, value))
    return p.attend(query, keys, values, torch.cat((seen.view(len(query), -1), causal(len(query))), 1))


def _over_the_sequence(
    p: Pieces, sample: Sample, features: Sequence[Tensor], layers: Sequence[int], adapter: str | None
) -> Tensor:
    """In `layers` text attends to all that is before it in the sequence of text and vision, by the text's own projections.
    `adapter`: None: each layer has its own."""
    text, vision = _sequence(sample)
    x = p.embed(sample.ids)
    for layer in range(p.model.num_layers):
        if layer not in layers:
            x = p.text_layer(layer, x, text)
            continue
        own = adapter or f"decoder.layers.{layer}.self_attention.vision_adapter"
        images = torch.cat([x[:0], *(p.adapter(image, own) for image in features)])
        together = torch.cat((x, images))
        positions = torch.cat((text, vision))
        query, key, value = p.qkv(layer, p.input_norm(layer, together), positions)
        mixed = p.attend(query[: len(x)], key, value, text[:, None] >= positions)
        x = x + p.linear(mixed, f"decoder.layers.{layer}.self_attention.linear_proj")
        x = x + p.mlp(layer, x)
    return p.logits(x)


def _tokens(sample: Sample) -> list[range]:
    """The numbers of each image's vision tokens among those of the sample."""
    found, first = [], 0
    for image in sample.images:
        found.append(range(first, first + image.rows * image.columns))
        first = found[-1].stop
    return found


def _sequence(sample: Sample) -> tuple[Tensor, Tensor]:
    """Where each text token, and each vision token, stands in the sequence of both."""
    order = sorted(
        [(token, 1, token) for token in range(len(sample.ids))]
        + [(image.place, 0, j) for image, own in zip(sample.images, _tokens(sample), strict=True) for j in own]
    )
    kinds = [[number for number, (_, kind, _) in enumerate(order) if kind == wanted] for wanted in (1, 0)]
    return torch.tensor(kinds[0]), torch.tensor(kinds[1], dtype=torch.long)
