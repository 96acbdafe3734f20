"""The conversions of tools.convert: what they read, write and compare.

Every conversion ends with a comparison of what it wrote and what it read. The output has its name only after that: whatever
goes wrong, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import re
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from himix_megatron.checkpoint.description import architecture, check_architecture
from himix_megatron.checkpoint.manifest import find_checkpoint, verify_checkpoint
from himix_megatron.config import (
    METHODS,
    Config,
    DataConfig,
    InjectionConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
    check_known,
    differences,
)
from himix_megatron.config.families import FAMILIES
from himix_megatron.config.injection import HIMIX
from himix_megatron.conversion.authors_folder import read_authors, write_authors
from himix_megatron.conversion.checkpoint_io import StoredWeights, read_config, write_run
from himix_megatron.conversion.huggingface import (
    NewVisionWeights,
    language_weights,
    read_language,
    read_tower_config,
    tower_dtype,
)
from himix_megatron.conversion.parity import (
    by_authors,
    check_authors,
    check_bits,
    check_export,
    check_language,
    check_tower,
)
from himix_megatron.distributed.launch import Launch
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from himix_megatron.model.towers import build_tower
from himix_megatron.runtime import log
from pipelines.cli import load_recipe

if TYPE_CHECKING:
    from tools.convert import AuthorsToHimix, HfToHimix, HimixToAuthors, HimixToHf

ChatTemplate = Literal["chatml", "llama3", "vicuna", "tiny"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def hf_to_himix(arguments: HfToHimix) -> None:
    """Raises: ValueError for folders that cannot be converted, DiffersError if the outcome is not what was read."""
    recipe = _recipe(arguments.recipe)
    model = read_language(arguments.language)
    text = language_weights(arguments.language, model)
    vision, tower = _read_tower(arguments.vision, arguments.feature_layer, recipe)
    config = _config(model, vision, recipe, _injection(arguments.method, model, recipe), arguments.language, text)
    new = NewVisionWeights(text, config, arguments.vision_kv_init, arguments.seed)
    weights: Mapping[str, Tensor] = ChainMap(new, text)  # type: ignore[arg-type]
    with _output(arguments.out) as beside, one_rank() as topology:
        _say(f"language: {model.family}, {model.num_layers} layers of width {model.hidden_size}, {len(text)} tensors")
        _say(f"tower: {vision.tower}, {vision.num_layers} layers of width {vision.hidden_size}, {len(tower)} tensors used")
        number = len(config.injection.injecting_layers(model.num_layers))
        _say(f"new, {arguments.vision_kv_init}: {len(new)} tensors; {number} of {model.num_layers} layers inject")
        for name, shape in {re.sub(r"\d+", "*", name, count=1): new.shapes[name] for name in new}.items():
            _say(f"  {name} {list(shape)}")
        checkpoint = write_run(beside, config, weights, tower, _say)
        del tower
        _say_compared(check_language(checkpoint, arguments.language, weights, topology))
        _say(check_tower(checkpoint, arguments.vision))


def authors_to_himix(arguments: AuthorsToHimix) -> None:
    """Raises: ValueError for weights that cannot be converted, DiffersError if the outcome is not what was read."""
    recipe = _recipe(arguments.recipe)
    source = read_authors(arguments.weights)
    vision, tower = source.vision, source.tower
    if arguments.vision is not None:
        if vision is not None:
            raise ValueError(f"--vision is {arguments.vision}, but {arguments.weights} holds its own tower: leave it out")
        vision, tower = _read_tower(arguments.vision, arguments.feature_layer, recipe)
    if vision is None:
        raise ValueError(f"{arguments.weights} holds no vision tower: give its folder with --vision")
    if vision.hidden_size != source.vision_width:
        raise ValueError(
            f"--vision: the tower's width is {vision.hidden_size}, but {arguments.weights} was made for {source.vision_width}"
        )
    folder = arguments.weights if arguments.weights.is_dir() else arguments.weights.parent
    config = _config(source.model, vision, recipe, HIMIX, folder, source.weights)
    with _output(arguments.out) as beside, one_rank() as topology:
        checkpoint = write_run(beside, config, source.weights, tower, _say)
        _say_compared(check_authors(checkpoint, source.weights, topology))
        if arguments.vision is not None:
            _say(check_tower(checkpoint, arguments.vision))
        else:
            _say(f"tower: {check_bits(StoredWeights(checkpoint, config).tower(config), tower)}")


def himix_to_authors(arguments: HimixToAuthors) -> None:
    """Raises: ValueError if there is no checkpoint, or it is not HiMix's; DiffersError if the outcome is not what was read."""
    checkpoint, config = _read_checkpoint(arguments.checkpoint)
    plain = dataclasses.replace(config, injection=HIMIX, vision=dataclasses.replace(config.vision, feature_layers=()))
    if others := differences(plain, config):
        raise ValueError(f"{others[0][0]} is {others[0][2]}: the published implementation, whose layout it is, has HiMix alone")
    with _output(arguments.out) as beside, one_rank() as topology:
        weights, tower = by_authors(checkpoint, config), StoredWeights(checkpoint, config).tower(config)
        beside.mkdir()
        _say(f"writing {len(weights)} tensors and {len(tower)} of the tower")
        write_authors(beside, config.model, config.vision, weights, tower)
        written = read_authors(beside)
        _say_compared(check_authors(checkpoint, written.weights, topology))
        _say(f"tower: {check_bits(written.tower, tower)}")


