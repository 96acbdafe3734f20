"""Named runs. Flows out: a Config with every value of one run; `python -m pipelines.pretrain NAME` starts it.

Facts that the published recipes share, and where they come from:

- Training settings: the authors' scripts (github.com/Xuange923/HiMix, `scripts/train/train_llama` and `train_tinyllama`),
  which build on TinyLLaVA Factory. Both stages: images resized to a square (`--image_aspect_ratio square`), features of
  the second-to-last tower layer (`--mm_vision_select_layer -2`), tower frozen, no weight decay, cosine with 3 % warm-up,
  clipping at TinyLLaVA's default norm of 1. align: template `pretrain` (here `plain`), global batch 256 (4 GPUs x 32 x 2,
  or 8 x 32), learning rate 5e-4 (Llama 3.2) or 1e-3 (TinyLlama), vision norms and vision K/V projections only. instruct:
  global batch 128 (4 GPUs x 8 x 4), learning rate 2e-5, language model too. 1 epoch each for Llama 3.2; the TinyLlama
  scripts say 8 epochs of align and 5 of instruct. For Qwen2 and Vicuna no script is public: they take the values that the
  published ones share, and 1 epoch.
- Tower: SigLIP-so400m/14 at 384 pixels for all five (729 tokens of width 1152): the paper (arXiv 2501.10318) names SigLIP,
  its decoder FLOPs come out with exactly these sizes, and it is TinyLLaVA Factory's default. `clip_large_336` is LLaVA-1.5's.
- Templates of instruct: the scripts leave them an argument. TinyLLaVA Factory words all its chats as Vicuna v1 does (`llama`
  with </s>, `qwen2_base` with <|endoftext|> at the end). Here: Vicuna v1 for TinyLlama and Vicuna, and for Llama 3.2 and
  Qwen2 the family's own chat format.
- A text-only sample attends to an all-zero image, as in the authors' code (`model.text_only_vision zero_image`).
- Sizes of the language models: the `config.json` of the Hugging Face repositories named in each docstring.

- With `--parallel.pipeline 2` (4, ...) layers are split so that stages do equal work, the LM head counted, at the 44 and 314
  text tokens that a sample of the two sets has on average: stages come within 1.15 of each other on 2 and 4, but for TinyLlama
  (1.17) and Llama-3.2-1B (1.21) in align on 4, whose layers are too few (tests/costs/test_flops.py).

Paths are where `docs/data.md` puts things; every one can be changed by a flag. The parallel layouts are ours, for nodes of
8 GPUs of 80 GB; the results of the published recipes have not been reproduced here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from himix_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Part,
    TrainConfig,
    VisionConfig,
)

ChatTemplate = Literal["vicuna", "llama3", "chatml"]

QWEN2_0_5B = ModelConfig(
    family="qwen2",
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    vocab_size=151936,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=True,
    text_only_vision="zero_image",
)
TINYLLAMA_1_1B = ModelConfig(
    family="llama",
    num_layers=22,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=32,
    num_query_groups=4,
    vocab_size=32000,
    text_only_vision="zero_image",
)
LLAMA3_2_1B = ModelConfig(
    family="llama",
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    rope_theta=5e5,
    rope_scaling_factor=32.0,
    tie_embeddings=True,
    text_only_vision="zero_image",
)
LLAMA3_2_3B = replace(LLAMA3_2_1B, num_layers=28, hidden_size=3072, num_attention_heads=24)
VICUNA_7B = ModelConfig(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    vocab_size=32000,
    text_only_vision="zero_image",
)
TINY = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=260,
)


def siglip_so400m_384() -> VisionConfig:
    """google/siglip-so400m-patch14-384: 27 layers of width 1152, 729 tokens an image."""
    return VisionConfig(
        tower="siglip",
        path="models/siglip-so400m-patch14-384",
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        num_layers=27,
        num_attention_heads=16,
        ffn_hidden_size=4304,
    )


def clip_large_336() -> VisionConfig:
    """openai/clip-vit-large-patch14-336: 24 layers of width 1024, 576 tokens an image."""
    return VisionConfig(
        tower="clip",
        path="models/clip-vit-large-patch14-336",
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        num_layers=24,
        num_attention_heads=16,
        ffn_hidden_size=4096,
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    )


def tiny_tower() -> VisionConfig:
    """A ViT of 2 layers of width 128 on 48x48 pixels: 36 tokens an image."""
    return VisionConfig(
        tower="tiny",
        image_size=48,
        patch_size=8,
        hidden_size=128,
        num_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=512,
        feature_layer=-1,
    )


def _align(recipe: str, model: ModelConfig, tokenizer: str, *, learning_rate: float, epochs: float = 1.0) -> Config:
    """The paper's first stage on LLaVA-558K: only the vision norms and vision K/V projections train."""
    return Config(
        recipe=recipe,
        model=model,
        vision=siglip_so400m_384(),
        data=DataConfig(
            datasets=("data/llava-558k",),
            tokenizer=f"models/{tokenizer}",
            template="plain",
            max_text_tokens=2048,
            num_workers=8,
        ),
        train=TrainConfig(
            trainable_parts=("vision_kv",),
            epochs=epochs,
            global_batch_samples=256,
            micro_batch_samples=16,
            precision="bf16",
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        # LLaVA-558K's captions have 44 tokens on average.
        parallel=ParallelConfig(distributed_optimizer=True, split="balanced", split_text_tokens=44),
    )


def _instruct(align: Config, *, template: ChatTemplate, epochs: float = 1.0, micro_batch: int, tensor: int = 1) -> Config:
    """The paper's second stage on mix665k: the language model trains too; starts from the align run's weights."""
    return replace(
        align,
        recipe=align.recipe.replace("_align", "_instruct"),
        data=replace(align.data, datasets=("data/mix-665k",), template=template),
        train=replace(
            align.train,
            trainable_parts=("language", "vision_kv"),
            epochs=epochs,
            global_batch_samples=128,
            micro_batch_samples=micro_batch,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        # mix665k's conversations have 314 tokens on average.
        parallel=replace(align.parallel, tensor=tensor, sequence=tensor > 1, split_text_tokens=314),
        checkpoint=CheckpointConfig(init_from=str(align.run_dir)),
    )


def _tiny(recipe: str, parts: tuple[Part, ...], steps: int) -> Config:
    """1.4 million parameters in fp32 on rendered scenes: every part of a run, in seconds on a CPU."""
    return Config(
        recipe=recipe,
        model=TINY,
        vision=tiny_tower(),
        data=DataConfig(template="tiny", max_text_tokens=256, num_workers=0),
        train=TrainConfig(
            trainable_parts=parts, steps=steps, global_batch_samples=64, micro_batch_samples=16, precision="fp32"
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        checkpoint=CheckpointConfig(interval_steps=100),
        log=LogConfig(predictions_interval_steps=50),
    )


def tiny_align() -> Config:
    """1.4M parameters: vision K/V on captions of rendered scenes, on a CPU.

    Command: python -m pipelines.pretrain tiny_align (or torchrun --nproc-per-node 2 ... --parallel.tensor 2)
    Hardware: a CPU; about a minute on one core.
    Expected: the loss falls, but not far: what trains is what the paper trains, and here neither tower nor language model
    knows anything yet (`--train.trainable-parts tower language vision_kv` trains it all).
    Data: rendered on first use under data/scenes when data.datasets is not given.
    """
    return _tiny("tiny_align", ("vision_kv",), steps=200)


def tiny_instruct() -> Config:
    """1.4M parameters: language and vision K/V on questions about scenes, on a CPU.

    Command: python -m pipelines.pretrain tiny_instruct --checkpoint.init-from runs/tiny_align
    Hardware: a CPU; 3 minutes on one core.
    Expected: the form of the answers is learned; with `--train.trainable-parts tower
    language vision_kv` the answers too (seen after 400 steps from nothing: 359 of 360 held-out questions, 60 with shuffled
    images; a learning rate of 2e-3 is too much).
    Data: rendered on first use under data/scenes when data.datasets is not given.
    """
    return _tiny("tiny_instruct", ("language", "vision_kv"), steps=400)


def qwen2_0_5b_align() -> Config:
    """Qwen2-0.5B: vision K/V on LLaVA-558K, 1 epoch at 1e-3.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain qwen2_0_5b_align --checkpoint.init-from DIR
    (DIR: the language model's weights as a checkpoint of ours; without it the language model is random).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 2181 steps; the paper's decoder FLOPs an image fall from 837 to 78 G.
    Sizes: Qwen/Qwen2-0.5B. No script is public: TinyLlama's learning rate.
    """
    return _align("qwen2_0_5b_align", QWEN2_0_5B, "Qwen2-0.5B", learning_rate=1e-3)


def qwen2_0_5b_instruct() -> Config:
    """Qwen2-0.5B: language and vision K/V on mix665k, 1 epoch at 2e-5.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain qwen2_0_5b_instruct
    (starts from runs/qwen2_0_5b_align; --checkpoint.init-from DIR names another).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 5198 steps; not yet reproduced here.
    Sizes: Qwen/Qwen2-0.5B.
    """
    return _instruct(qwen2_0_5b_align(), template="chatml", micro_batch=4)


def tinyllama_1_1b_align() -> Config:
    """TinyLlama-1.1B-Chat: vision K/V on LLaVA-558K, 8 epochs at 1e-3.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain tinyllama_1_1b_align --checkpoint.init-from DIR
    (DIR: the language model's weights as a checkpoint of ours; without it the language model is random).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 17442 steps; the paper's decoder FLOPs an image fall from 1750 to 161 G.
    Sizes: TinyLlama/TinyLlama-1.1B-Chat-v1.0.
    """
    return _align("tinyllama_1_1b_align", TINYLLAMA_1_1B, "TinyLlama-1.1B-Chat-v1.0", learning_rate=1e-3, epochs=8.0)


def tinyllama_1_1b_instruct() -> Config:
    """TinyLlama-1.1B-Chat: language and vision K/V on mix665k, 5 epochs at 2e-5.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain tinyllama_1_1b_instruct
    (starts from runs/tinyllama_1_1b_align; --checkpoint.init-from DIR names another).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 25989 steps; not yet reproduced here.
    Sizes: TinyLlama/TinyLlama-1.1B-Chat-v1.0.
    """
    return _instruct(tinyllama_1_1b_align(), template="vicuna", epochs=5.0, micro_batch=8)


def llama3_2_1b_align() -> Config:
    """Llama-3.2-1B: vision K/V on LLaVA-558K, 1 epoch at 5e-4.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain llama3_2_1b_align --checkpoint.init-from DIR
    (DIR: the language model's weights as a checkpoint of ours; without it the language model is random).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 2181 steps; the paper's decoder FLOPs an image fall from 2040 to 192 G.
    Sizes: meta-llama/Llama-3.2-1B.
    """
    return _align("llama3_2_1b_align", LLAMA3_2_1B, "Llama-3.2-1B", learning_rate=5e-4)


def llama3_2_1b_instruct() -> Config:
    """Llama-3.2-1B: language and vision K/V on mix665k, 1 epoch at 2e-5.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain llama3_2_1b_instruct
    (starts from runs/llama3_2_1b_align; --checkpoint.init-from DIR names another).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 5198 steps; not yet reproduced here.
    Sizes: meta-llama/Llama-3.2-1B.
    """
    return _instruct(llama3_2_1b_align(), template="llama3", micro_batch=4)


def llama3_2_3b_align() -> Config:
    """Llama-3.2-3B: vision K/V on LLaVA-558K, 1 epoch at 5e-4.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain llama3_2_3b_align --checkpoint.init-from DIR
    (DIR: the language model's weights as a checkpoint of ours; without it the language model is random).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 2181 steps; not yet reproduced here.
    Sizes: meta-llama/Llama-3.2-3B.
    """
    return _align("llama3_2_3b_align", LLAMA3_2_3B, "Llama-3.2-3B", learning_rate=5e-4)


def llama3_2_3b_instruct() -> Config:
    """Llama-3.2-3B: language and vision K/V on mix665k, 1 epoch at 2e-5.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain llama3_2_3b_instruct
    (starts from runs/llama3_2_3b_align; --checkpoint.init-from DIR names another).
    Hardware: one node of 8 GPUs of 80 GB, TP2.
    Expected: 5198 steps; not yet reproduced here.
    Sizes: meta-llama/Llama-3.2-3B.
    """
    return _instruct(llama3_2_3b_align(), template="llama3", micro_batch=4, tensor=2)


def vicuna_7b_align() -> Config:
    """vicuna-7b-v1.5: vision K/V on LLaVA-558K, 1 epoch at 5e-4.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain vicuna_7b_align --checkpoint.init-from DIR
    (DIR: the language model's weights as a checkpoint of ours; without it the language model is random).
    Hardware: one node of 8 GPUs of 80 GB.
    Expected: 2181 steps; not yet reproduced here.
    Sizes: lmsys/vicuna-7b-v1.5. No script is public: Llama 3.2's learning rate.
    """
    return _align("vicuna_7b_align", VICUNA_7B, "vicuna-7b-v1.5", learning_rate=5e-4)


def vicuna_7b_instruct() -> Config:
    """vicuna-7b-v1.5: language and vision K/V on mix665k, 1 epoch at 2e-5.

    Command: torchrun --nproc-per-node 8 -m pipelines.pretrain vicuna_7b_instruct
    (starts from runs/vicuna_7b_align; --checkpoint.init-from DIR names another).
    Hardware: one node of 8 GPUs of 80 GB, TP2.
    Expected: 5198 steps; not yet reproduced here.
    Sizes: lmsys/vicuna-7b-v1.5.
    """
    return _instruct(vicuna_7b_align(), template="vicuna", micro_batch=4, tensor=2)


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        tiny_align,
        tiny_instruct,
        qwen2_0_5b_align,
        qwen2_0_5b_instruct,
        tinyllama_1_1b_align,
        tinyllama_1_1b_instruct,
        llama3_2_1b_align,
        llama3_2_1b_instruct,
        llama3_2_3b_align,
        llama3_2_3b_instruct,
        vicuna_7b_align,
        vicuna_7b_instruct,
    )
}
"""Every recipe by name: FAMILY_STAGE."""
