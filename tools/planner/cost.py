"""How long a training step takes: products at a rate, memory traffic, messages, and what pipelines wait for.

Flows in: a Machine, a Layout and the work of one micro-batch; out: seconds of a step, by what they are spent on. The formulas
are in docs/planner.md, in the order of this file. No torch, no measurement: arithmetic on a dozen numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

from himix_megatron.config import ModelConfig, Part
from himix_megatron.costs.flops import Layer, Product, Work
from tools.planner.machine import Machine

LOGIT_BYTES = 12
"""Memory traffic of the loss for each logit, forward and backward, beside the products': in 16 bits it is read twice for the
loss, written over by its gradient, and read and written once more where that is scaled. Counted, not measured."""
GRADIENT_BYTES = 12
"""Memory traffic of each gradient besides the optimizer's: zeroed before a step (4), scaled after it (8)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How ranks share the model and its training."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    data: int
    sequence: bool
    recompute: Literal["none", "selective", "full"]
    chunk_layers: tuple[int, ...]
    """Layers of each model chunk, in the order of the network."""
    vision_chunks: tuple[bool, ...]
    """Whether each of them takes vision."""
    distributed_optimizer: bool = True
    overlap_data: bool = True
    """Gradients are summed while the last backward pass runs."""
    overlap_tensor: float = 0.0
    """Share of tensor communication hidden behind products; ours hides none."""
    split_hops: bool = False
    """Each tensor rank sends its share of the text, as under sequence parallelism."""

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one replica computes in a step."""

    model: ModelConfig
    parts: tuple[Part, ...]
    micro_batch: Work
    """The work as computed, padding included, attention causal."""
    layers: tuple[Layer, ...]
    """What each decoder layer does with it."""
    adapter: tuple[Product, ...] = ()
    """What each chunk that takes vision does in front of its layers."""
    num_micro_batches: int
    number_bytes: int = 2
    """Bytes of a weight or activation."""
    tower_flops: float = 0.0
    """FLOPs of the tower on the replica's images of a step."""
    vocab_size: int
    trained_parameters: float
    """Trained parameters of the rank with the most."""
    fused_attention: bool = True
    """False: scores are written to memory, and full rectangles computed, as before flash attention."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step on the slowest stage's path; they add up to `total`."""

    compute: float
    tower: float
    tensor: float
    pipeline: float
    data: float
    optimizer: float
    bubble: float

    @property
    def total(self) -> float:
        """One step."""
        return sum(float(getattr(self, item.name)) for item in fields(self))


@dataclass(frozen=True, slots=True)
class _Pass:
    """Seconds of one layer (or the head) on one micro-batch."""

    forward: float
    backward: float
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0

    @property
    def compute(self) -> float:
        return self.forward + self.backward

    @property
    def tensor(self) -> float:
        return self.tensor_forward + self.tensor_backward


def product_seconds(
    machine: Machine, rows: float, inner: float, columns: float, number_bytes: int, written: float = 0.0
) -> float:
    """One matrix product: bound by arithmetic or by reading its operands and writing its result; as measured where the machine
    was. `written`: bytes an element of the result costs, where it is not one number."""
    if not rows * inner * columns:
        return 0.0
    flops = 2 * rows * inner * columns
    if machine.products:
        return flops / machine.product_rate(rows, inner, columns) + written * rows * columns / machine.memory_bytes_per_second
    traffic = number_bytes * (rows * inner + inner * columns) + (written or number_bytes) * rows * columns
    return max(flops / machine.product_flops, traffic / machine.memory_bytes_per_second)


