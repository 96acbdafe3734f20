"""Checks that a conversion computes what it was made from: logits of both sides on a fixed input, every tensor bit for bit.

Flows in: a checkpoint of ours and the weights that it is compared with; out: the largest differences. A model of more than
`WHOLE_MODEL_PARAMETERS` is compared by its first layers and the first rows of its vocabulary, so that memory stays bounded.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ModelConfig
from ..config.towers import TOWERS
from ..data.loading.image_table import ImageTable
from ..distributed.fused_kernels import detect
from ..distributed.topology import Topology
from ..inference.generator import Answerer, whole_vocabulary
from ..model.schedule import run_logits
from ..model.stage_input import StageInput
from ..model.towers import build_tower
from .authors_layout import AsAuthors, is_new, shapes
from .checkpoint_io import StoredWeights, read_config
from .export.parity import fixed_input, himix_logits, parity
from .huggingface import same_bits
from .reference_model import plain_logits
from .safetensors_io import NamedTensors, open_folder
from .sharding import scatter

WHOLE_MODEL_PARAMETERS = 600_000_000
"""2.4 GB in float32, on one side after the other."""
_CUT_VOCABULARY = 4096
_LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}
LIMIT = 2e-5
"""Of logits and features, relative to the largest where that is above 1."""
_NUM_SAMPLES, _LENGTH, _NUM_VISION = 2, 24, 9


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What of a model is compared: all of it, or its first layers and the first rows of its vocabulary."""

    model: ModelConfig
    whole: bool

    @classmethod
    def of(cls, model: ModelConfig, vision_width: int) -> Excerpt:
        """As much as `WHOLE_MODEL_PARAMETERS` allow, at least a layer."""
        if _num_parameters(model, vision_width) <= WHOLE_MODEL_PARAMETERS:
            return cls(model, whole=True)
        cut = dataclasses.replace(model, vocab_size=min(model.vocab_size, _CUT_VOCABULARY))
        while cut.num_layers > 1 and _num_parameters(cut, vision_width) > WHOLE_MODEL_PARAMETERS:
            cut = dataclasses.replace(cut, num_layers=cut.num_layers - 1)
        return cls(cut, whole=False)

    def __str__(self) -> str:
        if self.whole:
            return "the whole model"
        return f"the first {self.model.num_layers} layers and {self.model.vocab_size} rows of the vocabulary"

    def text_ids(self) -> Tensor:
        """int64[B, S], always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.model.vocab_size, (_NUM_SAMPLES, _LENGTH), generator=generator)

    def features(self, vision_width: int) -> Tensor:
        """float[B, N, V], always the same."""
        return torch.randn(_NUM_SAMPLES, _NUM_VISION, vision_width, generator=torch.Generator().manual_seed(2))


def _num_parameters(model: ModelConfig, vision_width: int) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(model, vision_width).values())


class _Cut(NamedTensors):
    """Tensors of a model with the vocabulary's first rows only; what the excerpt has no layer for is not asked for."""

    def __init__(self, weights: Mapping[str, Tensor], names: list[str], rows: int):
        self._weights, self.names, self._rows = weights, names, rows

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        return tensor[: self._rows] if "embed" in name or "lm_head" in name or "output_layer" in name else tensor


def excerpt_weights(weights: Mapping[str, Tensor], excerpt: Excerpt) -> Mapping[str, Tensor]:
    """The excerpt's tensors out of a whole model's, both by the authors' names."""
    return _Cut(weights, list(shapes(excerpt.model, 1)), excerpt.model.vocab_size)


# ---- the two sides -------------------------------------------------------------------------------------------------


@torch.no_grad()
def our_logits(model_chunks: list[Any], topology: Topology, model: ModelConfig, ids: Tensor, features: Tensor) -> Tensor:
    """float[B, S, vocabulary] on every rank, of the Megatron model at any layout.

    Args: ids: int64[B, S]; features: float[B, N, V], one image of N tokens a sample; N may be 0, for no image.
    """
    num_samples, tokens = features.shape[:2]
    images = ImageTable.of_features([[tokens] * (tokens > 0)] * num_samples)
    blank = torch.zeros(len(images), dtype=torch.bool)
    device = topology.device
    given = StageInput(ids.to(device), features.flatten(0, 1).to(device), blank.to(device), images)
    found = run_logits(model_chunks, [given], lambda _, logits: logits)
    results: list[Any] = [None]
    if topology.is_last_stage:
        results = [whole_vocabulary(found[0].contiguous(), topology, model.vocab_size).float().cpu()]
    last = torch.distributed.get_process_group_ranks(topology.pipeline)[-1]
    torch.distributed.broadcast_object_list(results, src=last, group=topology.pipeline, device=device)
    logits: Tensor = results[0]
    return logits


