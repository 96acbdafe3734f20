"""Does this HiMix agree numerically with the authors' code, for a layout and a layer backend?

Loads a reference file (weights, inputs, logits, loss and gradients of the authors' implementation in float64) into the
Megatron model in this layout, runs forward and backward through training's schedule, and prints the largest differences.
Starts its own ranks.

    python -m tools.compare_reference tests/data/reference/llama_gqa.safetensors --tensor 2 --pipeline 2

Exit code 1 above 2e-5 on the logits (where the mask is 1) or the loss, or above 1e-5 of a gradient's own norm.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from himix_megatron.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig, VisionConfig, check_known
from himix_megatron.config.families import FAMILIES
from himix_megatron.conversion.huggingface import language_config
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.distributed.launch import ensure_ranks
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word

LOGITS_LIMIT = LOSS_LIMIT = 2e-5
GRADIENT_LIMIT = 1e-5
"""Largest error, relative to the gradient's own norm."""


@dataclass(frozen=True)
class Arguments:
    """Compare the Megatron model with a reference file."""

    file: Annotated[Path, Word("FILE")]
    """The .safetensors reference file."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks per stage."""
    sequence_parallel: bool = False
    """Split activations along the text; the text is padded to a multiple of --tensor."""
    layer_spec: Literal["auto", "te", "torch"] = "torch"
    """Layer backend."""


@dataclass(frozen=True)
class Reference:
    """A reference file's content."""

    sizes: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {n.removeprefix("weight."): t for n, t in self.tensors.items() if n.startswith("weight.")}

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {n.removeprefix("grad."): t for n, t in self.tensors.items() if n.startswith("grad.")}


def read(path: Path) -> Reference:
    """Raises: ValueError for a file that is not of this layout."""
    try:
        with safe_open(path, framework="pt") as file:
            sizes = json.loads((file.metadata() or {})["config"])
            reference = Reference(sizes, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no reference file: {type(error).__name__} {error}") from None
    wanted = {"input_ids", "attention_mask", "labels", "vision", "logits", "loss"}
    if not wanted <= reference.tensors.keys():
        raise ValueError(f"{path} is no reference file: it lacks {', '.join(sorted(wanted - reference.tensors.keys()))}")
    mask = reference.tensors["attention_mask"]
    if (mask.diff(dim=1) > 0).any():
        raise ValueError(f"{path}: attention_mask must be right-padded (ones, then zeros)")
    return reference


def configuration(arguments: Arguments, reference: Reference) -> Config:
    """The run that the reference file describes, in the layout of the arguments."""
    sizes = reference.sizes
    check_known("model.family", sizes["family"], FAMILIES)
    language = language_config({**sizes, "model_type": sizes["family"]}, arguments.file)
    vision_tokens, vision_width = reference.tensors["vision"].shape[1:]
    return Config(
        recipe="reference",
        model=replace(language, layer_spec=arguments.layer_spec),
        # The features come from the file: the tower's own sizes play no part.
        vision=VisionConfig(
            tower="tiny", image_size=vision_tokens, patch_size=1, hidden_size=vision_width, num_layers=2,
            num_attention_heads=1, ffn_hidden_size=1,
        ),
        data=DataConfig(template="plain", max_text_tokens=sizes["max_position_embeddings"]),
        train=TrainConfig(
            trainable_parts=("language", "vision_kv"), global_batch_samples=1, micro_batch_samples=1, precision="fp32"),
        optimizer=OptimizerConfig(learning_rate=1.0),
        parallel=ParallelConfig(
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            virtual_pipeline=arguments.virtual_pipeline,
            sequence=arguments.sequence_parallel,
        ),
    )  # fmt: skip


def stage_inputs(config: Config, reference: Reference, device: torch.device) -> list[Any]:
    """One micro-batch a row; rows without a label are added where the interleaved schedule wants a multiple."""
    from himix_megatron.model.stage_input import StageInput

    ids, labels, vision = (reference.tensors[name] for name in ("input_ids", "labels", "vision"))
    num_rows, length = ids.shape
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    pad = -length % multiple
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1 + pad), value=-100)
    ids = torch.nn.functional.pad(ids, (0, pad))
    rows = [(ids[r : r + 1], shifted[r : r + 1], vision[r : r + 1]) for r in range(num_rows)]
    if config.parallel.virtual_pipeline > 1:
        silent = (ids[:1], torch.full_like(shifted[:1], -100), vision[:1])
        rows += [silent] * (-num_rows % config.parallel.pipeline)
    return [
        StageInput(
            text_ids=row_ids.to(device),
            labels=row_labels.to(device),
            images=row_vision[0].to(device, torch.float32),
            blank=torch.zeros(1, dtype=torch.bool, device=device),
            image_table=ImageTable.of_features([[row_vision.shape[1]]]),
        )
        for row_ids, row_labels, row_vision in rows
    ]