def layer_pass(machine: Machine, layout: Layout, job: Job, layer: Layer) -> _Pass:
    """One decoder layer."""
    model, size, ranks, text = job.model, job.number_bytes, layout.tensor, layer.tokens
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    sequence = ranks if layout.sequence else 1
    products = products_pass(machine, layout, job, layer.products)
    mixing = _attention(machine, job, layer, ranks)
    elements = 10 * text * model.hidden_size / sequence + text * (6 * (query + key_value) + 3 * model.ffn_hidden_size) / ranks
    passing = size * elements * (1 + layer.has_block) / machine.passing
    # Keys and values of vision and text are put together for each sample, and their gradients taken apart; measured attention
    # has that in it.
    vision = job.micro_batch.vision_tokens
    joins = layer.joins and vision and not machine.attention
    joined = size * 4 * (text + vision) * key_value / ranks / machine.passing if joins else 0.0
    # The host starts the kernels beside them: a pass takes at least what that takes.
    least = machine.layer_seconds * (1 + layer.has_block)
    forward = max(products.forward + mixing.forward + passing + joined, least)
    again = {"none": 0.0, "selective": mixing.forward, "full": forward}[layout.recompute]
    backward = max(products.backward + mixing.backward + 2 * passing + joined, least) + again
    # Under sequence parallelism the inputs of weight gradients are gathered again.
    once_more = 1.5 if layout.sequence and "language" in job.parts else 1.0
    message = products.tensor_forward
    return _Pass(forward, backward, message, message * (once_more + (layout.recompute == "full")))


def products_pass(machine: Machine, layout: Layout, job: Job, products: tuple[Product, ...]) -> _Pass:
    """Products with weights, and what tensor ranks add up: the outcome of those that share the inner side."""
    size, forward, backward, message = job.number_bytes, 0.0, 0.0, 0.0
    for product in products:
        inner, columns = product.inner, product.columns
        k, n = (inner / layout.tensor, columns) if product.split == "inner" else (inner, columns / layout.tensor)
        forward += product_seconds(machine, product.rows, k, n, size)
        if product.below:
            backward += product_seconds(machine, product.rows, n, k, size)
        if product.weight:  # added to a sum in fp32: read and written
            backward += product_seconds(machine, k, product.rows, n, size, written=8)
        if product.split == "inner" and product.rows:
            message += _all_reduce(machine, size * product.rows * columns, layout.tensor) * (1 - layout.overlap_tensor)
    return _Pass(forward, backward, message, message)


def _attention(machine: Machine, job: Job, layer: Layer, ranks: int) -> _Pass:
    model, text_pairs = job.model, layer.attention[-1].pairs
    heads, width = model.num_attention_heads / ranks, model.channels_per_head
    if job.fused_attention:
        flops = 4 * sum(attention.pairs for attention in layer.attention) * heads * width
        # Pairs of a causal text of s tokens are s (s + 1) / 2: what an average token's sample is long.
        length = max(1.0, 2 * text_pairs / layer.tokens - 1) if layer.tokens else 1.0
        forward, backward = machine.attention_rates(heads, width, length)
        return _Pass(flops / forward, 2.5 * flops / backward)  # scores are computed again
    pairs = 2 * text_pairs  # a causal half is computed like the other
    products = 4 * pairs * heads * width / machine.product_flops
    # Written, scaled and masked to a softmax, dropped out with a mask, read: 13 bytes a score in 16 bits.
    passing = 13 * pairs * heads / machine.memory_bytes_per_second
    return _Pass(products + passing, 2 * (products + passing))


def _all_reduce(machine: Machine, size: float, ranks: int) -> float:
    """Scatter and gather of `size` bytes over a ring of neighbouring ranks."""
    if ranks == 1:
        return 0.0
    rate = machine.link_bytes_per_second if ranks <= machine.node_size else machine.network_bytes_per_second
    return 2 * (size * (ranks - 1) / ranks / rate + machine.latency_seconds)


def head_pass(machine: Machine, layout: Layout, job: Job) -> _Pass:
    """The LM head and the loss; logits are computed once, and their gradient is formed with them."""
    tokens, hidden, rows = job.micro_batch.head_tokens, job.model.hidden_size, job.vocab_size / layout.tensor
    size = job.number_bytes
    losses = LOGIT_BYTES / 2 * tokens * rows / machine.passing
    forward = product_seconds(machine, tokens, hidden, rows, size)
    backward = product_seconds(machine, tokens, rows, hidden, size)
    if "language" in job.parts:
        backward += product_seconds(machine, hidden, tokens, rows, size, written=8)
    message = _all_reduce(machine, size * tokens * hidden, layout.tensor)
    return _Pass(forward + losses, backward + losses, message, message)


