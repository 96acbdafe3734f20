"""What is done with a micro-batch's features once for all layers: reduced, given positions, adapted, normalised.

Flows in: the tower's features, and how many rows and columns of them each image has; out: the block's `context`, which every
injecting layer projects to keys and values of its own, or the vision tokens that stand in the text. By default (HiMix) it is
the normalisation alone, and there is no parameter.

Every model chunk that needs vision has a replica of the parameters. They are always drawn by their names, so that all are
alike; their gradients are summed over chunks and pipeline stages (himix_model.finalize_gradients).

Shape letters: T vision tokens of the micro-batch, here before `reduce`; L hidden states of the tower, F = V channels of each
(4V after a merge), V width of the tower, H width of the text.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config, InjectionConfig
from ..config.injection import IMAGE_NUMBERS
from ..data.loading.image_table import ImageTable, grids, reduced_tokens
from .initialization import draw_by_name


@dataclass(frozen=True, slots=True)
class LayerVision:
    """What an injecting layer must know to take up vision."""

    injection: InjectionConfig
    width: int
    """Channels that its norm and projections take."""
    feature_width: int
    """Channels of its hidden state of the tower, in front of an adapter of its own."""
    level: int
    """Which of the hidden states it takes."""
    num_levels: int
    is_frozen: bool
    """Whether the context needs no gradient."""
    is_everywhere: bool
    """Whether all decoder layers inject."""

    @staticmethod
    def of(config: Config, layer: int, *, is_frozen: bool) -> LayerVision | None:
        """Of decoder layer `layer`, counted from 0; None: it injects nothing."""
        injection, num_layers = config.injection, config.model.num_layers
        if layer not in injection.injecting_layers(num_layers):
            return None
        num_levels = len(config.vision.levels)
        return LayerVision(
            injection,
            injection.vision_width(config.model, config.vision),
            injection.feature_width(config.vision),
            injection.level(layer, num_layers, num_levels),
            num_levels,
            is_frozen,
            len(injection.injecting_layers(num_layers)) == num_layers,
        )

    def own_level(self, context_TX: Tensor) -> Tensor:
        """The channels of the context that are the layer's hidden state."""
        if self.num_levels == 1:
            return context_TX
        return torch.unflatten(context_TX, -1, (self.num_levels, -1))[..., self.level, :]


class VisionAdapter(MegatronModule):  # type: ignore[misc]
    """Linear, GELU, linear, split over the tensor ranks; the same outcome on each of them."""

    def __init__(self, config: Any, width: int, tp_group: Any):
        """From `width` channels to the text's."""
        whole = without_sequence_parallel(config)
        super().__init__(whole)
        shared: dict[str, Any] = {"config": whole, "skip_bias_add": False, "is_expert": False, "tp_group": tp_group}
        self.linear_fc1 = VisionLinear(
            width, config.hidden_size, init_method=config.init_method, gather_output=False, bias=True, **shared
        )
        self.linear_fc2 = AdapterOutput(
            config.hidden_size, config.hidden_size, init_method=config.init_method, input_is_parallel=True, bias=True, **shared
        )

    def forward(self, features: Tensor) -> Tensor:
        """float[..., F] to float[..., H]."""
        if features.requires_grad:
            features = tensor_parallel.copy_to_tensor_model_parallel_region(features)
        adapted: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(features)))
        return adapted


class VisionLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """W (w * u) + b, by tensor ranks over the rows of W. megatron-core's own would form the gradient of its input also where
    nobody wants it, as of a frozen tower's features."""

    def forward(self, normalised_TV: Tensor, norm_V: Tensor | None = None) -> Tensor:
        """This rank's channels. The backward pass takes one product for both weights: d(W * w) = dy^T u."""
        return F.linear(normalised_TV, self.weight if norm_V is None else self.weight * norm_V, self.bias)


