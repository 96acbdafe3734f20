"""Fresh weights drawn by their names, so that they depend on nothing else: not on what else is built, nor on the layout.

Flows in: the parameters of a module with their names in the whole model; out: the same, drawn anew. Vectors and whatever starts
at zero stay as they were built.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import Config

_OUTPUTS = ("self_attention.linear_proj.weight", "vision_block.linear_proj.weight", "mlp.linear_fc2.weight")
"""What writes into the residual stream begins smaller, as megatron-core has it: by sqrt(2 * num_layers)."""
_ZEROS = ("_positions", "linear_vision_proj.weight")


@torch.no_grad()
def draw_by_name(named: Iterable[tuple[str, nn.Parameter]], config: Config, tensor_rank: int) -> None:
    """Draw each matrix from a normal distribution, as a function of train.seed and its name.

    Args: named: by their names in the whole model, with a layer's number in the whole model.
    """
    for name, parameter in named:
        if parameter.dim() < 2 or name.endswith(_ZEROS):
            continue
        deviation = config.model.init_std
        if name.endswith(_OUTPUTS):
            deviation /= math.sqrt(2 * config.model.num_layers)
        parameter.copy_(_share(parameter, name, config, tensor_rank) * deviation)


def _share(parameter: nn.Parameter, name: str, config: Config, tensor_rank: int) -> Tensor:
    """This tensor rank's part of the whole tensor's numbers."""
    ranks = config.parallel.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
    dim, stride = getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_stride", 1)
    shape = list(parameter.shape)
    shape[dim] *= ranks
    # Tied, the head has the embedding's numbers, also where a pipeline keeps it apart.
    if config.model.tie_embeddings and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    digest = hashlib.sha256(f"{config.train.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    whole = torch.randn(shape, generator=generator)
    if ranks == 1:
        return whole.to(parameter.device)
    return torch.cat(whole.chunk(stride * ranks, dim)[tensor_rank::ranks], dim).to(parameter.device)
