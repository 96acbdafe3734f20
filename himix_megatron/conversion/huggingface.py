"""Hugging Face's language models and vision towers (config/families.py, config/towers.py), as folders, in our terms.

Flows in: `config.json` and safetensors; out: ModelConfig, VisionConfig, and the checked tensors under the authors' names,
which are Hugging Face's. What our model would compute otherwise than the folder's own is refused, by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Config, ModelConfig, VisionConfig
from ..config.families import FAMILIES
from ..config.towers import TOWERS
from ..model.towers.base import SIZES
from ..runtime import typed_json
from .authors_layout import is_new, shapes
from .safetensors_io import DTYPES, MappedTensors, NamedTensors, open_folder, read_json

VisionInit = Literal["random", "from-text"]
LANGUAGE_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our name of a language model's size or setting -> Hugging Face's."""
_ROTARY_BUFFER = ".rotary_emb.inv_freq"
"""Older folders store the rotary frequencies, which follow from the configuration."""
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""megatron-core's own constants: only the factor can be given."""


# ---- the language model --------------------------------------------------------------------------------------------


def read_language(folder: Path) -> ModelConfig:
    """The sizes of a language model's folder. Raises: ValueError naming what our model would compute otherwise."""
    return language_config(_plain_settings(folder, tuple(FAMILIES)), folder / "config.json")


def language_config(stored: Mapping[str, Any], where: Path) -> ModelConfig:
    """A model from Hugging Face's settings. `where`: named in errors. Raises: ValueError."""
    import transformers

    kind: str = stored["model_type"]
    settings = _settings(getattr(transformers, FAMILIES[kind].transformers_config), stored, where)
    _refuse_other_mathematics(settings, where)
    head_dim = getattr(settings, "head_dim", None)
    even = settings.hidden_size // settings.num_attention_heads
    return ModelConfig(
        family=kind,
        **{ours: getattr(settings, theirs) for ours, theirs in LANGUAGE_SIZES.items()},
        head_dim=None if head_dim in (None, even) else head_dim,
        rope_theta=float(settings.rope_parameters["rope_theta"]),
        rope_scaling_factor=_rope_scaling(settings, where),
        init_std=settings.initializer_range,
    )


def language_settings(model: ModelConfig) -> dict[str, Any]:
    """The sizes of a model by Hugging Face's names; the position embedding is `rope_scaling`'s."""
    sizes = {theirs: getattr(model, ours) for ours, theirs in LANGUAGE_SIZES.items()}
    return sizes | {"head_dim": model.channels_per_head, "hidden_act": "silu", "initializer_range": model.init_std}


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """How a model scales its rotary frequencies, by Hugging Face's names; None: not at all."""
    if model.rope_scaling_factor is None:
        return None
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3_ROPE}


def _settings(config_class: Any, stored: Mapping[str, Any], where: Path) -> Any:
    """Stored settings through transformers, which knows the defaults of what a config.json leaves out."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(dict(stored))
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: transformers cannot read it ({' '.join(str(error).split())[:200]})") from None


def _refuse_other_mathematics(settings: Any, where: Path) -> None:
    usual: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    for name, wanted in (usual | {"quantization_config": None}).items():
        if (found := getattr(settings, name, wanted)) != wanted:
            raise ValueError(f"{where}: {name} is {found}, which our model does not compute")


def _rope_scaling(settings: Any, where: Path) -> float | None:
    rope = settings.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{where}: rope_type is {kind}: only unscaled rotary embeddings and Llama 3's scaling can be converted"
        )
    for name, wanted in _LLAMA3_ROPE.items():
        if rope.get(name) != wanted:
            raise ValueError(f"{where}: rope {name} is {rope.get(name)}: megatron-core's Llama 3 scaling has {wanted:g} fixed")
    return float(rope["factor"])


def _plain_settings(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """`config.json` of a model without code of its own."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    file = folder / "config.json"
    stored = read_json(file)
    check_settings(stored, kinds, open_folder(folder), file)
    return stored