def run_forward_backward(
    config: Config, model_chunks: list[Any], inputs: list[Any], topology: Topology
) -> tuple[Tensor, float]:
    """Run the training schedule. Returns: logits float[rows, S, vocab], and the loss; on every rank."""
    from megatron.core.distributed import finalize_model_grads

    from himix_megatron.inference.generator import whole_vocabulary
    from himix_megatron.model.schedule import run_logits, run_losses

    model_chunks[0].config.finalize_model_grads_func = finalize_model_grads
    collected = run_logits(model_chunks, [replace(given, labels=None) for given in inputs], lambda _, logits: logits)
    reported = run_losses(model_chunks, inputs, forward_only=False)
    results: list[Any] = [None]
    if topology.is_last_stage:
        total, tokens = torch.stack(reported).sum(0).tolist()
        results = [(whole_vocabulary(torch.cat(collected), topology, config.model.vocab_size).cpu(), total / tokens)]
    last = topology.world_size - 1  # the last stage's last tensor rank
    torch.distributed.broadcast_object_list(results, src=last, device=topology.device)
    logits, loss = results[0]
    return logits, loss


def differences(config: Config, reference: Reference) -> dict[str, float]:
    """The largest differences: `logits`, `loss`, and by gradient's name relative to its own norm."""
    from himix_megatron.conversion.authors_layout import from_authors, to_authors
    from himix_megatron.conversion.sharding import gather, scatter
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_model_chunks

    topology = init_distributed(config.parallel, seed=config.train.seed)
    model_chunks = build_model_chunks(config, detect(), topology, torch.nn.Identity())
    scatter(model_chunks, from_authors(reference.weights, config.model), topology)
    for stage in model_chunks:
        stage.zero_grad_buffer()
    inputs = stage_inputs(config, reference, topology.device)
    logits, loss = run_forward_backward(config, model_chunks, inputs, topology)
    gradients = to_authors(gather(model_chunks, lambda p: p.main_grad, topology, config.model.vocab_size), config.model)
    shutdown_distributed()

    expected = reference.tensors["logits"]
    rows, length = expected.shape[:2]
    real = reference.tensors["attention_mask"].bool()
    found = {
        "logits": float((logits[:rows, :length] - expected)[real].abs().max()),
        "loss": abs(loss - float(reference.tensors["loss"])),
    }
    for name, wanted in reference.gradients.items():
        found[name] = float((gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-12))
    return found


def main() -> None:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.compare_reference")
    reference = read(arguments.file)
    config = configuration(arguments, reference)
    ensure_ranks(config.parallel.tensor * config.parallel.pipeline, "tools.compare_reference", sys.argv[1:])
    found = differences(config, reference)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    gradients = {name: value for name, value in found.items() if name not in ("logits", "loss")}
    worst = max(gradients, key=gradients.__getitem__)
    for name, value in gradients.items():
        print(f"gradient  {value:.2e}  {name}")
    print(f"logits    {found['logits']:.2e}  (limit {LOGITS_LIMIT:.0e}, absolute)")
    print(f"loss      {found['loss']:.2e}  (limit {LOSS_LIMIT:.0e}, absolute)")
    print(f"gradients {gradients[worst]:.2e}  (limit {GRADIENT_LIMIT:.0e} of the gradient's norm; worst is {worst})")
    agrees = found["logits"] <= LOGITS_LIMIT and found["loss"] <= LOSS_LIMIT and gradients[worst] <= GRADIENT_LIMIT
    print("agrees" if agrees else "DIFFERS")
    if not agrees:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
