"""The optimizer and its learning-rate schedule, both megatron-core's.

Flows in: Config and this rank's model chunks; out: an optimizer to step and a schedule that is a function of samples seen.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from ..config import Config
from ..distributed.megatron_config import optimizer_config, optimizer_parts


def build_optimizer(config: Config, stages: list[DistributedDataParallel]) -> Any:
    """AdamW over the parameters that train, with fp32 main weights under bf16; gradients clipped by global norm."""
    return get_megatron_optimizer(optimizer_config(config), stages, use_gloo_process_groups=False)


def apply_settings(config: Config, optimizer: Any) -> None:
    """Make the configuration's values hold in every parameter group: a restored optimizer brings its old ones along."""
    settings = config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = settings.learning_rate, settings.min_learning_rate
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps


def gradient_norm(optimizer: Any) -> Tensor | float:
    """Make the gradients ready for an update. Returns: their global norm, before clipping; all ranks call it. With fused
    kernels newer versions of mcore leave it on the device, for which nobody has waited then.

    With `update` it does what mcore's `optimizer.step` does, which without a gradient scaler takes any gradient: here somebody
    can look at the norm in between.
    """
    optimizer.prepare_grads()
    norm: Tensor | float = optimizer.get_grad_norm()
    return norm


def update(optimizer: Any, norm: float, clip_norm: float) -> None:
    """Clip the gradients to `clip_norm` (0: not), and take the optimizer's step. `norm`: what `gradient_norm` gave."""
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
"""Parts into which a run's length is divided for the schedule."""


class Schedule:
    """The learning rate as a pure function of the part of the run that is done: a checkpoint needs to store no schedule."""

    def __init__(self, config: Config, optimizer: Any):
        settings = config.optimizer
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
        """Put the optimizer at the rate that holds at this part of the run, 0 to 1 (the warm-up starts from 0); returns it."""
        self._mcore.num_steps = min(RESOLUTION, int(progress * RESOLUTION))
        self._mcore.step(0)
        return max(float(group["lr"]) for group in self._optimizer.param_groups)
