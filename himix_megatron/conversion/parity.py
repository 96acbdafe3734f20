"""Checks that a conversion computes what it was made from: logits of both sides on a fixed input, every tensor bit for bit.

Flows in: a checkpoint of ours and the weights that it is compared with; out: the largest differences. A model of more than
`WHOLE_MODEL_PARAMETERS` is compared by its first layers and the first rows of its vocabulary, so that memory stays bounded.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, ModelConfig, ParallelConfig
from ..config.injection import HIMIX
from ..config.towers import TOWERS
from ..data.loading.image_table import ImageTable
from ..distributed.fused_kernels import detect
from ..distributed.topology import Topology
from ..inference.generator import Answerer, whole_vocabulary
from ..model.schedule import run_logits
from ..model.stage_input import StageInput
from ..model.towers import build_tower
from .authors_layout import AsAuthors, is_new, layout, shapes
from .checkpoint_io import StoredWeights, read_config
from .export.parity import fixed_input, himix_outcome, parity
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

    config: Config
    """Of its layers alone."""
    first: int
    """The whole model's layer that is its first."""
    whole: bool

    @classmethod
    def of(cls, config: Config) -> Excerpt:
        """As much as `WHOLE_MODEL_PARAMETERS` allow, at least a layer: the first ones, or up to the first that injects."""
        config = checking_config(config)
        if _num_parameters(config) <= WHOLE_MODEL_PARAMETERS:
            return cls(config, 0, whole=True)
        vocabulary = min(config.model.vocab_size, _CUT_VOCABULARY)
        for number in range(config.model.num_layers, 0, -1):
            cut, first = _cut(config, number, vocabulary)
            if _num_parameters(cut) <= WHOLE_MODEL_PARAMETERS:
                break
        return cls(cut, first, whole=False)

    @property
    def model(self) -> ModelConfig:
        """Of its layers alone."""
        return self.config.model

    def __str__(self) -> str:
        if self.whole:
            return "the whole model"
        layers = f"layers {self.first} to {self.first + self.model.num_layers - 1}"
        layers = layers if self.first else f"the first {self.model.num_layers} layers"
        return f"{layers} and {self.model.vocab_size} rows of the vocabulary"

    def text_ids(self) -> Tensor:
        """int64[B, S], always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.model.vocab_size, (_NUM_SAMPLES, _LENGTH), generator=generator)

    def features(self) -> Tensor:
        """float[B, N, V], always the same."""
        width = self.config.vision.feature_width
        return torch.randn(_NUM_SAMPLES, _NUM_VISION, width, generator=torch.Generator().manual_seed(2))


def _num_parameters(config: Config) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(config.model, config.vision, config.injection).values())


def _cut(config: Config, num_layers: int, vocab_size: int) -> tuple[Config, int]:
    """The settings of some layers with one hidden state of the tower, and the first of them."""
    injecting = config.injection.injecting_layers(config.model.num_layers)
    first = max(0, injecting[0] - num_layers + 1) if injecting else 0
    inside = tuple(layer - first for layer in injecting if 0 <= layer - first < num_layers)
    model = dataclasses.replace(config.model, num_layers=num_layers, vocab_size=vocab_size)
    layers = inside if len(inside) < num_layers else ()
    injection = dataclasses.replace(config.injection, layers=layers, every_layers=1)
    vision = dataclasses.replace(config.vision, feature_layer=config.vision.levels[0], feature_layers=())
    return dataclasses.replace(config, model=model, injection=injection, vision=vision), first


class _Cut(NamedTensors):
    """An excerpt's tensors out of a whole model's: the layers by their numbers in the excerpt, the vocabulary's first rows."""

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str], excerpt: Excerpt):
        self._weights, self._excerpt = weights, excerpt
        self.names = list(names)

    def __getitem__(self, name: str) -> Tensor:
        config, first = self._excerpt.config, self._excerpt.first
        tensor = self._weights[re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + first}", name)]
        if "_positions" in name:
            return tensor[:, : config.injection.feature_width(config.vision) * len(config.vision.levels)]
        return tensor[: config.model.vocab_size] if "embed" in name or "lm_head" in name or "output_layer" in name else tensor


