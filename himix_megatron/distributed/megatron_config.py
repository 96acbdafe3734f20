"""Translates our configuration into megatron-core's. Hooks (timers, gradient finalization) are set in training/builder.py.

Flows in: Config and what kernels are usable here; out: mcore's TransformerConfig, DDP and optimizer configurations.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer import TransformerConfig

from ..config import Config, ModelConfig
from ..costs.flops import chunk_layers, vision_chunks
from ..costs.memory import padded_vocab
from .fused_kernels import Kernels, has_variable_length

TRITON_HEAD_DIMS = (64, 128)
"""Head widths that model/attention/triton_attention.py has tiles for."""


def chosen_layer_spec(model: ModelConfig, kernels: Kernels) -> Literal["te", "torch"]:
    """The layer backend to build. Raises: ValueError if `te` is asked for and cannot run here."""
    if model.layer_spec == "torch":
        return "torch"
    if model.layer_spec == "te" and not kernels.transformer_engine:
        raise ValueError(f"model.layer_spec is te, but {kernels.transformer_engine_reason}: use --model.layer-spec torch")
    return "te" if kernels.transformer_engine and (torch.cuda.is_available() or model.layer_spec == "te") else "torch"


def attention_core(config: Config, kernels: Kernels) -> Literal["te", "flash", "triton"]:
    """The attention kernels to build the layers with; `flash` is plain torch on a CPU and in fp32.

    Raises: ValueError for kernels that are asked for and cannot run here.
    """
    core, te = config.model.attention_core, chosen_layer_spec(config.model, kernels) == "te"
    usable = torch.cuda.is_available() and kernels.triton and config.train.precision == "bf16" and config.has_plain_injection
    if core == "auto":
        # As measured on a Hopper (docs/results.md): at width 64 Triton's is the fastest; at 128 Transformer Engine's is, then
        # Triton's. On other GPUs nothing is known of its tiles, not even that they fit.
        fitting = TRITON_HEAD_DIMS[:1] if te else TRITON_HEAD_DIMS
        known = usable and torch.cuda.get_device_capability()[0] == 9
        return "triton" if known and config.model.channels_per_head in fitting else "te" if te else "flash"
    if core == "te" and not te:
        raise ValueError(
            "model.attention_core is te, which model.layer_spec torch does not have: use --model.attention-core auto"
        )
    if core == "triton" and not (usable and config.model.channels_per_head in TRITON_HEAD_DIMS):
        raise ValueError(
            f"model.attention_core is triton, which needs a GPU, the package triton, train.precision bf16, a head width of "
            f"{' or '.join(map(str, TRITON_HEAD_DIMS))}, and all layers to take up vision as HiMix's do: use "
            "--model.attention-core auto"
        )
    return core


def check_graphs(config: Config, kernels: Kernels) -> None:
    """Raises: ValueError if `train.cuda_graphs` is asked for and cannot run here."""
    if config.train.cuda_graphs == "off":
        return
    if not torch.cuda.is_available():
        raise ValueError("train.cuda_graphs is on, but there is no GPU here: use --train.cuda-graphs off")
    if config.train.precision != "bf16":
        raise ValueError("train.cuda_graphs is on, but attention in fp32 goes sample by sample: use --train.precision bf16")
    if attention_core(config, kernels) == "flash" and not has_variable_length():
        raise ValueError(
            f"train.cuda_graphs is on, but torch {torch.__version__} attends sample by sample: use torch 2.11 or later"
        )


def check_optimizer(config: Config) -> None:
    """Raises: ValueError for a distributed optimizer with a pipeline stage that has nothing for it."""
    parts, pipeline, takes = config.train.trainable_parts, config.parallel.pipeline, vision_chunks(config)
    if not config.parallel.distributed_optimizer or parts != ("vision_kv",):
        return
    if idle := [stage for stage in range(pipeline) if not any(takes[stage::pipeline])]:
        raise ValueError(
            f"parallel.distributed_optimizer is on, but nothing trains on pipeline stage {idle[0]}, which takes up no vision: "
            "use --parallel.no-distributed-optimizer, another --parallel.pipeline, or let more parts train"
        )


def check_fp8(config: Config, kernels: Kernels) -> None:
    """Raises: ValueError if `train.fp8` is asked for and cannot run here."""
    if config.train.fp8 == "none":
        return
    fp8 = config.train.fp8
    if chosen_layer_spec(config.model, kernels) != "te":
        without = "model.layer_spec is torch, or there is no CUDA device"
        reason = without if kernels.transformer_engine else kernels.transformer_engine_reason
        raise ValueError(f"train.fp8 is {fp8}, which is Transformer Engine's, but {reason}: use --train.fp8 none")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability < (8, 9):
        raise ValueError(f"train.fp8 is {fp8}, but there is no GPU with FP8 here (Ada, Hopper or later): use --train.fp8 none")
    cuda = torch.version.cuda or "0.0"
    if fp8 == "blockwise" and (capability < (9, 0) or tuple(map(int, cuda.split("."))) < (12, 9)):
        raise ValueError(
            f"train.fp8 is blockwise, which takes a GPU of compute capability 9.0 (Hopper) or above and torch for CUDA 12.9 or "
            f"above; here they are {capability[0]}.{capability[1]} and {cuda}: use --train.fp8 tensorwise"
        )
    _check_fp8_widths(config)


def _check_fp8_widths(config: Config) -> None:
    """Raises: ValueError if a tensor rank's share of a layer is not as wide as FP8 products take it."""
    model, tensor = config.model, config.parallel.tensor
    for name, width in (
        ("model.hidden_size", model.hidden_size),
        ("model.ffn_hidden_size / parallel.tensor", model.ffn_hidden_size // tensor),
        (
            "model.num_attention_heads x head width / parallel.tensor",
            model.num_attention_heads * model.channels_per_head // tensor,
        ),
        ("model.num_query_groups x head width / parallel.tensor", model.num_query_groups * model.channels_per_head // tensor),
    ):
        if width % 16:
            raise ValueError(
                f"train.fp8 is {config.train.fp8}, but {name} is {width}, and FP8 products take multiples of 16: use "
                f"--train.fp8 none{', or a smaller --parallel.tensor' if tensor > 1 else ''}"
            )


def has_fused_loss(kernels: Kernels) -> bool:
    """Whether the cross-entropy is Transformer Engine's: a kernel of its own, whatever the layers are made of."""
    if not (kernels.transformer_engine and torch.cuda.is_available()):
        return False
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        return "overwrite_input" in inspect.signature(parallel_cross_entropy).parameters  # not in earlier versions
    except (ImportError, TypeError, ValueError):  # it is written in Triton, which may be missing where all else loads
        return False


def kernel_lines(config: Config, kernels: Kernels) -> tuple[str, ...]:
    """Which kernels a run has and is computed with, and why, for its log. Raises: ValueError as `attention_core`."""
    attention: str = attention_core(config, kernels)
    if attention == "flash":
        fast = torch.cuda.is_available() and config.train.precision == "bf16" and has_variable_length()
        attention = "torch's variable-length flash attention" if fast else "torch's, sample by sample"
    loss = "Transformer Engine's" if has_fused_loss(kernels) else "megatron-core's, in chunks"
    layers = chosen_layer_spec(config.model, kernels)
    return (*kernels.reasons(), f"layers: {layers}; attention: {attention}; cross-entropy: {loss}")


def text_multiple(config: Config) -> int:
    """Texts are padded to a multiple of this: sequence parallelism splits them evenly over the tensor ranks, FP8 products want
    16 rows, and what blockwise FP8 gathers over the tensor ranks must be whole blocks (else it is gathered in bf16)."""
    sequence, fp8 = config.parallel.sequence, config.train.fp8
    rows = 1 if fp8 == "none" else 128 if fp8 == "blockwise" and sequence else 16
    return rows * (config.parallel.tensor if sequence else 1)


def overlaps(config: Config) -> bool:
    """Whether data-parallel communication overlaps the passes."""
    if config.parallel.overlap == "auto":
        return torch.cuda.is_available() and not config.sums_replicas and config.train.cuda_graphs == "off"
    return config.parallel.overlap == "on"


def pipeline_layout(config: Config) -> list[list[str]] | None:
    """mcore's layers of each chunk in the order of the network; None: equally many."""
    if config.parallel.pipeline == 1 or config.parallel.split == "even":
        return None
    chunks = [["decoder"] * number for number in chunk_layers(config)]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def params_dtype(config: Config) -> torch.dtype:
    """The dtype of parameters and activations."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def transformer_config(config: Config, kernels: Kernels) -> TransformerConfig:
    """mcore's model configuration."""
    model, parallel = config.model, config.parallel
    on_gpu = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline > 1
    te = chosen_layer_spec(model, kernels) == "te"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.channels_per_head,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.has_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=pipeline_layout(config),
        sequence_parallel=parallel.sequence,
        bf16=config.train.precision == "bf16",
        # A gradient's large range takes e5m2 where a whole tensor has one scale; a block's scale gives it that of e4m3.
        fp8={"none": None, "tensorwise": "hybrid", "blockwise": "e4m3"}[config.train.fp8],
        # Never mcore's default, delayed scaling: its state is a pickle, which Transformer Engine refuses to load.
        fp8_recipe="blockwise" if config.train.fp8 == "blockwise" else "tensorwise",
        params_dtype=params_dtype(config),
        pipeline_dtype=params_dtype(config),
        calculate_per_token_loss=True,
        # An interleaved schedule pairs sends and receives wrongly on gloo, and trains on silently, unless they are single.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=kernels.accumulation_fusion and not te,
        masked_softmax_fusion=False,
        # mcore's jit-compiled element-wise fusions need a compiler at run time; on CPU they only cost start-up.
        bias_activation_fusion=on_gpu and not te,
        # Despite its name: the MLP's activation is the one that the layer spec names (model/layer.py).
        use_te_activation_func=not on_gpu or te,
        # One launch instead of twelve, where all samples have the same angles (model/attention/mixture_attention.py).
        apply_rope_fusion=on_gpu and kernels.transformer_engine,
        # A workaround for old versions of torch: the host would wait for the whole device at every hop.
        batch_p2p_sync=False,
        recompute_granularity=None if config.train.recompute == "none" else config.train.recompute,
        recompute_method="uniform" if config.train.recompute == "full" else None,
        recompute_num_layers=1 if config.train.recompute == "full" else None,
    )


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """mcore's data-parallel configuration: gradients are summed in fp32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=overlaps(config),
        overlap_param_gather=overlaps(config) and config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
    )


def optimizer_config(config: Config) -> MegatronOptimizerConfig:
    """mcore's optimizer configuration."""
    optimizer = config.optimizer
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_norm,
        bf16=config.train.precision == "bf16",
        params_dtype=params_dtype(config),
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=overlaps(config) and config.parallel.distributed_optimizer,
    )


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers inside mcore's chain of them, or the one optimizer."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def gpt_arguments(config: Config) -> dict[str, Any]:
    """GPTModel's own keyword arguments."""
    model = config.model
    return {
        "vocab_size": padded_vocab(config),
        "max_sequence_length": config.data.max_text_tokens,
        "position_embedding_type": "rope",
        "rotary_base": model.rope_theta,
        "rope_scaling": model.rope_scaling_factor is not None,
        "rope_scaling_factor": model.rope_scaling_factor or 1.0,
        "share_embeddings_and_output_weights": model.tie_embeddings,
    }
