"""The optimizer and its learning-rate schedule, both megatron-core's.

Flows in: Config and this rank's model chunks; out: an optimizer, and a schedule that is a function of the run's progress.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from ..config import Config, OptimizerConfig
from ..distributed.megatron_config import optimizer_config, optimizer_parts


def build_optimizer(config: Config, model_chunks: list[DistributedDataParallel]) -> Any:
    """AdamW over the trainable parameters, with fp32 main weights under bf16; gradients are clipped by their global norm."""
    return get_megatron_optimizer(optimizer_config(config), model_chunks, use_gloo_process_groups=False)


def apply_settings(settings: OptimizerConfig, optimizer: Any) -> None:
    """Put the configuration's values into every parameter group: a restored optimizer has those of its checkpoint."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = settings.learning_rate, settings.min_learning_rate
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps


def gradient_norm(optimizer: Any) -> Tensor | float:
    """Prepare the gradients for an update; all ranks call it. Returns: their global norm before clipping. With fused kernels
    newer versions of mcore return it on the device, without waiting for it.

    This and `update` do what mcore's `optimizer.step` does without a gradient scaler, so that the norm can be checked in
    between.
    """
    optimizer.prepare_grads()
    norm: Tensor | float = optimizer.get_grad_norm()
    return norm


def update(optimizer: Any, norm: float, clip_norm: float) -> None:
    """Clip the gradients to `clip_norm` (0: no clipping) and step. `norm`: as `gradient_norm` returns it."""
    for part in optimizer_parts(optimizer):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if clip_norm > 0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                clip_norm,
                norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


RESOLUTION = 1 << 30
"""Steps of mcore's scheduler in a run, however long the run is."""


class Schedule:
    """The learning rate as a pure function of the run's progress: a checkpoint stores no schedule."""

    def __init__(self, settings: OptimizerConfig, optimizer: Any):
        self._optimizer = optimizer
        self._mcore = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0 if settings.warmup_fraction else settings.learning_rate,
            max_lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            lr_warmup_steps=int(settings.warmup_fraction * RESOLUTION),
            lr_decay_steps=RESOLUTION,
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=RESOLUTION,
            wd_incr_style="constant",
        )

    def set(self, progress: float) -> float:
        """Set the optimizer's learning rate for a progress from 0 to 1 (the warm-up starts from 0). Returns: the rate."""
        self._mcore.num_steps = min(RESOLUTION, int(progress * RESOLUTION))
        self._mcore.step(0)
        return max(float(group["lr"]) for group in self._optimizer.param_groups)