def excerpt_weights(weights: Mapping[str, Tensor], excerpt: Excerpt) -> Mapping[str, Tensor]:
    """The excerpt's tensors out of a whole model's, both by the authors' names."""
    names = shapes(excerpt.model, excerpt.config.vision, excerpt.config.injection)
    return _Cut(weights, names, excerpt)


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
        parallel=ParallelConfig(),
        vision=dataclasses.replace(config.vision, path=None),
        train=train,
    )


def open_excerpt(checkpoint: Path, excerpt: Excerpt, topology: Topology, *, with_tower: bool) -> Answerer:
    """The excerpt's model out of a checkpoint on disk: loaded as a run loads it if it is compared as a whole."""
    answerer = Answerer(excerpt.config, detect(), topology)
    if excerpt.whole:
        answerer.load(checkpoint)
        return answerer
    config = read_config(checkpoint)
    stored = StoredWeights(checkpoint, config)
    scatter(answerer.model_chunks, _Cut(stored, layout(excerpt.model, excerpt.config.injection), excerpt), topology)
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
            settings.layer_types = settings.layer_types[excerpt.first :][: excerpt.model.num_layers]
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


def by_authors(checkpoint: Path, config: Config) -> AsAuthors:
    """A checkpoint's tensors by the authors' names."""
    return AsAuthors(StoredWeights(checkpoint, config), config.model, config.injection)


def check_language(checkpoint: Path, folder: Path, weights: Mapping[str, Tensor], topology: Topology) -> Iterator[str]:
    """Compare a converted checkpoint with transformers' own language model, on text alone (an image that nobody shows changes
    nothing, whatever the method): a line per comparison. Raises: DiffersError."""
    config = read_config(checkpoint)
    yield check_bits(by_authors(checkpoint, config), weights)
    excerpt = Excerpt.of(config)
    ids = excerpt.text_ids()
    wanted = transformers_logits(folder, weights, excerpt, ids)
    found = stored_logits(checkpoint, excerpt, topology, ids, excerpt.features()[:, :0])
    yield check_logits(f"logits of {excerpt} on {ids.numel()} tokens, compared with transformers", found, wanted)
    if config.injection != HIMIX:
        yield "vision is not compared: no other program has these weights"


def check_authors(checkpoint: Path, weights: Mapping[str, Tensor], topology: Topology) -> Iterator[str]:
    """Compare a checkpoint with weights in the authors' layout, by plain torch on text and features. Raises: DiffersError."""
    config = read_config(checkpoint)
    yield check_bits(by_authors(checkpoint, config), weights)
    excerpt = Excerpt.of(config)
    ids, features = excerpt.text_ids(), excerpt.features()
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
    weights, tower = by_authors(checkpoint, config), StoredWeights(checkpoint, config).tower(config)
    wanted = ChainMap({f"vision_tower.{name}": tensor for name, tensor in tower.items()}, weights)  # type: ignore[arg-type]
    yield check_bits(open_folder(folder), wanted)
    excerpt = Excerpt.of(config)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.excerpt-") as room:
        compared = folder
        if not excerpt.whole:
            compared = Path(room) / "excerpt"
            own = {name: tensor for name, tensor in wanted.items() if name.startswith("vision_tower.")}
            export(ChainMap(own, excerpt_weights(weights, excerpt)), excerpt.config, compared)  # type: ignore[arg-type]
        answerer = open_excerpt(checkpoint, excerpt, topology, with_tower=True)
        given = fixed_input(answerer.config)
        logits, answers = himix_outcome(answerer, given)
        del answerer
        difference, preference = parity(compared, config, given, logits, answers)
    what, largest = f"{excerpt} on 3 samples with images, compared with transformers", float(logits.abs().max())
    yield check_difference(f"logits of {what}", difference, largest)
    yield check_difference(f"answers of {what} (preference of another token)", preference, largest)


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
    hidden = peer((pixels / 255 - mean) / std, output_hidden_states=True).hidden_states
    del peer
    tower = build_tower(vision, seed=0, dtype=torch.float32)
    tower.load_state_dict(StoredWeights(checkpoint, config).tower(config), strict=True)
    wanted = torch.cat([hidden[level] for level in vision.levels], dim=-1)[:, TOWERS[vision.tower].class_tokens :]
    found = tower(pixels, torch.tensor([False]))
    return check_logits("tower's features of one image, compared with transformers", found, wanted)
