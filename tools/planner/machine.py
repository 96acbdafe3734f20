"""Machines of the planner: data sheets, and the share of their rates that real programs reach.

Flows in: a device and a network by name, or a file of measured rates; out: a Machine. `EFFICIENCY` is calibrated on two
published rows, one for each generation (tools/planner/published.py does it again and a test compares); the other constants are
round numbers from the literature, the same for all GPUs, and never fitted. docs/planner.md has them with their sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from himix_megatron.costs.hardware import device_named, network_named
from himix_megatron.runtime import typed_json
from himix_megatron.runtime.limits import Positive
from himix_megatron.runtime.untrusted_files import read_regular

EFFICIENCY = {"a100": 0.713, "h100": 0.636}
"""Share of the dense peak that large matrix products reach."""
NETWORK_OF = {"a100": "ib-hdr-200", "h100": "ib-ndr-400", "h200": "ib-ndr-400", "b200": "ib-ndr-400"}
"""Network between nodes of 8 if --interconnect is not given: what vendors sell with these GPUs."""
RETIRED = ("cores", "alone")
"""Fields of machine files written before that described a CPU; they are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Rates as reached, not as printed."""

    name: str
    peak_flops: Positive
    """Dense peak, by which MFU divides."""
    product_flops: Positive
    """Rate of large matrix products, FLOP/s."""
    attention_forward: Positive = 0.65
    """Rate of fused attention as a share of `product_flops`."""
    attention_backward: Positive = 0.5
    """The same, backward."""
    memory_bytes_per_second: Positive
    link_bytes_per_second: Positive
    """Within a node, one way."""
    network_bytes_per_second: Positive
    """Between nodes, one way, of one GPU."""
    latency_seconds: Positive
    """Latency of one collective."""
    layer_seconds: Positive
    """Least time of a layer's pass in one direction: the host that starts its kernels takes that long."""
    node_size: int = 8
    memory_gib: Positive
    products: tuple[tuple[Positive, Positive, Positive, Positive], ...] = ()
    """Measured matrix products: rows, inner size, columns, FLOP/s. Others are read off between them; none: `product_flops`."""
    attention: tuple[tuple[Positive, Positive, Positive, Positive, Positive], ...] = ()
    """Measured attention: query heads, their width, text tokens of a sample, FLOP/s forward and backward (backward counted as
    2.5 times forward). None: `attention_forward` and `attention_backward`."""
    passing_bytes_per_second: Positive | None = None
    """Rate of norms, residuals, rotations and activations, as the cost model counts bytes. None: that of all memory."""

    @property
    def passing(self) -> float:
        """Bytes/s of what only passes through memory."""
        return self.passing_bytes_per_second or self.memory_bytes_per_second

    def product_rate(self, rows: float, inner: float, columns: float) -> float:
        """FLOP/s of a product of this shape."""
        return _between(self.products, (rows, inner, columns))[0] if self.products else self.product_flops

    def attention_rates(self, heads: float, width: float, text_tokens: float) -> tuple[float, float]:
        """FLOP/s of attention, forward and backward."""
        if not self.attention:
            return self.attention_forward * self.product_flops, self.attention_backward * self.product_flops
        forward, backward = _between(self.attention, (heads, width, text_tokens))
        return forward, backward


def _between(table: tuple[tuple[float, ...], ...], shape: tuple[float, ...]) -> list[float]:
    """What a table says of a shape: the measured shapes' values, the nearer by their ratios the heavier."""
    size = len(shape)
    distances = [sum(abs(math.log2(own / wanted)) for own, wanted in zip(row[:size], shape, strict=True)) for row in table]
    nearest = max(min(distances), 1e-3)
    weights = [(nearest / max(distance, 1e-3)) ** 4 for distance in distances]
    return [
        sum(weight * row[column] for weight, row in zip(weights, table, strict=True)) / sum(weights)
        for column in range(size, len(table[0]))
    ]


def machine_named(gpu: str, interconnect: str | None, node_size: int = 8) -> Machine:
    """From the tables. Raises: ValueError that lists what is known."""
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


def machine_of_file(file: Path, interconnect: str | None = None, node_size: int = 8) -> Machine:
    """A machine as it was measured (`python -m tools.gpu_check` writes OUT/machine.json), joined by a network by name.

    Raises: ValueError, one line, for a file that is none, or does not hold a machine.
    """
    where = f"--machine-file {file}"
    try:
        values = typed_json.parse_object(read_regular(file), where).get("machine")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: has no object `machine`; tools.gpu_check writes such a file")
    values = {name: value for name, value in values.items() if name not in RETIRED} | {"node_size": node_size}
    machine = typed_json.build(Machine, values, where, field="machine")
    if interconnect is None:
        return machine
    network = network_named(interconnect)
    return replace(machine, network_bytes_per_second=0.8 * network.bytes_per_second, latency_seconds=network.latency_seconds)
