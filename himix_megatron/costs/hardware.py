"""Accelerators and networks as their makers state them: peaks for MFU, sizes and rates for the planner.

Flows in: a name, ours (`h100-80gb`) or CUDA's (`NVIDIA H100 80GB HBM3`); out: FLOP/s, bytes, bytes/s. No torch.

Peaks are dense: data sheets print twice these numbers, for matrices half of which is zero. Rates of links are one way, per
accelerator. What a chip reaches of its peak is not here: see docs/planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator."""

    name: str
    words: tuple[str, ...]
    """All of them are in the name by which CUDA calls it."""
    bf16_flops: float
    """Peak of dense bf16 matrix products, FLOP/s."""
    memory_gib: float
    """As the allocator sees it: below the name's, which counts in thousands and before ECC and the driver's share."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """To the others of its node."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What joins nodes."""

    name: str
    bytes_per_second: float
    """Of one accelerator's share."""
    latency_seconds: float
    """Of one message, software included."""
    what: str


DEVICES = (
    Device(
        name="a100-40gb", words=("A100", "40GB"), bf16_flops=312e12, memory_gib=39.4, memory_bytes_per_second=1.555e12,
        link_bytes_per_second=300e9, source="NVIDIA A100 data sheet, SXM4: 312 TFLOP/s dense, NVLink 600 GB/s both ways",
    ),
    Device(
        name="a100-80gb", words=("A100",), bf16_flops=312e12, memory_gib=79.1, memory_bytes_per_second=2.039e12,
        link_bytes_per_second=300e9, source="NVIDIA A100 data sheet, SXM4: 312 TFLOP/s dense, NVLink 600 GB/s both ways",
    ),
    Device(
        name="h100-80gb-pcie", words=("H100", "PCIe"), bf16_flops=756e12, memory_gib=79.1, memory_bytes_per_second=2.0e12,
        link_bytes_per_second=64e9, source="NVIDIA H100 data sheet, PCIe: 1513 TFLOP/s sparse, PCIe 5.0 x16",
    ),
    Device(
        name="h100-94gb-nvl", words=("H100", "NVL"), bf16_flops=835e12, memory_gib=93.1, memory_bytes_per_second=3.9e12,
        link_bytes_per_second=300e9, source="NVIDIA H100 data sheet, NVL: 1671 TFLOP/s sparse, NVLink 600 GB/s both ways",
    ),
    Device(
        name="h100-80gb", words=("H100",), bf16_flops=989e12, memory_gib=79.1, memory_bytes_per_second=3.35e12,
        link_bytes_per_second=450e9, source="NVIDIA H100 data sheet, SXM5: 1979 TFLOP/s sparse, NVLink 900 GB/s both ways",
    ),
    Device(
        name="h200-141gb", words=("H200",), bf16_flops=989e12, memory_gib=139.8, memory_bytes_per_second=4.8e12,
        link_bytes_per_second=450e9, source="NVIDIA H200 data sheet, SXM: 1979 TFLOP/s sparse, NVLink 900 GB/s both ways",
    ),
    Device(
        name="b200-180gb", words=("B200",), bf16_flops=2250e12, memory_gib=178.4, memory_bytes_per_second=8.0e12,
        link_bytes_per_second=900e9, source="NVIDIA HGX B200 data sheet: 36 PFLOP/s sparse for 8, NVLink 1.8 TB/s both ways",
    ),
)  # fmt: skip
"""The narrower names first: the first whose words are all in CUDA's name is meant."""

NETWORKS = (
    Network(name="ib-hdr-200", bytes_per_second=25e9, latency_seconds=10e-6, what="InfiniBand HDR, 200 Gbit/s for each GPU"),
    Network(name="ib-ndr-400", bytes_per_second=50e9, latency_seconds=10e-6, what="InfiniBand NDR, 400 Gbit/s for each GPU"),
    Network(name="ethernet-100", bytes_per_second=1.56e9, latency_seconds=30e-6, what="100 Gbit/s Ethernet for a node of 8"),
    Network(name="ethernet-400", bytes_per_second=6.25e9, latency_seconds=25e-6, what="400 Gbit/s Ethernet for a node of 8"),
)


def device_of(cuda_name: str) -> Device | None:
    """The device that CUDA calls so; None: not known."""
    return next((device for device in DEVICES if all(word.lower() in cuda_name.lower() for word in device.words)), None)


def device_named(name: str) -> Device:
    """By our own name. Raises: ValueError that lists the known ones."""
    return _named(DEVICES, name, "--gpu")


def network_named(name: str) -> Network:
    """By our own name. Raises: ValueError that lists the known ones."""
    return _named(NETWORKS, name, "--interconnect")


_Named = TypeVar("_Named", Device, Network)


def _named(known: tuple[_Named, ...], name: str, flag: str) -> _Named:
    for item in known:
        if item.name == name:
            return item
    raise ValueError(f"{flag} is {name}: there are {', '.join(item.name for item in known)}")