def himix_to_hf(arguments: HimixToHf) -> None:
    """Raises: ValueError if there is no checkpoint, DiffersError if the outcome is not what was read."""
    from himix_megatron.conversion.export.folder import export

    checkpoint, config = _read_checkpoint(arguments.checkpoint)
    with _output(arguments.out) as beside, one_rank() as topology:
        tower = {f"vision_tower.{n}": tensor for n, tensor in StoredWeights(checkpoint, config).tower(config).items()}
        weights = ChainMap(tower, by_authors(checkpoint, config))  # type: ignore[arg-type]
        _say(f"writing {len(weights)} tensors")
        make = partial(export, tokenizer=arguments.tokenizer)
        make(weights, config, beside)
        _say_compared(check_export(checkpoint, beside, topology, make))


# ---- settings ------------------------------------------------------------------------------------------------------


def _recipe(name: str | None) -> Config | None:
    return None if name is None else load_recipe(name)()


def _injection(method: str | None, model: ModelConfig, recipe: Config | None) -> InjectionConfig:
    if method is None:
        return recipe.injection if recipe else HIMIX
    check_known("--method", method, METHODS)
    return METHODS[method](model)


def _read_tower(folder: Path, feature_layer: int | None, recipe: Config | None) -> tuple[VisionConfig, dict[str, Tensor]]:
    """A tower's configuration, no longer tied to the folder, and its weights."""
    if feature_layer is None:
        feature_layer = recipe.vision.feature_layer if recipe else -2
    vision = read_tower_config(folder, feature_layer)
    if recipe is not None:
        kept = {name: getattr(recipe.vision, name) for name in ("resize", "interpolation", "feature_layers")}
        vision = dataclasses.replace(vision, **kept)
    weights = build_tower(vision, seed=0, dtype=tower_dtype(folder)).state_dict()
    return dataclasses.replace(vision, path=None), weights


def _config(
    model: ModelConfig,
    vision: VisionConfig,
    recipe: Config | None,
    injection: InjectionConfig,
    folder: Path,
    weights: Mapping[str, Tensor],
) -> Config:
    """The settings that go into the run folder."""
    dtype = weights["model.norm.weight"].dtype
    tokenizer = str(folder.resolve()) if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None
    if recipe is None:
        made = _plain_config(model, vision, injection, _template(model) if tokenizer else "tiny", dtype)
    else:
        kept = {name: getattr(recipe.model, name) for name in ("layer_spec", "attention_core", "text_only_vision")}
        made = dataclasses.replace(recipe, model=dataclasses.replace(model, **kept), vision=vision, injection=injection)
        recipe = dataclasses.replace(recipe, injection=injection)
        for name, wanted in architecture(recipe).items():
            if architecture(made)[name] != wanted:
                raise ValueError(f"{folder}: {name} is {architecture(made)[name]}, but recipe {recipe.recipe} has {wanted}")
    return made if tokenizer is None else dataclasses.replace(made, data=dataclasses.replace(made.data, tokenizer=tokenizer))


def _template(model: ModelConfig) -> ChatTemplate:
    """The conversations' wording of a family, as the recipes have it."""
    if model.family == "llama" and (model.rope_scaling_factor is not None or model.vocab_size == 128256):
        return "llama3"
    return FAMILIES[model.family].template


def _plain_config(
    model: ModelConfig, vision: VisionConfig, injection: InjectionConfig, template: ChatTemplate, dtype: torch.dtype
) -> Config:
    """Enough to evaluate and generate; a recipe has its own."""
    return Config(
        recipe="converted",
        model=model,
        vision=vision,
        injection=injection,
        data=DataConfig(template=template, max_text_tokens=2048),
        train=TrainConfig(
            trainable_parts=("vision_kv",),
            global_batch_samples=1,
            micro_batch_samples=1,
            precision="fp32" if dtype == torch.float32 else "bf16",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def _read_checkpoint(path: Path) -> tuple[Path, Config]:
    checkpoint = find_checkpoint(str(path))
    if wrong := verify_checkpoint(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} cannot be trusted: {'; '.join(wrong)}")
    config = dataclasses.replace(read_config(checkpoint), parallel=ParallelConfig(), run=RunConfig())
    check_architecture(checkpoint, config)
    return checkpoint, config


# ---- one process, one output ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank() -> Iterator[Topology]:
    """This process as a world of one, which megatron-core's checkpoints want."""
    launch = Launch(kind="alone", rank=0, world_size=1, local_rank=0, host="127.0.0.1", port=0)
    try:
        yield init_distributed(ParallelConfig(), seed=1234, launch=launch)
    finally:
        shutdown_distributed()


@contextlib.contextmanager
def _output(out: Path) -> Iterator[Path]:
    """A folder to be made, which is renamed to `out` when all went well and removed otherwise. It lies beside it, in a folder
    that this process alone knows.

    Raises: ValueError if `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} exists: name a folder that does not")
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(out.name)}.converting-*"):
        _say(f"{left} is of another conversion: remove it if none is running")
    room = Path(tempfile.mkdtemp(prefix=f"{out.name}.converting-", dir=out.parent))
    try:
        yield room / out.name
        try:
            (room / out.name).rename(out)
        except OSError:
            if not os.path.lexists(out):
                raise
            raise ValueError(f"--out {out} was made by another process meanwhile: it is left as it is") from None
        room.rmdir()
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _say(f"wrote {out}")


def quiet() -> None:
    """Keep torch's and megatron-core's notes to developers, and transformers' bars, out of the comparison's few lines."""
    from transformers.utils import logging as transformers_logging

    log.start()
    logging.getLogger("himix_megatron").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _say_compared(lines: Iterator[str]) -> None:
    """A comparison's lines, each as soon as it is known."""
    _say("comparing")
    for line in lines:
        _say(line)


def _say(line: str) -> None:
    print(line, flush=True)
