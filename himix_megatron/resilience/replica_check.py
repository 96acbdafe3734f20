"""Checks that replicas hold the same weights bit for bit.

Flows in: tensors; out: a 64-bit hash of each: the sum over its elements' bits as integers, each times an odd number derived
from its index, so that the order of summation does not matter, on any device. One changed bit always changes it; two changes
cancel with a probability of about 2^-64. A comparison costs two small collectives.

Without it a replica with wrong weights (a flipped bit, a wrong sum on one card) goes unnoticed: its gradients are averaged in.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.topology import Topology
from ..model.himix_model import gather_parameters, unwrap_model

_CHUNKS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements widened at once: what stays in a core's cache (6 times as fast as with 64 times as many), or fills a GPU."""
_ODD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number: multiples of it spread evenly."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bitwise_hash(tensor: Tensor) -> Tensor:
    """int64 scalar: hash of a tensor's bits and their positions."""
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view(_BITS[flat.element_size()])
    chunk = min(len(bits), _CHUNKS[tensor.device.type])
    places = torch.arange(chunk, device=tensor.device).mul_(_ODD)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, len(bits), max(chunk, 1)):
        part = bits[first : first + chunk]
        # Products and sums wrap around, as unsigned 64-bit numbers would. Odd factors lose no bit.
        factors = (places[: len(part)] + _wrapped(first * _ODD)).bitwise_or_(1)
        total += factors.mul_(part).sum()
    return total


def _wrapped(number: int) -> int:
    """As a signed 64-bit number."""
    return (number + 2**63) % 2**64 - 2**63


def check_replica_weights(topology: Topology, model_chunks: list[Any], tower: nn.Module | None) -> str | None:
    """Compare parameters among the ranks that should hold the same: all of them among data ranks, those that tensor parallelism
    does not split among tensor ranks, a frozen tower among data ranks. All ranks call it.

    Returns: which rank differs in which parameter, the same line on every rank; None: all agree.
    """
    gather_parameters(model_chunks)
    named = [
        (f"{i}.{name}" if len(model_chunks) > 1 else name, p)
        for i, s in enumerate(model_chunks)
        for name, p in unwrap_model(s).named_parameters()
    ]
    whole = [(name, p) for name, p in named if not getattr(p, "tensor_model_parallel", False)]
    if tower is not None:
        named += [(f"tower.{name}", p) for name, p in tower.named_parameters() if p.device.type == topology.device.type]
    # Both on every rank, also after a difference in the first: the peers in the second may have found none.
    apart = _compare(named, topology.data, topology), _compare(whole, topology.tensor, topology)
    found = apart[0] or apart[1]
    gathered: list[str | None] = [None] * topology.world_size
    differs = torch.tensor(float(found is not None), device=topology.device)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return None
    dist.all_gather_object(gathered, found)
    return next(line for line in gathered if line is not None)


def _compare(named: list[tuple[str, Tensor]], group: Any, topology: Topology) -> str | None:
    """What differs within a group, the same line on all its ranks."""
    if dist.get_world_size(group) == 1 or not named:
        return None
    hashes = torch.stack([bitwise_hash(parameter).to(topology.device) for _, parameter in named])
    low, high = hashes.clone(), hashes.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    odd = (low != high).nonzero().flatten().tolist()
    if not odd:
        return None
    everybody = [torch.empty_like(hashes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, hashes, group=group)
    values = [int(own[odd[0]]) for own in everybody]
    ranks = dist.get_process_group_ranks(group)
    (common, count), *_ = Counter(values).most_common()
    apart = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
    who = f"rank {apart[0]}" if len(apart) == 1 else f"ranks {apart[:8]}"
    if 2 * count <= len(ranks):
        who = f"one of ranks {ranks[:8]}"
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"{who} holds other bits than its replicas in {named[odd[0]][0]}{more}"