def check_settings(settings: Mapping[str, Any], kinds: tuple[str, ...], tensors: Collection[str], where: Path) -> None:
    """Raises: ValueError for code of its own, for another kind of model, and for more layers than tensors, before anything is
    made for each of them."""
    if "auto_map" in settings:
        raise ValueError(
            f"{where} names code of its own (auto_map), which is not run: only {' and '.join(kinds)} without it are converted"
        )
    if settings.get("model_type") not in kinds:
        raise ValueError(f"{where}: model_type is {settings.get('model_type')}, wanted {' or '.join(kinds)}")
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for name in ("num_hidden_layers", "num_layers"):
            if isinstance(layers := part.get(name), int) and layers > len(tensors):
                raise ValueError(f"{where}: {name} is {layers}, but the weights are {len(tensors)} tensors")


def language_weights(folder: Path, model: ModelConfig) -> MappedTensors:
    """A language model's tensors, mapped and checked against its sizes.

    Raises: ValueError naming what is missing, left over, of another shape or dtype, or not safe to read.
    """
    opened = open_folder(folder)
    wanted = {name: shape for name, shape in shapes(model, 0).items() if not is_new(name)}
    entries = {name: entry for name, entry in opened.entries.items() if not name.endswith(_ROTARY_BUFFER)}
    head = "lm_head.weight"
    if model.tie_embeddings and head in entries:
        # A tied head stored a second time is no other head.
        check_shapes({head: opened.entries[head].shape}, {head: (model.vocab_size, model.hidden_size)}, folder)
        if entries[head].dtype in DTYPES and not same_bits(opened[head], opened["model.embed_tokens.weight"]):
            raise ValueError(f"{folder}: tie_word_embeddings is set, but {head} differs from model.embed_tokens.weight")
        del entries[head]
    weights = MappedTensors(entries, opened.metadata)
    check_weights(weights, wanted, folder)
    return weights


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raises: ValueError naming tensors that are missing, left over, or of another shape."""
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    for names, fault in ((missing, "lacks"), (extra, "holds")):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            tail = "" if fault == "lacks" else ", which the model has no place for"
            raise ValueError(f"{where} {fault} {', '.join(names[:3])}{rest}{tail}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, wanted {list(shape)}")


def check_weights(weights: MappedTensors, wanted: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raises: ValueError naming a tensor that is missing, left over, of another shape, of another dtype than the rest, or of no
    floating-point one that we have."""
    entries = weights.entries
    check_shapes({name: entry.shape for name, entry in entries.items()}, wanted, where)
    first = next(iter(entries))
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(f"{where}: {name} is {entry.dtype}, wanted {', '.join(DTYPES)}")
        if entry.dtype != entries[first].dtype:
            raise ValueError(f"{where}: {name} is {entry.dtype}, but {first} is {entries[first].dtype}: wanted one dtype")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes (so that a NaN equals itself)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


# ---- what vision adds ----------------------------------------------------------------------------------------------

_ZEROS = ("bias", "_positions", "_gate", "o_proj_img.weight")
"""What starts at 0, so that the text is as it was."""
_BLOCK_OUTPUTS = ("vision_block.o_proj.weight", "vision_block.mlp.down_proj.weight")