def checking_config(config: Config) -> Config:
    """The same model as it is compared: float32, plain torch, no layout, nothing trains."""
    train = dataclasses.replace(config.train, precision="fp32", fp8="none", trainable_parts=("vision_kv",))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layer_spec="torch", attention_core="auto"),
        vision=dataclasses.replace(config.vision, path=None),
        train=train,
    )


def open_excerpt(checkpoint: Path, excerpt: Excerpt, topology: Topology, *, with_tower: bool) -> Answerer:
    """The excerpt's model out of a checkpoint on disk: loaded as a run loads it if it is compared as a whole."""
    config = checking_config(read_config(checkpoint))
    if excerpt.whole:
        answerer = Answerer(config, detect(), topology)
        answerer.load(checkpoint)
        return answerer
    stored = StoredWeights(checkpoint, config.model)
    cut = dataclasses.replace(config, model=dataclasses.replace(excerpt.model, layer_spec="torch", attention_core="auto"))
    answerer = Answerer(cut, detect(), topology)
    scatter(answerer.model_chunks, _Cut(stored, list(stored), excerpt.model.vocab_size), topology)
    if with_tower:
        answerer.tower.load_state_dict(stored.tower(config), strict=True)
    return answerer


def stored_logits(checkpoint: Path, excerpt: Excerpt, topology: Topology, ids: Tensor, features: Tensor) -> Tensor:
    """The logits of a checkpoint on disk, on features that are given."""
    answerer = open_excerpt(checkpoint, excerpt, topology, with_tower=False)
    return our_logits(answerer.model_chunks, topology, excerpt.model, ids, features)


@torch.no_grad()
def transformers_logits(folder: Path, weights: Mapping[str, Tensor], excerpt: Excerpt, ids: Tensor) -> Tensor:
    """The logits of transformers' own model of a language folder, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if excerpt.whole:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **_LOCAL)
    else:
        settings = AutoConfig.from_pretrained(str(folder), **_LOCAL)
        settings.num_hidden_layers, settings.vocab_size = excerpt.model.num_layers, excerpt.model.vocab_size
        settings.pad_token_id = None
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: excerpt.model.num_layers]
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        cut = excerpt_weights(weights, excerpt)
        own = {name: cut[name].float() for name in cut if not is_new(name)}
        if excerpt.model.tie_embeddings:
            own["lm_head.weight"] = own["model.embed_tokens.weight"]
        model.load_state_dict(own, strict=True)
    logits: Tensor = model.eval()(ids).logits
    return logits.float()


# ---- comparing -----------------------------------------------------------------------------------------------------


class DiffersError(Exception):
    """A conversion does not compute what it was made from."""


def check_logits(what: str, found: Tensor, wanted: Tensor) -> str:
    """A line with the largest difference. Raises: DiffersError above the limit, or if either side is not finite."""
    return check_difference(what, float((found - wanted).abs().max()), float(wanted.abs().max()))


def check_difference(what: str, difference: float, largest: float) -> str:
    """A line with the difference. Raises: DiffersError above the limit, or if it is no number."""
    limit = LIMIT * max(1.0, largest)
    line = f"{what}: largest difference {difference:.2e} (limit {limit:.1e}, largest value {largest:.3g})"
    if not difference <= limit:
        raise DiffersError(line)
    return line


def check_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """A line with the number of tensors. Raises: DiffersError naming the first that is not the same bit for bit."""
    for name in wanted:
        if not same_bits(found[name], wanted[name]):
            raise DiffersError(f"{name} came back with other bits")
    return f"all {len(wanted)} tensors read back bit for bit"


def check_language(
    checkpoint: Path, folder: Path, weights: Mapping[str, Tensor], vision_width: int, topology: Topology
) -> Iterator[str]:
    """Compare a converted checkpoint with transformers' own language model: a line per comparison. Raises: DiffersError."""
    model = read_config(checkpoint).model
    yield check_bits(AsAuthors(StoredWeights(checkpoint, model), model), weights)
    excerpt = Excerpt.of(model, vision_width)
    ids = excerpt.text_ids()
    wanted = transformers_logits(folder, weights, excerpt, ids)
    found = stored_logits(checkpoint, excerpt, topology, ids, torch.empty(len(ids), 0, vision_width))
    yield check_logits(f"logits of {excerpt} on {ids.numel()} tokens, compared with transformers", found, wanted)


