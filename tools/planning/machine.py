"""What the planner knows about a machine beyond data sheets: how much of its rates real programs reach.

Flows in: a device and a network by name; out: a Machine. `EFFICIENCY` is calibrated on two published rows, one for each
generation (tools/planning/published.py does it again and a test compares); the other constants are round numbers from the
literature, the same for all GPUs, and never fitted. docs/planner.md has them with their sources.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from himix_megatron.devices import DEVICES, device_named, network_named

EFFICIENCY = {"a100": 0.718, "h100": 0.641}
"""Share of the dense peak that large matrix products reach."""
NETWORK_OF = {"a100": "ib-hdr-200", "h100": "ib-ndr-400", "h200": "ib-ndr-400", "b200": "ib-ndr-400"}
"""What joins nodes of 8 where --interconnect says nothing: what their makers sell them with."""
CPU_FILE = Path(__file__).parents[2] / "docs/planner_cpu.json"
"""The measured CPU: `python -m tools.plan --measure` writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Rates as reached, not as printed."""

    name: str
    peak_flops: float
    """What MFU divides by."""
    product_flops: float
    """Of large matrix products."""
    attention_forward: float = 0.65
    """Rate of fused attention, of `product_flops`."""
    attention_backward: float = 0.5
    """The same, backward."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Within a node, one way."""
    network_bytes_per_second: float
    """Between nodes, one way, of one GPU."""
    latency_seconds: float
    """Of one collective."""
    layer_seconds: float
    """Least time of a layer's pass in one direction: the host that starts its kernels takes that long."""
    node_size: int = 8
    memory_gib: float
    cores: int | None = None
    """CPU: cores that all ranks share."""
    alone: float = 1.0
    """CPU: how much faster a rank is while the other cores rest (they may be halves of one)."""


def machine_named(gpu: str, interconnect: str | None, node_size: int = 8) -> Machine:
    """From the tables. Raises: ValueError that lists what is known."""
    if gpu == "cpu":
        return cpu_machine()
    if gpu not in {device.name for device in DEVICES}:
        raise ValueError(f"--gpu is {gpu}: there are {', '.join(device.name for device in DEVICES)}, cpu")
    device = device_named(gpu)
    family = gpu.split("-")[0]
    network = network_named(interconnect or NETWORK_OF[family])
    efficiency = EFFICIENCY["a100" if family == "a100" else "h100"]
    return Machine(
        name=f"{device.name}, {network.name}",
        peak_flops=device.bf16_flops,
        product_flops=efficiency * device.bf16_flops,
        memory_bytes_per_second=0.8 * device.memory_bytes_per_second,
        link_bytes_per_second=0.8 * device.link_bytes_per_second,
        network_bytes_per_second=0.8 * network.bytes_per_second,
        latency_seconds=network.latency_seconds,
        layer_seconds=300e-6,
        node_size=node_size,
        memory_gib=device.memory_gib,
    )


def cpu_machine(file: Path = CPU_FILE) -> Machine:
    """The CPU that was measured. Raises: ValueError where none was."""
    if not file.is_file():
        raise ValueError("--gpu is cpu, but no CPU was measured here: run python -m tools.plan --measure first")
    return Machine(**json.loads(file.read_text())["machine"])
