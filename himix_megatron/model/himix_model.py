"""One model chunk of a pipeline stage: megatron-core's GPTModel, whose layers attend to the images.

Flows in: text token ids of a micro-batch (first stage) or hidden states (later ones), and the features of its images, which
every stage that takes up vision receives outside of the pipeline; out: hidden states, or per-token losses (last stage).

Shape letters: B samples, S text tokens, K images of the micro-batch, T their vision tokens, N vision tokens of a sample, V
vision width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from ..config import Config, Part
from ..costs.flops import vision_chunks
from ..costs.memory import vision_input_parameters
from ..data.loading.image_table import ImageTable
from ..distributed.fused_kernels import Kernels
from ..distributed.megatron_config import ddp_config, gpt_arguments, has_fused_loss, overlaps, transformer_config
from ..distributed.topology import Topology
from .attention.kv_cache import KVCache
from .attention.packed_layout import PackedLayout, make_layout
from .initialization import draw_by_name
from .layer_spec import block_spec
from .loss import token_losses
from .towers import Tower
from .vision_input import VisionInput, reduced


def _keep_graph(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


class HiMixModel(GPTModel):  # type: ignore[misc]
    """A chunk's layers; with a trainable tower also its replica of the tower (`tower`), run with gradient where vision is
    taken."""

    def __init__(self, config: Config, kernels: Kernels, topology: Topology, *, chunk: int | None, tower: Tower | None):
        mcore_config = transformer_config(config, kernels)
        first, last = chunk in (None, 0), chunk in (None, config.parallel.virtual_pipeline - 1)
        shares_vision = config.injection.has_shared_parameters and "vision_kv" in config.train.trainable_parts
        is_frozen = tower is None and not shares_vision
        super().__init__(
            mcore_config,
            block_spec(config, mcore_config, kernels, vision_is_frozen=is_frozen, chunk=chunk, stage=topology.pipeline_rank),
            pre_process=topology.is_first_stage and first,
            post_process=topology.is_last_stage and last,
            vp_stage=chunk,
            **gpt_arguments(config),
        )
        if self.pre_process and config.train.recompute == "full":
            # Recomputed layers run without a graph; a frozen embedding's output would tell torch that none is needed.
            self.embedding.register_forward_hook(_keep_graph)
        if self.post_process and overlaps(config):
            # The loss recomputes the head, where mcore adds a weight's gradient straight into its sum without saying so, and
            # the overlapped reduction would miss it.
            self.output_layer.gradient_accumulation_fusion = False
        self.real_vocab_size = config.model.vocab_size
        self.fuses_loss = has_fused_loss(kernels)
        """Whether the cross-entropy is Transformer Engine's."""
        self.labelled: Tensor | None = None
        """`token_losses`' argument of this name, for the pass under way."""
        number = topology.pipeline_rank + (chunk or 0) * config.parallel.pipeline
        takers = [chunk for chunk, takes in enumerate(vision_chunks(config)) if takes]
        self.vision_input = VisionInput(config, self.config, self.pg_collection.tp) if number in takers else None
        """None: the chunk needs no vision."""
        self.injection, self.settings = config.injection, config
        self.has_text_layers = 0 < len(config.injection.injecting_layers(config.model.num_layers)) < config.model.num_layers
        self.replica_numbers = {"tower.": number, "vision_input.": takers.index(number) if number in takers else 0}
        """Of the modules that several chunks have: which of its replicas this chunk's is."""
        if tower is not None:
            self.tower = tower
        for name, parameter in self.named_parameters():
            for prefix, replica in self.replica_numbers.items():
                if name.startswith(prefix):
                    # Counted once in the gradient's norm.
                    parameter.shared = replica > 0

    def forward(
        self,
        text_ids: Tensor,
        images: Tensor,
        blank: Tensor,
        image_table: ImageTable,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        packed_lengths: Sequence[int] | None = None,
        labelled: Tensor | None = None,
        layout: PackedLayout | None = None,
        vision_rows: Tensor | None = None,
    ) -> Tensor:
        """Per-token losses float[B, S] on the last stage (logits float[B, S, vocab/TP] without labels), else hidden states.

        Args:
            text_ids: int64[B, S]; later stages use its shape only.
            images: float[T, V] features, or pixels as `blank_pixels` lays them out where the stage holds the tower.
            blank: bool[K], images that stand for "no image" (all zeros after normalisation); the tower's business.
            image_table: the K images of each sample.
            labels: int64[B, S], -100 for no loss.
            cache: generation: holds the images and all earlier text, after which `text_ids` come; only each sample's last
                token is given logits, float[B, 1, vocab/TP]. The images of this call are not read then.
            packed_lengths: text tokens of each sample, where the text is one row that holds them all; None: a row each.
            labelled: int64[M], which of the B * S labels are not -100, where the host knows it without looking.
            layout: of this micro-batch, where it was made before; None: it is made here.
            vision_rows: int64[T'], where vision stands in the text: which of the B * S tokens each vision token is.
        """
        context = None
        if self.vision_input is not None and (cache is None or cache.is_new):
            features_TV = images
            if hasattr(self, "tower"):
                features_TV = self.tower.features(images, blank, image_table.sizes)
            context = self.vision_input(features_TV, image_table)
        embedded = None
        if vision_rows is not None and self.pre_process:
            assert context is not None
            embedded = self._embed(text_ids, context, vision_rows)
        if cache is not None:
            if context is not None:
                cache.take_context(context)
            return self._continue(text_ids, cache, embedded)
        if layout is None:
            seen = reduced(image_table, self.settings)
            if self.injection.in_sequence:
                seen = ImageTable((0,) * len(seen.per_sample), (), ())
            layout = make_layout(
                text_ids,
                packed_lengths,
                seen,
                self.rotary_pos_emb,
                injection=self.injection,
                has_text_layers=self.has_text_layers,
            )
        self.labelled = labelled
        output: Tensor = super().forward(
            text_ids,
            None,  # positions: rotary, from 0 in every sample
            None,
            decoder_input=embedded,
            labels=labels,
            packed_seq_params=layout,
            extra_block_kwargs={"context": None if self.injection.in_sequence else context},
        )
        return output

    def _embed(self, text_ids: Tensor, vision_TH: Tensor, vision_rows: Tensor) -> Tensor:
        """float[S, B, H] (S/TP with sequence parallelism): the text's embedding, with the vision tokens at their rows."""
        num_rows, num_text = text_ids.shape
        text_SBH: Tensor = self.embedding(input_ids=text_ids, position_ids=None)
        at = vision_rows % num_text * num_rows + vision_rows // num_text  # where they lie in [S, B]
        vision_SBH = vision_TH.new_zeros(num_text * num_rows, vision_TH.shape[1]).index_copy(0, at, vision_TH)
        vision_SBH = vision_SBH.view(num_text, num_rows, -1).to(text_SBH.dtype)
        is_vision = torch.zeros(num_text * num_rows, dtype=torch.bool, device=at.device).index_fill(0, at, True)
        is_vision = is_vision.view(num_text, num_rows, 1)
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            vision_SBH = scatter_to_sequence_parallel_region(vision_SBH, group=group)
            is_vision = is_vision.chunk(group.size())[group.rank()]
        return torch.where(is_vision, vision_SBH, text_SBH)

    def _continue(self, text_ids: Tensor, cache: KVCache, embedded: Tensor | None) -> Tensor:
        """Logits of each sample's last token, or hidden states, of text that goes on where the cache ends."""
        cache.begin_pass(self.rotary_pos_emb)
        with self._head_on(cache.last):
            output: Tensor = super().forward(
                text_ids, None, None, decoder_input=embedded, extra_block_kwargs={"context": cache}
            )
        return output

    def _head_on(self, last_B: Tensor) -> AbstractContextManager[Any]:
        """Within it the head sees one token of each sample: on all of a prompt it would cost more than small decoders do."""
        if not self.post_process:
            return nullcontext()

        def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_SBH, *others = inputs
            return hidden_SBH[last_B, torch.arange(len(last_B), device=last_B.device)][None], *others

        handle: AbstractContextManager[Any] = self.output_layer.register_forward_pre_hook(pick)
        return handle

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """mcore's end of the forward pass; with labels, the losses without ever holding all logits."""
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
            return output
        head, group = self.output_layer, self.pg_collection.tp
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else head.weight
        if self.config.sequence_parallel:
            # Each rank's gradient is already whole: the head sums it over the ranks.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False, group=group)

        def losses_of(hidden_m1H: Tensor, labels_m1: Tensor) -> Tensor:
            with as_recomputed(head):
                logits_m1W, _ = head(hidden_m1H, weight=weight)
            return self.cross_entropy(self.hide_padding(logits_m1W), labels_m1)

        return token_losses(
            hidden_states, labels, losses_of, num_logits=len(weight), labelled=self.labelled, keeps=self.fuses_loss
        )

    def cross_entropy(self, logits_m1W: Tensor, labels_m1: Tensor) -> Tensor:
        """float32[m, 1], 0 where the label is -100. The backward pass of Transformer Engine's writes over the logits."""
        group = self.pg_collection.tp
        if not self.fuses_loss or not len(labels_m1):
            losses_m1: Tensor = vocab_parallel_cross_entropy(logits_m1W, labels_m1)
            return losses_m1.masked_fill(labels_m1 < 0, 0.0)
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        ranks = group if group.size() > 1 else None
        losses_m1 = parallel_cross_entropy(logits_m1W, labels_m1, dist_process_group=ranks, overwrite_input=True)
        return losses_m1

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All but the tower's, by their names in the whole model."""
        for name, parameter in self.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, number, rest = name.split(".", 3)
                name = f"decoder.layers.{self.decoder.layers[int(number)].layer_number - 1}.{rest}"
            if not name.startswith("tower."):
                yield name, parameter

    def hide_padding(self, logits_SBW: Tensor) -> Tensor:
        """Logits of this rank's share W of the vocabulary, with the rows that only pad it made impossible."""
        first = self.pg_collection.tp.rank() * logits_SBW.shape[-1]
        real = max(0, min(logits_SBW.shape[-1], self.real_vocab_size - first))
        if real < logits_SBW.shape[-1]:
            logits_SBW[..., real:] = torch.finfo(logits_SBW.dtype).min
        return logits_SBW

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """mcore's sharded state; replicas of what several chunks have are marked as such, so one is saved."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in state.items():
            for module, replica in self.replica_numbers.items():
                if name.startswith(prefix + module):
                    tensor.replica_id = (replica, *tensor.replica_id[1:])
        return state


@contextmanager
def as_recomputed(head: Any) -> Iterator[None]:
    """Within it the head, a column-parallel layer, can be run under `checkpoint` on the same whole input on every tensor rank:
    without sequence parallelism, and without adding to its weight's gradient sum behind autograd's back. (Run again, it sees
    a copy of the weight, and could not tell megatron-core that it did; a gradient is then missed where reduction overlaps.)
    """
    before = head.sequence_parallel, head.allreduce_dgrad, head.gradient_accumulation_fusion
    head.sequence_parallel, head.allreduce_dgrad, head.gradient_accumulation_fusion = False, head.tp_group.size() > 1, False
    try:
        yield
    finally:
        head.sequence_parallel, head.allreduce_dgrad, head.gradient_accumulation_fusion = before


def finalize_gradients(model_chunks: list[Any], num_tokens: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
    """mcore's last step on gradients; before it, those of the replicas of the tower and of what vision goes through in front of
    the layers are summed over chunks and pipeline stages.

    mcore would do that sum after its reduction over data ranks, which a distributed optimizer cuts at other places on each
    stage: it would add reduced parts to unreduced ones.
    """
    models = [unwrap_model(model_chunk) for model_chunk in model_chunks]
    _sum_over_replicas([model.tower for model in models if hasattr(model, "tower")], models[0], 0)
    if "vision_kv" in models[0].settings.train.trainable_parts:
        shared = [model.vision_input for model in models if model.vision_input is not None]
        number = int(vision_input_parameters(models[0].settings, models[0].settings.parallel.tensor))
        _sum_over_replicas(shared, models[0], number)
    finalize_model_grads(model_chunks, num_tokens, *args, **kwargs)


def _sum_over_replicas(replicas: Sequence[nn.Module], model: HiMixModel, number: int) -> None:
    """`number`: of the parameters, on a stage that has no replica and others may have."""
    if model.pg_collection.pp.size() * model.settings.parallel.virtual_pipeline == 1:
        return  # there is one
    each = [[parameter for parameter in replica.parameters() if parameter.requires_grad] for replica in replicas]
    if not (any(each) or number):
        return
    sums = [torch.stack([p.main_grad for p in same]).sum(0) for same in zip(*each, strict=True)]
    flat = torch.cat([tensor.flatten() for tensor in sums] or [torch.zeros(number, device=next(model.parameters()).device)])
    torch.distributed.all_reduce(flat, group=model.pg_collection.pp)
    totals = torch.split(flat, [tensor.numel() for tensor in sums]) if sums else ()
    for same, total in zip(zip(*each, strict=True), totals, strict=True):
        for parameter in same:
            parameter.main_grad.copy_(total.view_as(parameter.main_grad))


def part_of(name: str) -> Part:
    """Which part of the model a parameter belongs to, by its name."""
    if name.startswith("tower."):
        return "tower"
    return "vision_kv" if "vision_" in name else "language"


def build_model_chunks(
    config: Config, kernels: Kernels, topology: Topology, tower: nn.Module, *, trains: bool = True
) -> list[Any]:
    """This rank's model chunks (one, or `virtual_pipeline`), frozen as `train.trainable_parts` says.

    The tower goes in only where it trains; a frozen one belongs to the ShardedVisionEncoder. Without `trains` everything is
    frozen and no gradient buffers are made.
    """
    torch.manual_seed(config.train.seed + 100 * topology.pipeline_rank)
    num_chunks = config.parallel.virtual_pipeline
    chunks = []
    for chunk in range(num_chunks):
        # Each chunk runs the tower for itself, so each needs its replica.
        own_tower: Any = copy.deepcopy(tower) if "tower" in config.train.trainable_parts else None
        model = HiMixModel(config, kernels, topology, chunk=chunk if num_chunks > 1 else None, tower=own_tower)
        if config.train.initialization == "by_name":
            draw_by_name(model.global_parameters(), config, topology.tensor_rank)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains and part_of(name) in config.train.trainable_parts)
        chunks.append(_wrap(config, model.to(topology.device), trains=trains, first=chunk == 0))
    return chunks


def unwrap_model(model_chunk: Any) -> HiMixModel:
    """The model inside mcore's wrappers (data parallelism, bf16)."""
    while not isinstance(model_chunk, HiMixModel):
        model_chunk = model_chunk.module
    return model_chunk