def check_authors(checkpoint: Path, weights: Mapping[str, Tensor], vision_width: int, topology: Topology) -> Iterator[str]:
    """Compare a checkpoint with weights in the authors' layout, by plain torch on text and features. Raises: DiffersError."""
    model = read_config(checkpoint).model
    yield check_bits(AsAuthors(StoredWeights(checkpoint, model), model), weights)
    excerpt = Excerpt.of(model, vision_width)
    ids, features = excerpt.text_ids(), excerpt.features(vision_width)
    wanted = plain_logits(excerpt_weights(weights, excerpt), excerpt.model, ids, features)
    found = stored_logits(checkpoint, excerpt, topology, ids, features)
    what = f"logits of {excerpt} on {ids.numel()} tokens and {features.shape[0]} images, compared with HiMix in plain torch"
    yield check_logits(what, found, wanted)


def check_export(checkpoint: Path, folder: Path, topology: Topology, export: Callable[..., None]) -> Iterator[str]:
    """Compare an exported folder with its checkpoint, on text and images, by transformers and the code in the folder.

    Args: export: as it made the folder; makes another one of the excerpt where the model is too large to compare whole.
    Raises: DiffersError.
    """
    config = read_config(checkpoint)
    stored = StoredWeights(checkpoint, config.model)
    weights, tower = AsAuthors(stored, config.model), stored.tower(config)
    wanted = ChainMap({f"vision_tower.{name}": tensor for name, tensor in tower.items()}, weights)  # type: ignore[arg-type]
    yield check_bits(open_folder(folder), wanted)
    excerpt = Excerpt.of(config.model, config.vision.hidden_size)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.excerpt-") as room:
        compared = folder
        if not excerpt.whole:
            compared, cut = Path(room) / "excerpt", dataclasses.replace(config, model=excerpt.model)
            own = {name: tensor for name, tensor in wanted.items() if name.startswith("vision_tower.")}
            export(ChainMap(own, excerpt_weights(weights, excerpt)), cut, compared)  # type: ignore[arg-type]
        answerer = open_excerpt(checkpoint, excerpt, topology, with_tower=True)
        given = fixed_input(answerer.config)
        ours = himix_logits(answerer, given)
        del answerer
        difference, largest = parity(compared, config, given, ours), float(ours.abs().max())
    yield check_difference(f"logits of {excerpt} on 3 samples with images, compared with transformers", difference, largest)


@torch.no_grad()
def check_tower(checkpoint: Path, folder: Path) -> str:
    """Compare a stored tower's features with transformers' hidden states of its folder, on one image. Raises: DiffersError."""
    from transformers import AutoConfig, AutoModel

    config = checking_config(read_config(checkpoint))
    vision = config.vision
    pixels = torch.randint(
        256, (1, 3, vision.image_size, vision.image_size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.pixel_mean, vision.pixel_std))
    settings = AutoConfig.from_pretrained(str(folder), **_LOCAL)
    peer: Any = AutoModel.from_pretrained(str(folder), dtype=torch.float32, **_LOCAL).eval()
    peer = peer.vision_model if hasattr(settings, "vision_config") else peer
    hidden = peer((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states[vision.feature_layer]
    del peer
    tower = build_tower(vision, seed=0, dtype=torch.float32)
    tower.load_state_dict(StoredWeights(checkpoint, config.model).tower(config), strict=True)
    wanted = hidden[:, TOWERS[vision.tower].class_tokens :]
    return check_logits(
        "tower's features of one image, compared with transformers", tower(pixels, torch.tensor([False])), wanted
    )