def embedding_seconds(machine: Machine, layout: Layout, job: Job) -> float:
    """The embedding's gradient: a table that is zeroed, read, and added to the sum in fp32."""
    if "language" not in job.parts:
        return 0.0
    table = job.vocab_size / layout.tensor * job.model.hidden_size
    return table * (2 * job.number_bytes + 8) / machine.memory_bytes_per_second


def step_time(machine: Machine, layout: Layout, job: Job) -> StepTime:
    """One step of all replicas, which work alike."""
    passes = {layer: layer_pass(machine, layout, job, layer) for layer in dict.fromkeys(job.layers)}
    head, adapter = head_pass(machine, layout, job), products_pass(machine, layout, job, job.adapter)
    stages, count = range(layout.pipeline), job.num_micro_batches
    ends = list(accumulate(layout.chunk_layers, initial=0))
    chunks = [
        [passes[layer] for layer in job.layers[ends[chunk] : ends[chunk + 1]]] + [adapter] * takes
        for chunk, takes in enumerate(layout.vision_chunks)
    ]
    own = [[done for chunk in chunks[stage :: layout.pipeline] for done in chunk] for stage in stages]
    compute = [sum(done.compute for done in own[stage]) for stage in stages]
    tensor = [sum(done.tensor for done in own[stage]) for stage in stages]
    compute[0] += embedding_seconds(machine, layout, job)
    compute[-1], tensor[-1] = compute[-1] + head.compute, tensor[-1] + head.tensor
    slowest = max(stages, key=lambda stage: compute[stage] + tensor[stage])
    others = sum(compute[stage] + tensor[stage] for stage in stages if stage != slowest)
    hop = _hop_seconds(machine, layout, job)
    # A micro-batch crosses each chunk's border forward and backward; plain schedules wait for it, interleaved ones in the fill.
    crossings = 0.0 if layout.pipeline == 1 else 2.0 * (count if layout.virtual_pipeline == 1 else layout.pipeline)
    data, optimizer = _data_seconds(machine, layout, job, window=compute[slowest] * 2 / 3)
    tower = job.tower_flops / (layout.tensor * layout.pipeline) / machine.product_flops
    sweeps = GRADIENT_BYTES * job.trained_parameters / machine.memory_bytes_per_second
    return StepTime(
        compute=count * compute[slowest] + sweeps,
        tower=tower,
        tensor=count * tensor[slowest],
        pipeline=crossings * hop,
        data=data,
        optimizer=optimizer,
        bubble=others / layout.virtual_pipeline,
    )


def _hop_seconds(machine: Machine, layout: Layout, job: Job) -> float:
    shares = layout.tensor if layout.sequence or layout.split_hops else 1
    size = job.number_bytes * job.layers[0].tokens * job.model.hidden_size / shares
    # megatron-core puts data-parallel ranks next to each other and stages far apart.
    within = layout.ranks <= machine.node_size
    return size / (machine.link_bytes_per_second if within else machine.network_bytes_per_second) + machine.latency_seconds


def _data_seconds(machine: Machine, layout: Layout, job: Job, *, window: float) -> tuple[float, float]:
    """Summing gradients over replicas, as far as it cannot hide in `window`; and the optimizer's pass over its states."""
    ranks, number = layout.data, job.trained_parameters
    share = ranks if layout.distributed_optimizer else 1
    states = number / share * (4 + 24 + 2 * job.number_bytes) / machine.memory_bytes_per_second
    if ranks == 1:
        return 0.0, states
    rate = machine.link_bytes_per_second
    if layout.tensor * ranks > machine.node_size:
        # Neighbours of one node share what they send out of it: each has its own network card.
        rate = min(rate, machine.network_bytes_per_second * max(1, machine.node_size // layout.tensor))
    bytes_each = 4 + (job.number_bytes if layout.distributed_optimizer else 4)
    seconds = bytes_each * number * (ranks - 1) / ranks / rate + 2 * machine.latency_seconds
    return max(0.0, seconds - window) if layout.overlap_data else seconds, states
