"""What is trained: the language decoder and the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import known, positive
from .families import FAMILIES
from .towers import TOWERS


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language decoder, and how it takes vision in."""

    family: str
    """Language family: `llama`, or `qwen2` (biases on q, k and v, those of the vision included)."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the text's hidden states."""
    ffn_hidden_size: int
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads (grouped-query attention); equal to the query heads for plain multi-head attention."""
    head_dim: int | None = None
    """Width of one head; None means hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding as published; it is padded internally so that it divides over tensor ranks."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling_factor: float | None = None
    """Llama 3's frequency scaling (low 1, high 4, original context 8192); None: unscaled."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm, the vision norms included."""
    tie_embeddings: bool = False
    """Whether the output head is the input embedding."""
    init_std: float = 0.02
    """Standard deviation of freshly initialised matrices."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """What decoder layers are made of: Transformer Engine's modules, megatron-core's own with torch's operations, or te where
    Transformer Engine is installed and a GPU is present."""
    attention_core: Literal["auto", "te", "flash", "triton"] = "auto"
    """Kernels of the attention itself, in training on a GPU in 16 bits: Transformer Engine's (cuDNN), torch's flash attention,
    or this project's in Triton, which read the vision where it lies; auto: the one that was measured to be fastest for the
    head's width (docs/results.md)."""
    text_only_vision: Literal["zero_image", "none"] = "none"
    """A sample without an image attends to the features of an all-zero image (as the authors' code does), or to none."""

    @property
    def images_without(self) -> int:
        """Images that a sample without an image counts for: 1, the all-zero image, or 0."""
        return int(self.text_only_vision == "zero_image")

    def __post_init__(self) -> None:
        known("model.family", self.family, FAMILIES)
        positive(
            model__num_layers=self.num_layers,
            model__hidden_size=self.hidden_size,
            model__ffn_hidden_size=self.ffn_hidden_size,
            model__num_attention_heads=self.num_attention_heads,
            model__num_query_groups=self.num_query_groups,
            model__vocab_size=self.vocab_size,
            model__head_dim=1 if self.head_dim is None else self.head_dim,
            model__rope_theta=self.rope_theta,
            model__rope_scaling_factor=1.0 if self.rope_scaling_factor is None else self.rope_scaling_factor,
            model__norm_eps=self.norm_eps,
            model__init_std=self.init_std,
        )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) does not divide into model.num_attention_heads "
                f"({self.num_attention_heads}): change one, or give model.head_dim"
            )
        if self.channels_per_head % 2:
            raise ValueError(
                f"model.head_dim is {self.channels_per_head}: rotary position embedding turns pairs, so it must be even"
            )
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
    """The vision tower and the pixels it wants."""

    tower: str
    """`siglip` and `clip` come from transformers; `tiny` is a small ViT of our own that can be trained from nothing."""
    path: str | None = None
    """Folder with the tower's config.json and safetensors; None: random weights (tests, quickstart)."""
    image_size: int
    """Pixels on a side after preprocessing."""
    patch_size: int
    """Pixels on a side of one patch."""
    hidden_size: int
    """Width of the features (Vh)."""
    num_layers: int
    """Transformer layers in the tower."""
    num_attention_heads: int
    """Attention heads in the tower."""
    ffn_hidden_size: int
    """Inner width of the tower's MLP."""
    feature_layer: int = -2
    """Which hidden state is taken: -1 is the last layer's output, -2 the second to last. Patch tokens only."""
    resize: Literal["square", "crop"] = "square"
    """`square` scales both sides to image_size; `crop` scales the shorter one and crops the centre (CLIP's own way)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize; both are antialiased."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, on the 0..1 scale."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, on the 0..1 scale."""
    encoder_placement: Literal["replica_sharded", "replicated", "first_stage"] = "replica_sharded"
    """Where a frozen tower encodes a step's images: split over all tensor x pipeline ranks of a replica; all of them on each;
    or split over the ranks of pipeline stage 0. (A tower that trains runs on each rank; who reads the images goes by this.)"""
    prefetch_features: bool = True
    """Encode the next step's images while this step trains. Changes no result."""

    def __post_init__(self) -> None:
        known("vision.tower", self.tower, TOWERS)
        positive(vision__image_size=self.image_size, vision__patch_size=self.patch_size, vision__hidden_size=self.hidden_size)
        positive(
            vision__num_layers=self.num_layers,
            vision__num_attention_heads=self.num_attention_heads,
            vision__ffn_hidden_size=self.ffn_hidden_size,
            vision__pixel_std=min(self.pixel_std),
        )
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
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(f"vision.feature_layer is {self.feature_layer}: wanted -{self.num_layers} to -1")

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of one image (n)."""
        return TOWERS[self.tower].tokens_per_image(self.image_size // self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches of one image, which the tower's layers see."""
        return (self.image_size // self.patch_size) ** 2
