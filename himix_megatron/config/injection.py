"""How vision enters the decoder: a few choices that can be combined, and the published methods as points among them.

Pure data, without torch, because settings are checked against it and costs are counted from it. HiMix is the default.
Outside `model/` and `costs/`, code asks for properties (`in_sequence`, `injecting_layers`), never for a method's name.
docs/methods.md has the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..runtime.limits import Count, CountOrZero, check_limits
from .model import ModelConfig, VisionConfig

IMAGE_NUMBERS = 64
"""Images of a sample that a table of positions tells apart; later ones share the last row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InjectionConfig:
    """How vision enters the decoder (docs/methods.md). `--method` fills the section with a published method's choices."""

    fusion: Literal["joint", "separate", "block", "tokens"] = "joint"
    """Way in which text takes up vision. joint: one softmax over vision and text keys; separate: a second softmax in the same
    layer, whose outcome is gated; block: a cross-attention block of its own, with MLP and gates, before the layer; tokens:
    vision tokens stand in the text's sequence, and no layer injects."""
    layers: tuple[CountOrZero, ...] = ()
    """Decoder layers that inject, counted from 0; empty: as every_layers says."""
    every_layers: Count = 1
    """With n, the layers n-1, 2n-1, 3n-1 ... inject; 1: all."""
    adapter: Literal["none", "shared", "per_layer"] = "none"
    """MLP (two linear layers with GELU) from the features to the text's width. shared: one for all layers; per_layer: one in
    each injecting layer."""
    keys_values: Literal["own", "text"] = "own"
    """Projections that make keys and values of vision. own: the layer's vision K/V projections; text: the layer's own for text,
    which take vision of the text's width."""
    norm: Literal["own", "input", "none"] = "own"
    """RMSNorm of vision before these projections. own: with a weight of its own in each layer; input: with the weight of the
    layer's input norm; none: no norm."""
    key_norm: Literal["own", "shared", "none"] = "own"
    """Norm of vision keys in a family that norms keys. own: with a weight of its own in each layer; shared: with the weight for
    text keys; none: no norm. Other families have none."""
    position: Literal["none", "learned", "rotary", "rotary_image"] = "none"
    """Position of vision. learned: tables for row, column and the image's number, added to the features before everything else;
    rotary: rotary angles as if the vision tokens stood in the text where the image is, text positions shifted likewise;
    rotary_image: all tokens of an image get the angle of the text position where it is."""
    visibility: Literal["all", "earlier", "latest"] = "all"
    """Images of its sample that a text token sees. earlier: those that stand before it in the text; latest: the last of these,
    with its neighbours that no text divides from it."""
    gate: Literal["none", "tanh", "zero"] = "none"
    """Gate of what separate and block add. tanh: times the tanh of a learned number that starts at 0; zero (separate only): an
    output projection of its own that starts at 0."""
    local_text: bool = False
    """Whether a separate softmax also sees the sample's text since the latest image; before the first image, all of it."""
    reduce: Literal["none", "merge", "pool"] = "none"
    """Reduction of each 2x2 neighbouring vision tokens to one. merge: side by side, four times as wide; pool: their mean. At an
    odd edge merge fills up with zeros, and pool takes those that there are."""

    def __post_init__(self) -> None:
        check_limits(self, "injection")
        if len(set(self.layers)) != len(self.layers) or list(self.layers) != sorted(self.layers):
            raise ValueError(f"injection.layers is {' '.join(map(str, self.layers))}: wanted rising numbers")
        if self.layers and self.every_layers != 1:
            raise ValueError("injection.layers and injection.every_layers are both given: choose one")
        for subject, holds, field_name, allowed in _CONTRADICTIONS:
            if holds(self) and (found := getattr(self, field_name)) not in allowed:
                flag = f"--injection.{field_name.replace('_', '-')}"
                wanted = f"{flag} {' or '.join(map(str, allowed))}"
                if isinstance(found, (tuple, bool)):
                    found = " ".join(map(str, found)) if isinstance(found, tuple) else "on"
                    wanted = f"no {flag}"
                raise ValueError(f"injection.{field_name} is {found}, but {subject}: use {wanted}")

    @property
    def in_sequence(self) -> bool:
        """Whether vision tokens stand in the text's sequence."""
        return self.fusion == "tokens"

    @property
    def needs_places(self) -> bool:
        """Whether it matters where in the text an image stands."""
        return self.visibility != "all" or self.position in ("rotary", "rotary_image") or self.local_text

    @property
    def has_shared_parameters(self) -> bool:
        """Whether something in front of all layers has parameters: every chunk that takes vision has a replica of them."""
        return self.adapter == "shared" or self.position == "learned"

    def injecting_layers(self, num_layers: int) -> tuple[int, ...]:
        """The decoder layers that inject, from 0; none where vision stands in the sequence."""
        if self.in_sequence:
            return ()
        return self.layers or tuple(range(self.every_layers - 1, num_layers, self.every_layers))

    def level(self, layer: int, num_layers: int, num_levels: int) -> int:
        """Which of the tower's hidden states (`vision.feature_layers`) an injecting layer takes: they are dealt out evenly."""
        layers = self.injecting_layers(num_layers)
        return layers.index(layer) * num_levels // len(layers)

    def reduced_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of an image's vision tokens after `reduce`."""
        return (rows, columns) if self.reduce == "none" else (-(-rows // 2), -(-columns // 2))

    def position_tables(self, vision: VisionConfig) -> dict[str, int]:
        """Rows of each table of learned positions: for an image's rows, its columns, and its number in the sample."""
        side = vision.image_size // vision.patch_size
        longest, _ = self.reduced_grid(side if vision.has_fixed_size else side**2, 1)
        return {"row": longest, "column": longest, "image": IMAGE_NUMBERS}

    def feature_width(self, vision: VisionConfig) -> int:
        """Channels of one of the tower's hidden states after `reduce`."""
        return vision.hidden_size * (4 if self.reduce == "merge" else 1)

    def vision_width(self, model: ModelConfig, vision: VisionConfig) -> int:
        """Channels of what the vision norm and the K/V projections take."""
        return self.feature_width(vision) if self.adapter == "none" else model.hidden_size

    def check(self, model: ModelConfig, vision: VisionConfig) -> None:
        """Raises: ValueError for choices that the sizes do not allow."""
        if self.layers and self.layers[-1] >= model.num_layers:
            raise ValueError(
                f"injection.layers names layer {self.layers[-1]}, but model.num_layers is {model.num_layers}, and they count "
                "from 0"
            )
        if not self.in_sequence and not (number := len(self.injecting_layers(model.num_layers))):
            raise ValueError(
                f"injection.every_layers is {self.every_layers}, above model.num_layers ({model.num_layers}): no layer would "
                "inject"
            )
        if not self.in_sequence and len(vision.feature_layers) > number:
            raise ValueError(
                f"vision.feature_layers names {len(vision.feature_layers)} hidden states for {number} injecting layers: name "
                "fewer, or let more layers inject"
            )
        if self.in_sequence and len(vision.feature_layers) > 1:
            raise ValueError("injection.fusion is tokens, which takes one hidden state of the tower: name one as "
                             "--vision.feature-layer")  # fmt: skip
        width = self.vision_width(model, vision)
        for field_name, value in (("keys_values", "text"), ("norm", "input"), ("fusion", "tokens")):
            if getattr(self, field_name) == value and width != model.hidden_size:
                raise ValueError(
                    f"injection.{field_name} is {value}, which takes vision of the text's width ({model.hidden_size}), but the "
                    f"features have {width} channels: use --injection.adapter shared or per_layer"
                )


_Check = tuple[str, Callable[[InjectionConfig], bool], str, tuple[object, ...]]
_CONTRADICTIONS: tuple[_Check, ...] = (
    *(
        ("injection.fusion is tokens, where vision is read as text is", lambda i: i.fusion == "tokens", name, allowed)
        for name, allowed in {
            "layers": ((),), "every_layers": (1,), "adapter": ("none", "shared"), "keys_values": ("text",), "norm": ("input",),
            "key_norm": ("shared",), "position": ("rotary",), "visibility": ("earlier",),
        }.items()
    ),
    ("injection.fusion adds nothing that could have a gate", lambda i: i.fusion in ("joint", "tokens"), "gate", ("none",)),
    ("injection.fusion is separate, which would disturb the text unless gated", lambda i: i.fusion == "separate", "gate",
     ("tanh", "zero")),
    ("a block of its own has gates that start at 0", lambda i: i.fusion == "block", "gate", ("tanh",)),
    ("the queries of a block are its own, and so are its keys", lambda i: i.fusion == "block", "keys_values", ("own",)),
    ("a block's vision is not normed by the layer behind it", lambda i: i.fusion == "block", "norm", ("own", "none")),
    ("a block always norms its queries and keys by itself", lambda i: i.fusion == "block", "key_norm", ("own",)),
    ("only a separate softmax can see text that another sees too", lambda i: i.fusion != "separate", "local_text", (False,)),
)  # fmt: skip
"""Choices that exclude each other: because of what, when, which field, and the values that it may have."""


HIMIX = InjectionConfig()
"""What this project is about, and every default."""


# ---- the published methods ---------------------------------------------------------------------------------------------


def himix(model: ModelConfig) -> InjectionConfig:
    """HiMix, arXiv 2501.10318, equations 4 to 7: a norm and K/V projections of its own in every layer, one softmax.

    Exact against the authors' code. Claim: 9 to 12 % of the decoder's FLOPs; TextVQA -0.9 to -5.5 over five models.
    """
    return HIMIX


def saisa(model: ModelConfig) -> InjectionConfig:
    """SAISA, arXiv 2502.02458: an MLP per layer into that layer's own input space, then the text's norm and K/V projections, at
    the positions that the image has in the text.

    Exact against the authors' code for one image a text; theirs takes several only side by side, and at one place of all texts
    of a batch. Initial values of the MLPs are not published. Claim: inference FLOPs -66 %, training budget -26 %, accuracy
    above LLaVA-1.5's.
    """
    return InjectionConfig(adapter="per_layer", keys_values="text", norm="input", key_norm="shared", position="rotary",
                           visibility="earlier")  # fmt: skip


def vica(model: ModelConfig) -> InjectionConfig:
    """ViCA, arXiv 2602.07574: LLaVA's one MLP; the text's own norm and K/V projections in a quarter of the layers.

    The published layers of a model of 32 are 0, 1, 7 to 11 and 14; another depth takes a quarter of its layers at their places.
    Exact against the authors' code for one image a sample, but at a width of 4,096, where theirs gives text before the image
    nothing from attention. Claim: 98 % of the accuracy at 4 % of the visual compute.
    """
    layers = _spread((0, 1, 7, 8, 9, 10, 11, 14), 32, model.num_layers)
    return InjectionConfig(layers=layers, adapter="shared", keys_values="text", norm="input", key_norm="shared",
                           position="rotary", visibility="earlier")  # fmt: skip


def mplug_owl3(model: ModelConfig) -> InjectionConfig:
    """mPLUG-Owl3, arXiv 2408.04840, as of its checkpoints of 241101: K/V projections of their own in 4 of 28 layers, behind one
    MLP and the layer's input norm; one softmax; each image at one rotary position, that of its place.

    Exact against PaddlePaddle's port of the authors' code, but for two things: there a token of the text stands for each image,
    and the K/V projections always have a bias. Claim: 6 times faster, image sequences 8 times longer.
    """
    layers = _spread((6, 14, 22, 25), 28, model.num_layers)
    return InjectionConfig(layers=layers, adapter="shared", norm="input", position="rotary_image", visibility="earlier")


def latest_window(model: ModelConfig) -> InjectionConfig:
    """Beside self-attention a second softmax over the latest image and the text since it, with an output projection of its own.

    The first version of CASA (arXiv 2512.19535v1) resembles it, but its code is not public: there the window has queries, keys
    and values of its own, and text before the first image has a window too; its second version sees no text in it. CASA's
    claim: near-constant memory in streaming; DocVQA 83.7 against 89.1 for insertion, GQA 54.6 against 55.5.
    """
    return InjectionConfig(fusion="separate", gate="zero", local_text=True, adapter="shared", keys_values="text", norm="input",
                           key_norm="shared", position="rotary", visibility="latest")  # fmt: skip


def llama3_2_vision(model: ModelConfig) -> InjectionConfig:
    """Llama-3.2-Vision (Flamingo and NVLM-X resemble it): before every fourth layer a block with queries, K/V, output and MLP
    of its own, and tanh gates that start at 0.

    Exact against transformers' Mllama text model where the first token sees an image. Text before the first image attends to
    all images there, and only its MLP is 0 (in Meta's own code both are, as here). Further differences: there the features go
    through one linear layer first, and a token of the text stands for each image, of which one does not yet see the image of a
    neighbour behind it. Claim of its kind: cheap with many tiles, weaker than insertion on text in images.
    """
    return InjectionConfig(fusion="block", gate="tanh", every_layers=min(4, model.num_layers), norm="none", visibility="latest")


def tokens(model: ModelConfig) -> InjectionConfig:
    """LLaVA, arXiv 2304.08485: an MLP makes tokens of the features, which stand in the text where the image does.

    The baseline of all others. Exact against transformers' Llava, from pixels to gradients.
    """
    return InjectionConfig(fusion="tokens", adapter="shared", keys_values="text", norm="input", key_norm="shared",
                           position="rotary", visibility="earlier")  # fmt: skip


METHODS: dict[str, Callable[[ModelConfig], InjectionConfig]] = {
    method.__name__: method for method in (himix, saisa, vica, mplug_owl3, latest_window, llama3_2_vision, tokens)
}
"""Published methods by name, for a model's sizes."""


def _spread(published: tuple[int, ...], of_layers: int, num_layers: int) -> tuple[int, ...]:
    """Layers of a published model of `of_layers`, at the same share and depth of another."""
    number = max(1, len(published) * num_layers // of_layers)
    chosen = (published[min((2 * i + 1) * len(published) // (2 * number), len(published) - 1)] for i in range(number))
    return tuple(sorted({layer * num_layers // of_layers for layer in chosen}))
