"""Convert weights between Hugging Face folders, the authors' layout and checkpoints of this project.

    python -m tools.convert hf-to-himix --language models/Qwen2-0.5B --vision models/siglip-so400m-patch14-384 --out runs/start
    python -m tools.convert himix-to-hf runs/qwen2_0_5b_instruct --out exported
    python -m tools.convert himix-to-authors runs/qwen2_0_5b_instruct --out authors
    python -m tools.convert authors-to-himix authors --out runs/start

Every conversion ends with a printed comparison of what it wrote and what it read. The output gets its name only after that, so
that a failure leaves nothing behind. It runs in one process; see docs/conversion.md. Exit code 1 if the two sides differ, 2 for
folders that cannot be converted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from himix_megatron.runtime.process import bulk_import
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word

PROGRAM = "python -m tools.convert"


@dataclass(frozen=True, kw_only=True)
class HfToHimix:
    """A Llama or Qwen2 folder and a SigLIP or CLIP folder to a checkpoint that any recipe of these sizes starts from."""

    language: Path
    """Folder of the language model: config.json and safetensors."""
    vision: Path
    """Folder of the vision tower, or of a whole SigLIP or CLIP model."""
    out: Path
    """Run folder to create, for --checkpoint.init-from."""
    vision_kv_init: Literal["random", "from-text"] = "random"
    """Start of the vision norms and K/V projections. `random`: norms 1, projections normal with the model's own deviation.
    `from-text`: each layer's own norm and K/V, as if features were text states; a narrower tower takes the first columns,
    scaled by the root of the widths' ratio to keep the length of keys and values; a wider one is refused. Adapters, blocks and
    all else that a method adds start in one way: gates and positions 0, the rest as in `random`."""
    method: str | None = None
    """Published method whose start it is: a name as training's --method takes it. None: the recipe's choices, or HiMix."""
    recipe: str | None = None
    """Recipe for all settings but the sizes, which must be these. None: plain settings, enough to evaluate and generate."""
    feature_layer: int | None = None
    """Hidden state of the tower to use as features. None: the recipe's, or -2."""
    seed: int = 1234
    """Seed of what starts at random."""


@dataclass(frozen=True, kw_only=True)
class HimixToHf:
    """A checkpoint to a folder that transformers loads without this package, with tokenizer, processor and generation."""

    checkpoint: Annotated[Path, Word("RUN")]
    """Run folder or checkpoints/step-... folder."""
    out: Path
    """Folder to create."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. None: the run's own."""


@dataclass(frozen=True, kw_only=True)
class HimixToAuthors:
    """A checkpoint to the layout of the published implementation."""

    checkpoint: Annotated[Path, Word("RUN")]
    """Run folder or checkpoints/step-... folder."""
    out: Path
    """Folder to create."""


@dataclass(frozen=True, kw_only=True)
class AuthorsToHimix:
    """Weights in the layout of the published implementation to a checkpoint."""

    weights: Annotated[Path, Word("WEIGHTS")]
    """Folder with config.json and safetensors, or one safetensors file whose metadata holds the sizes."""
    out: Path
    """Run folder to create, for --checkpoint.init-from."""
    vision: Path | None = None
    """Folder of the vision tower, where the weights hold none."""
    recipe: str | None = None
    """As in hf-to-himix."""
    feature_layer: int | None = None
    """As in hf-to-himix; of --vision."""


COMMANDS: dict[str, Any] = {
    "hf-to-himix": HfToHimix,
    "himix-to-hf": HimixToHf,
    "himix-to-authors": HimixToAuthors,
    "authors-to-himix": AuthorsToHimix,
}


def main() -> int:
    """The command line. Returns: the exit code."""
    name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [--help]\n")
        for command, settings in COMMANDS.items():
            print(f"  {command:<17} {settings.__doc__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"{name or 'nothing'} is no conversion: wanted one of {', '.join(COMMANDS)} ({PROGRAM} --help)")
    arguments = parse_settings(COMMANDS[name], words, f"{PROGRAM} {name}")
    with bulk_import():  # torch and transformers: after the flags are checked
        from himix_megatron.conversion.parity import DiffersError
        from tools import conversions

    conversions.quiet()
    try:
        getattr(conversions, name.replace("-", "_"))(arguments)
    except DiffersError as difference:
        print(f"error: the two sides differ, and the output was removed: {difference}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
