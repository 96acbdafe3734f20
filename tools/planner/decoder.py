"""One decoder on one GPU: the step that the planner predicts for packs that `tools.gpu_check` measures.

Flows in: a configuration, a step's packs, a Machine; out: seconds of forward and backward, gradients zeroed and scaled.
"""

from __future__ import annotations

from dataclasses import replace

from himix_megatron.config import Config
from himix_megatron.costs.flops import Work
from tools.bench.training import Packs
from tools.planner.cost import step_time
from tools.planner.layouts import job_of, layout_of
from tools.planner.machine import Machine


def predicted_seconds(config: Config, packs: Packs, machine: Machine) -> float:
    """Of a step without optimizer and tower."""
    if config.train.cuda_graphs == "on":
        machine = replace(machine, layer_seconds=0.0)  # the host starts one thing for all layers
    count, work = len(packs.text_lengths), packs.work()
    each = Work(*(getattr(work, name) / count for name in Work.__dataclass_fields__))
    return step_time(machine, layout_of(config, 1), job_of(config, each, count, 0.0)).compute