def gather_parameters(model_chunks: list[Any]) -> None:
    """Complete the all-gather of updated parameters, which overlap leaves to the next forward pass."""
    for model_chunk in model_chunks:
        if model_chunk.ddp_config.overlap_param_gather:
            model_chunk.start_param_sync(force_sync=True)


def _wrap(config: Config, model: HiMixModel, *, trains: bool, first: bool) -> Any:
    mcore_config = model.config
    wrapped = Float16Module(mcore_config, model) if mcore_config.bf16 else model
    if not trains:
        return wrapped
    for module in model.modules():
        # Transformer Engine's linear layers can add a weight's gradient straight into its fp32 sum; megatron-core's own setting
        # would ask the same of layers that need Apex for it.
        if hasattr(module, "fuse_wgrad_accumulation") and not hasattr(module, "has_second_use"):
            module.fuse_wgrad_accumulation = True
    if config.train.cuda_graphs == "on":
        # Gradients are added up on the stream where this wrapper is made: a graph's recording must not leave its own.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model_chunk = DistributedDataParallel(mcore_config, ddp_config(config), wrapped, disable_bucketing=not first)
        torch.cuda.current_stream().wait_stream(stream)
        model_chunk.graph_stream = stream
    else:
        model_chunk = DistributedDataParallel(mcore_config, ddp_config(config), wrapped, disable_bucketing=not first)
    if model_chunk.ddp_config.overlap_param_gather:
        # mcore waits for a parameter when its own module runs; ours also read a module's weight without running it.
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(partial(_wait_for_parameters, model_chunk))
    return model_chunk


def _wait_for_parameters(model_chunk: Any, layer: nn.Module, _: Any) -> None:
    for parameter in layer.parameters():
        if parameter in model_chunk.param_to_bucket_group:
            model_chunk.param_to_bucket_group[parameter].finish_param_sync()