class AdapterOutput(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """The counterpart: a sum over the tensor ranks, then the bias."""

    def forward(self, hidden: Tensor) -> Tensor:
        """All channels."""
        partial = F.linear(hidden, self.weight)
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(partial) + self.bias
        return whole


class VisionInput(MegatronModule):  # type: ignore[misc]
    """From the tower's features to what all layers share of them."""

    def __init__(self, config: Config, mcore_config: Any, tp_group: Any):
        super().__init__(mcore_config)
        self.settings, self.num_levels = config, len(config.vision.levels)
        injection, vision = config.injection, config.vision
        device = "cpu" if mcore_config.use_cpu_initialization else torch.cuda.current_device()
        if injection.position == "learned":
            width = self.num_levels * injection.feature_width(vision)
            for name, number in injection.position_tables(vision).items():
                table = torch.zeros(number, width, dtype=mcore_config.params_dtype, device=device)
                self.register_parameter(f"{name}_positions", nn.Parameter(table))
        self.adapter = None
        if injection.adapter == "shared":
            self.adapter = VisionAdapter(mcore_config, injection.feature_width(vision), tp_group)
        draw_by_name(self.named_parameters(prefix="vision_input"), config, torch.distributed.get_rank(tp_group))

    def forward(self, features_TX: Tensor, images: ImageTable) -> Tensor:
        """The context, float[T', L*W] (T' after `reduce`); for tokens in the sequence float[T', H].

        Args: features_TX: float[T, L*V]; images: of the micro-batch, as the tower knows them.
        """
        injection = self.settings.injection
        shapes = grids(images, self.settings) if injection.reduce != "none" or injection.position == "learned" else []
        if injection.reduce != "none":
            features_TX = reduce_tokens(features_TX, shapes, self.num_levels, injection.reduce)
        if injection.position == "learned":
            shapes = [injection.reduced_grid(*shape) for shape in shapes]
            features_TX = features_TX + self._positions(shapes, images.per_sample, features_TX.device)
        levels = torch.unflatten(features_TX, -1, (self.num_levels, -1)) if self.num_levels > 1 else features_TX
        if self.adapter is not None:
            levels = self.adapter(levels)
        if injection.in_sequence:
            return levels
        if injection.adapter != "per_layer":
            levels = normalise(levels, self.config.layernorm_epsilon if injection.norm != "none" else None)
        return levels.flatten(-2) if self.num_levels > 1 else levels

    def _positions(self, shapes: Sequence[tuple[int, int]], per_sample: Sequence[int], device: torch.device) -> Tensor:
        """float[T', L*F]: what the three tables have for each vision token."""
        numbers = [min(k, IMAGE_NUMBERS - 1) for count in per_sample for k in range(count)]
        places = [
            (row, column, number)
            for (rows, columns), number in zip(shapes, numbers, strict=True)
            for row in range(rows)
            for column in range(columns)
        ]
        index = torch.tensor(places, dtype=torch.int64).view(-1, 3).t().contiguous()
        if device.type != "cpu":
            index = index.pin_memory().to(device, non_blocking=True)
        row, column, image = index
        of_row, of_column = self.row_positions.index_select(0, row), self.column_positions.index_select(0, column)
        found: Tensor = of_row + of_column + self.image_positions.index_select(0, image)
        return found


def normalise(vision: Tensor, eps: float | None) -> Tensor:
    """u = v / rms(v), each vision token for itself (eps None: v as it is); its gradient, if it needs one, is summed over the
    tensor ranks, each of which has a part of the heads."""
    normalised = vision if eps is None else F.rms_norm(vision, vision.shape[-1:], eps=eps)
    if normalised.requires_grad:
        normalised = tensor_parallel.copy_to_tensor_model_parallel_region(normalised)
    return normalised


def reduce_tokens(features_TX: Tensor, shapes: Sequence[tuple[int, int]], num_levels: int, way: str) -> Tensor:
    """Each 2x2 neighbouring tokens of an image as one: float[T', L*F].

    Args: shapes: rows and columns of each image; way: "merge" (side by side in the channels of each level) or "pool".
    """
    parts = []
    images = torch.split(features_TX, [rows * columns for rows, columns in shapes])
    for image, (rows, columns) in zip(images, shapes, strict=True):
        up, across = -(-rows // 2), -(-columns // 2)
        grid = F.pad(image.view(rows, columns, num_levels, -1), (0, 0, 0, 0, 0, 2 * across - columns, 0, 2 * up - rows))
        squares = grid.view(up, 2, across, 2, num_levels, -1).permute(0, 2, 4, 1, 3, 5)  # [up, across, L, 2, 2, V]
        if way == "merge":
            parts.append(squares.reshape(up * across, -1))
            continue
        real = F.pad(image.new_ones(rows, columns), (0, 2 * across - columns, 0, 2 * up - rows))
        number = real.view(up, 2, across, 2).sum((1, 3))
        parts.append((squares.sum((3, 4)) / number[:, :, None, None]).reshape(up * across, -1))
    if parts:
        return torch.cat(parts)
    return features_TX.new_empty(0, features_TX.shape[1] * (4 if way == "merge" else 1))


def reduced(images: ImageTable, config: Config) -> ImageTable:
    """The same images with their vision tokens after `reduce`."""
    return dataclasses.replace(images, tokens=reduced_tokens(images, config))


def without_sequence_parallel(config: Any) -> Any:
    """megatron-core's configuration for what is whole on every tensor rank also where text is split."""
    whole = copy.copy(config)
    whole.sequence_parallel = False
    return whole
