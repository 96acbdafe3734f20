"""Models with random weights as exported folders, for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_megatron.config import (
    Config,
    DataConfig,
    InjectionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.text import chat_template

if TYPE_CHECKING:
    from himix_megatron.inference.generator import Answerer, Prompt

SCRIPT = Path(__file__).with_name("plain_transformers.py")
CLIP_PIXELS: dict[str, Any] = {
    "resize": "crop",
    "pixel_mean": (0.48145466, 0.4578275, 0.40821073),
    "pixel_std": (0.26862954, 0.26130258, 0.27577711),
}


def random_config(
    family: Any = "qwen2", tower: Any = "tiny", injection: InjectionConfig | None = None, side: int = 16, **model: Any
) -> Config:
    """2 decoder layers of width 32 and 4 image tokens; the bytes tokenizer."""
    sizes: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
        "vocab_size": 260, "layer_spec": "torch", "init_std": 0.2,
    }  # fmt: skip
    return Config(
        recipe="random",
        model=ModelConfig(family=family, **(sizes | model)),
        vision=VisionConfig(
            tower=tower, image_size=side, patch_size=8, hidden_size=24, num_layers=3, num_attention_heads=2, ffn_hidden_size=40,
            feature_layer=-1 if tower == "tiny" else -2, **(CLIP_PIXELS if tower == "clip" else {}),
        ),
        injection=injection or InjectionConfig(),
        data=DataConfig(template="tiny", max_text_tokens=128),
        train=TrainConfig(trainable_parts=("vision_kv",), global_batch_samples=1, micro_batch_samples=1, precision="fp32"),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )  # fmt: skip


def export_random(config: Config, out: Path, prompts: Sequence[Prompt] = ()) -> tuple[float, float, list[list[int]]]:
    """Export a model with random weights, on this process as the only rank. Returns: the largest differences of logits and
    answers, and our answers to the prompts, of 12 tokens."""
    from himix_megatron.conversion.authors_layout import to_authors
    from himix_megatron.conversion.export.folder import export
    from himix_megatron.conversion.export.parity import fixed_input, himix_outcome, parity
    from himix_megatron.conversion.sharding import gather
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.inference.generator import Answerer

    topology = init_distributed(config.parallel, seed=config.train.seed)
    answerer = Answerer(config, detect(), topology)
    randomise(answerer)
    ours = gather(answerer.model_chunks, lambda parameter: parameter, topology, config.model.vocab_size)
    weights = to_authors(ours, config.model, config.injection) | {
        f"vision_tower.{n}": t for n, t in answerer.tower.state_dict().items()
    }
    given = fixed_input(config)
    outcome = himix_outcome(answerer, given)
    answers = answerer.answer(prompts, (), 12) if prompts else []
    shutdown_distributed()
    export(weights, config, out)
    return *parity(out, config, given, *outcome), answers


def randomise(answerer: Answerer) -> None:
    """Give what starts at 0 or 1 numbers of its own: a wrong use of them must show."""
    import torch

    generator = torch.Generator().manual_seed(6)
    for model_chunk in answerer.model_chunks:
        for name, parameter in model_chunk.named_parameters():
            if parameter.dim() == 1 or "_positions" in name:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def processor_of(out: Path) -> Any:
    """The folder's processor, as a user gets it."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(str(out), trust_remote_code=True)


def ask_elsewhere(folder: Path, dataset: ShardDataset, work: Path) -> list[str]:
    """The answers to all turns of a dataset, in order, by transformers in a process that cannot import this package."""
    asked: list[dict[str, Any]] = []
    for sample in range(len(dataset)):
        files = []
        for k in range(dataset.num_images(sample)):
            files.append(str(work / f"{sample}-{k}"))
            Path(files[-1]).write_bytes(dataset.image_bytes(sample, k))
        messages: list[dict[str, str]] = []
        for question, answer in chat_template.turns_of(dataset.text(sample)):
            messages.append({"role": "user", "content": question})
            asked.append({"messages": list(messages), "images": files})
            messages.append({"role": "assistant", "content": answer})
    (work / "questions.json").write_text(json.dumps(asked))
    command = [sys.executable, "-I", str(SCRIPT), str(folder), str(work / "questions.json"), str(work / "answers.json")]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads((work / "answers.json").read_text())
    return answers