class NewVisionWeights(NamedTensors):
    """What vision adds to a language model that has none; each tensor is made when it is asked for.

    random: matrices normal with the model's `init_std` (a block's outputs smaller, as initialization.py has it), a function of
    seed and name; biases, gates, positions and a second output projection 0; norms 1.
    from-text: what the vision K/V projections take is treated as a text state: norm, K and V are the layer's own, biases too;
    the rest as in random. A tower of V channels on a model of H > V takes the first V columns, times sqrt(H / V), which keeps
    the expected length of keys and values and leaves them in the space that the text's span. A tower wider than the model is
    refused: V - H of its channels would have nothing to start from.
    """

    def __init__(self, text: Mapping[str, Tensor], config: Config, init: VisionInit, seed: int):
        """Raises: ValueError if widths or choices do not allow `from-text`."""
        model, injection = config.model, config.injection
        self._width = injection.vision_width(model, config.vision)
        if init == "from-text" and injection.keys_values != "own":
            raise ValueError(
                f"--vision-kv-init from-text is for vision K/V projections of their own, but injection.keys_values is "
                f"{injection.keys_values}; use --vision-kv-init random"
            )
        if init == "from-text" and self._width > model.hidden_size:
            raise ValueError(
                f"--vision-kv-init from-text needs a tower no wider than the language model: {self._width} is above "
                f"{model.hidden_size}; use --vision-kv-init random"
            )
        self._text, self._model, self._init, self._seed = text, model, init, seed
        known = shapes(model, config.vision, injection)
        self.names = self.shapes = {name: shape for name, shape in known.items() if is_new(name)}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name], self._text["model.norm.weight"].dtype
        if self._init == "from-text" and "_img." in name and "o_proj" not in name:
            of_text = name.replace("vision_block.input_", "input_").replace("vision_block.", "self_attn.")
            source = self._text[of_text.replace("_img.", ".")]
            if name.endswith("bias"):
                return source.clone()
            scale = 1.0 if "norm" in name else math.sqrt(self._model.hidden_size / self._width)
            return (source[..., : self._width].float() * scale).to(dtype)
        if name.endswith(_ZEROS):
            return torch.zeros(shape, dtype=dtype)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        smaller = math.sqrt(2 * self._model.num_layers) if name.endswith(_BLOCK_OUTPUTS) else 1.0
        return (torch.randn(shape, generator=generator) * (self._model.init_std / smaller)).to(dtype)


# ---- the tower -----------------------------------------------------------------------------------------------------


def read_tower_config(folder: Path, feature_layer: int) -> VisionConfig:
    """A SigLIP or CLIP folder (a vision model alone or a whole model) as our configuration, `path` included.

    The pixels' mean and deviation come from its `preprocessor_config.json`, or are the kind's own; images are resized to a
    square. Raises: ValueError naming what our tower would compute otherwise.
    """
    published = {row.transformers.lower(): name for name, row in TOWERS.items() if row.transformers}
    stored = _plain_settings(folder, tuple(t for model_type in published for t in (model_type, f"{model_type}_vision_model")))
    where = folder / "config.json"
    import transformers

    kind = published[stored["model_type"].removesuffix("_vision_model")]
    config_class = getattr(transformers, f"{TOWERS[kind].transformers}VisionConfig")
    settings, usual = _settings(config_class, stored.get("vision_config", stored), where), config_class()
    # A checkpoint of ours stores the tower's sizes and weights; the rest must be what the kind always has.
    for name in ("hidden_act", "layer_norm_eps", "num_channels"):
        got, wanted = getattr(settings, name), getattr(usual, name)
        if got != wanted:
            raise ValueError(f"{where}: {name} is {got}, but a {kind} tower here has {wanted}")
    sizes = {ours: getattr(settings, theirs) for ours, theirs in SIZES.items()}
    for ours, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: {SIZES[ours]} is {size}, wanted a number above 0")
    mean, std = TOWERS[kind].pixel_mean, TOWERS[kind].pixel_std
    if (folder / "preprocessor_config.json").is_file():
        processor = read_json(folder / "preprocessor_config.json")
        mean, std = (
            typed_json.as_type(tuple[float, float, float], processor.get(name, list(usual)), "preprocessor_config.json", name)
            for name, usual in (("image_mean", mean), ("image_std", std))
        )
    return VisionConfig(
        tower=kind,
        path=str(folder),
        **sizes,
        feature_layer=feature_layer,
        pixel_mean=mean,
        pixel_std=std,
    )


def tower_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a tower's folder stores its weights, float32 if they are mixed. Raises: ValueError."""
    found = set()
    for name, entry in open_folder(folder).entries.items():
        if name.endswith("position_ids"):  # older CLIP folders number the positions in a tensor
            continue
        if entry.dtype not in DTYPES:
            raise ValueError(f"{folder}: {name} is {entry.dtype}, wanted {', '.join(DTYPES)}")
        found.add(DTYPES[entry.dtype])
    return found.pop() if len(found) == 1 else torch.float32
