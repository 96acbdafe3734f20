"""What is trained: the language decoder and the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..runtime.limits import Count, Positive, check_known, check_limits
from .families import FAMILIES
from .towers import TOWERS


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language decoder."""

    family: str
    """Language family: llama, or qwen2 (biases on q, k and v, those of the vision included)."""
    num_layers: Count
    """Number of decoder layers."""
    hidden_size: Count
    """Width of the text's hidden states."""
    ffn_hidden_size: Count
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: Count
    """Number of query heads."""
    num_query_groups: Count
    """Number of key/value heads (grouped-query attention); equal to the query heads for plain multi-head attention."""
    head_dim: Count | None = None
    """Width of one attention head; None: hidden_size / num_attention_heads."""
    vocab_size: Count
    """Rows of the embedding as published; they are padded internally so that they divide over tensor ranks."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling_factor: Positive | None = None
    """Factor of Llama 3's frequency scaling (low 1, high 4, original context 8192); None: no scaling."""
    norm_eps: Positive = 1e-5
    """Epsilon of every RMSNorm, the vision norms included."""
    tie_embeddings: bool = False
    """Whether the output head shares the input embedding's weight."""
    init_std: Positive = 0.02
    """Standard deviation of freshly initialised matrices."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """Modules that decoder layers are built from. te: Transformer Engine's; torch: megatron-core's own with torch's operations;
    auto: te where Transformer Engine is installed and a GPU is present."""
    attention_core: Literal["auto", "te", "flash", "triton"] = "auto"
    """Attention kernels for training on a GPU in 16 bits. te: Transformer Engine's (cuDNN); flash: torch's flash attention;
    triton: this project's, which read the vision features in place; auto: the fastest measured for the head's width
    (docs/results.md)."""
    text_only_vision: Literal["zero_image", "none"] = "none"
    """Vision input of a sample without images. zero_image: the features of an all-zero image, as in the authors' code; none: no
    vision tokens."""

    @property
    def images_without(self) -> int:
        """Images that a sample without an image counts for: 1, the all-zero image, or 0."""
        return int(self.text_only_vision == "zero_image")

    def __post_init__(self) -> None:
        check_known("model.family", self.family, FAMILIES)
        check_limits(self, "model")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) does not divide into model.num_attention_heads "
                f"({self.num_attention_heads}): change one, or give model.head_dim"
            )
        if self.channels_per_head % 2:
            raise ValueError(f"model.head_dim is {self.channels_per_head}: wanted an even number, rotary embedding turns pairs")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"model.num_query_groups ({self.num_query_groups})"
            )

    @property
    def channels_per_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v (text and vision) carry biases."""
        return FAMILIES[self.family].qkv_bias


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and its input pixels."""

    tower: str
    """Architecture of the tower. siglip and clip: from transformers; tiny: a small ViT that can be trained from scratch;
    tiny_native: the same for images in their own aspect."""
    path: str | None = None
    """Folder with the tower's config.json and safetensors; None: random weights (tests, quickstart)."""
    image_size: Count
    """Side of a preprocessed image, in pixels; where images keep their aspect, of the largest square one."""
    patch_size: Count
    """Side of one patch, in pixels."""
    hidden_size: Count
    """Width of the tower's features (V)."""
    num_layers: Count
    """Number of transformer layers in the tower."""
    num_attention_heads: Count
    """Number of attention heads in the tower."""
    ffn_hidden_size: Count
    """Inner width of the tower's MLP."""
    feature_layer: int = -2
    """Hidden state that the features are taken from: -1 is the last layer's output, -2 the second to last. Patch tokens
    only."""
    feature_layers: tuple[int, ...] = ()
    """Hidden states, as in feature_layer, that are taken in its place; the decoder's injecting layers get them in this order,
    evenly. Empty: feature_layer for all."""
    resize: Literal["square", "crop"] = "square"
    """Way of resizing to a fixed size. square: both sides to image_size; crop: the shorter side to image_size, then the centre
    (as in CLIP)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize; both are antialiased."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean that is subtracted from each channel, on the 0..1 scale."""
    pixel_std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Standard deviation that each channel is divided by, on the 0..1 scale."""
    encoder_placement: Literal["replica_sharded", "replicated", "first_stage"] = "replica_sharded"
    """Ranks that encode a step's images with a frozen tower. replica_sharded: the images are split over all tensor x pipeline
    ranks of a replica; replicated: each rank encodes all; first_stage: they are split over the ranks of pipeline stage 0. (A
    tower that trains runs on every rank; this setting then decides who reads the images.)"""
    prefetch_features: bool = True
    """Whether the next step's images are encoded while this step trains. Results do not depend on it."""

    def __post_init__(self) -> None:
        check_known("vision.tower", self.tower, TOWERS)
        check_limits(self, "vision")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision.hidden_size ({self.hidden_size}) does not divide into vision.num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"vision.image_size ({self.image_size}) is below vision.patch_size ({self.patch_size})")
        if TOWERS[self.tower].whole_patches and self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size ({self.image_size}) is not a multiple of vision.patch_size ({self.patch_size})"
            )
        if self.resize == "crop" and not self.has_fixed_size:
            raise ValueError(
                f"vision.resize is crop, but the {self.tower} tower takes whole images in their own aspect: use square"
            )
        for name, layers in (("feature_layer", (self.feature_layer,)), ("feature_layers", self.feature_layers)):
            if wrong := [layer for layer in layers if not -self.num_layers <= layer <= -1]:
                raise ValueError(f"vision.{name} is {wrong[0]}: wanted -{self.num_layers} to -1")
        if len(set(self.feature_layers)) != len(self.feature_layers):
            raise ValueError(f"vision.feature_layers is {' '.join(map(str, self.feature_layers))}: name each once")

    @property
    def levels(self) -> tuple[int, ...]:
        """The hidden states that the features are taken from."""
        return self.feature_layers or (self.feature_layer,)

    @property
    def feature_width(self) -> int:
        """Channels of a vision token as the tower gives it: those of all hidden states that are taken, one after the other."""
        return self.hidden_size * len(self.levels)

    @property
    def has_fixed_size(self) -> bool:
        """Whether the tower gets a square of image_size of every image, so that all have the same number of tokens."""
        return TOWERS[self.tower].input_size is None

    def input_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels that the tower gets of an image of this size."""
        rule = TOWERS[self.tower].input_size
        return (self.image_size, self.image_size) if rule is None else rule(width, height, self.image_size, self.patch_size)

    @property
    def blank_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the all-zero image that stands for "no image"."""
        return self.input_size(self.image_size, self.image_size)

    def num_patches(self, size: tuple[int, int]) -> int:
        """Patches of an image that the tower gets in this (width, height): what its layers see."""
        return (size[0] // self.patch_size) * (size[1] // self.patch_size)

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Vision tokens of an image that the tower gets in this (width, height)."""
        return TOWERS[self.tower].tokens_per_image(size[1] // self.patch_size, size[0] // self.patch_size)

    @property
    def max_patches_per_image(self) -> int:
        """Patches of the largest image; where the size is fixed, of each."""
        return self.num_patches((self.image_size, self.image_size))

    @property
    def max_tokens_per_image(self) -> int:
        """Vision tokens of the largest image; where the size is fixed, of each."""
        return self.num_tokens((self.image_size, self.image_size))
