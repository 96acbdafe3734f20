"""The layer specs: which class stands for each part of a HiMix layer, by backend.

`torch` runs anywhere; `te` is Transformer Engine: norms fused into the linear layers, fused attention. The vision norm and
projection are the same in both: the norm's statistics are shared by all layers, which no fused layer offers. Parameters carry
the same names in a checkpoint under both, and the extra states that some modules have are not stored
(checkpoint/checkpointer.py): a run may be continued on the other backend.
"""

from __future__ import annotations

import pkgutil
from typing import Any, Literal

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from ..config import Config
from ..config.families import FAMILIES
from ..distributed.fused_kernels import Kernels
from ..distributed.megatron_config import attention_core, chosen_layer_spec
from .attention.backends import TorchMixtureAttention, TransformerEngineMixtureAttention, TritonMixtureAttention
from .attention.mixture_attention import MixtureAttention, MixtureAttentionSubmodules, VisionNorm
from .cpu_ops import RMSNorm, SwiGLU
from .layer import HiMixLayer, TransformerEngineSwiGLU, residual_add
from .vision_block import VisionBlock
from .vision_input import LayerVision, VisionLinear

CORES: dict[str, Any] = {
    "te": TransformerEngineMixtureAttention,
    "flash": TorchMixtureAttention,
    "triton": TritonMixtureAttention,
}
"""`megatron_config.attention_core`'s choices."""


def block_spec(
    config: Config, mcore_config: Any, kernels: Kernels, *, vision_is_frozen: bool, chunk: int | None, stage: int
) -> TransformerBlockSubmodules:
    """The layers of one model chunk (None: no interleaving) of a pipeline stage, and the final norm.

    A family with layers of its own changes them here, and `mcore_config` with them.

    Args: vision_is_frozen: whether no gradient is wanted for what `vision_input.py` gives.
    Raises: ValueError for a backend or kernels that are asked for and cannot run here.
    """
    backend, core = chosen_layer_spec(config.model, kernels), CORES[attention_core(config, kernels)]
    num_layers = get_num_layers_to_build(mcore_config, vp_stage=chunk, pp_rank=stage)
    first = get_transformer_layer_offset(mcore_config, vp_stage=chunk, pp_rank=stage)
    layers = []
    for number in range(first, first + num_layers):
        layer = _layer(backend, core, LayerVision.of(config, number, is_frozen=vision_is_frozen))
        if (change := FAMILIES[config.model.family].layer) is not None:
            pkgutil.resolve_name(change)(layer, mcore_config)
        layers.append(layer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(backend))


def _norm(backend: Literal["te", "torch"]) -> type:
    if backend == "torch":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # type: ignore[no-any-return]


def _layer(backend: Literal["te", "torch"], core: type, vision: LayerVision | None) -> ModuleSpec:
    """`vision`: None: the layer takes up none."""
    parts: tuple[type, type, type] = (ColumnParallelLinear, RowParallelLinear, SwiGLU)
    # Transformer Engine keeps these norms inside the linear layer after them: its names are used on disk.
    norms: dict[str, Any] = {
        "input_layernorm": RMSNorm,
        "pre_mlp_layernorm": RMSNorm,
        "sharded_state_dict_keys_map": {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    }
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        parts, norms = (TELayerNormColumnParallelLinear, TERowParallelLinear, TransformerEngineSwiGLU), {}
    column, row, activation = parts
    attention = MixtureAttentionSubmodules(
        linear_qkv=column,
        core_attention=core,
        linear_proj=row,
        vision_norm=VisionNorm,
        linear_vision_kv=VisionLinear,
    )
    has_block = vision is not None and vision.injection.fusion == "block"
    return ModuleSpec(
        module=HiMixLayer,
        params={
            "vision": vision,
            "vision_block": ModuleSpec(module=VisionBlock, submodules=attention) if has_block else None,
        },
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=MixtureAttention,
                params={"attn_mask_type": AttnMaskType.causal, "vision": None if has_block else vision},
                submodules=attention,
            ),
            self_attn_bda=residual_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, activation_func=activation, linear_fc2=row),
            ),
            mlp_bda=residual_add,
            **norms,
        ),
    )
