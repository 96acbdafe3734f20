"""Which parallel layout to use on a number of GPUs: what fits, how long a step takes, what it costs, and the command to run.

    python -m tools.plan llama3_2_3b_instruct --gpus 64 --gpu h100-80gb --global-batch 128
    python -m tools.plan vicuna_7b_instruct --gpus 8 --gpu a100-80gb --price-per-gpu-hour 1.8
    python -m tools.plan vicuna_7b_instruct --gpus 8 --method tokens    another way in for vision, or any field of the recipe
    python -m tools.plan vicuna_7b_instruct --gpus 8 --machine-file DIR/machine.json    at measured rates
    python -m tools.plan --compare published        predictions beside published speeds of text-only GPTs

The cost model is described in docs/planner.md. It is arithmetic: trust the order of layouts more than their seconds. Memory is
that of a micro-batch of the longest texts, time that of usual texts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from himix_megatron.config import Config, Count, Positive, ZeroOrMore
from himix_megatron.costs.memory import GIB, RankMemory
from pipelines.cli import parse, run_main
from pipelines.flags import Word
from pipelines.recipes import RECIPES
from tools.flops import mean_vision_tokens, read_words
from tools.planner.layouts import Plan, Sample, plans
from tools.planner.machine import Machine, machine_named, machine_of_file

PROGRAM = "python -m tools.plan"
REMEDIES = {
    "weights": "more GPUs, so that tensor or pipeline parallelism may split them further",
    "gradients": "more GPUs, so that tensor or pipeline parallelism may split them further",
    "optimizer": "more GPUs: each data-parallel one takes a share of it",
    "activations": "shorter texts (--longest-text), or packing",
    "logits": "shorter texts (--longest-text)",
    "features": "a smaller --global-batch, or more GPUs",
    "allowance": "a larger GPU",
}


@dataclass(frozen=True)
class Arguments:
    """List the layouts that fit, fastest first, and print the command of the best one."""

    recipe: Annotated[str | None, Word("RECIPE")] = None
    """Recipe of pipelines.pretrain."""
    gpus: Count | None = None
    """Number of GPUs."""
    gpu: str = "h100-80gb"
    """Kind of GPU: a100-40gb, a100-80gb, h100-80gb, h100-80gb-pcie, h100-94gb-nvl, h200-141gb, b200-180gb."""
    machine_file: Path | None = None
    """File of measured rates (DIR/machine.json of tools.gpu_check), instead of --gpu's assumed ones."""
    interconnect: str | None = None
    """Network between nodes: ib-hdr-200, ib-ndr-400, ethernet-100, ethernet-400. None: the usual one for these GPUs."""
    gpus_per_node: Count = 8
    """GPUs of a node, which share its fast links."""
    global_batch: Count | None = None
    """Samples (with packing: packs) of a step. None: the recipe's."""
    pack_max_text_tokens: Count | None = None
    """Text tokens of a pack. None: the recipe's."""
    pack_max_vision_tokens: Count | None = None
    """Vision tokens of a pack."""
    text_tokens: Positive | None = None
    """Text tokens of a usual sample. None: the recipe's."""
    longest_text: Count | None = None
    """Text tokens of the longest sample. None: the recipe's data.max_text_tokens."""
    images: ZeroOrMore = 1.0
    """Images of a usual sample."""
    vision_tokens: Positive | None = None
    """Mean vision tokens of an image. None: those of the tower's largest image, which are every image's where its size is
    fixed."""
    label_share: float = 0.5
    """Share of the text tokens that have a label."""
    price_per_gpu_hour: Positive = 2.0
    """Price of a GPU hour, in any currency."""
    show: Count = 10
    """Number of layouts to list."""
    compare: Literal["published"] | None = None
    """Print the predictions beside published step times, and nothing else."""


def check(arguments: Arguments) -> None:
    """Raises: ValueError naming the flag."""
    if arguments.recipe is None:
        raise ValueError(f"no recipe given: there are {', '.join(RECIPES)}; or --compare published")
    if arguments.gpus is None:
        raise ValueError("--gpus must be given: how many GPUs there are")
    if (arguments.pack_max_text_tokens is None) != (arguments.pack_max_vision_tokens is None):
        raise ValueError("packing has two budgets: give both --pack-max-text-tokens and --pack-max-vision-tokens, or neither")
    if not 0 < arguments.label_share <= 1:
        raise ValueError(f"--label-share is {arguments.label_share}: wanted above 0, at most 1")
    if arguments.gpus > arguments.gpus_per_node and arguments.gpus % arguments.gpus_per_node:
        raise ValueError(
            f"--gpus is {arguments.gpus}: on more than one node it must be a multiple of --gpus-per-node "
            f"({arguments.gpus_per_node})"
        )


def settings(arguments: Arguments, flags: Sequence[str] = ()) -> tuple[Config, Sample]:
    """The recipe with the fields and the batch given, and what its samples are like."""
    assert arguments.recipe is not None
    config = parse([arguments.recipe, *flags], PROGRAM)
    batch, data = arguments.global_batch, config.data
    if arguments.pack_max_text_tokens is not None:
        longest = min(data.max_text_tokens, arguments.pack_max_text_tokens)
        data = replace(
            data,
            pack_max_text_tokens=arguments.pack_max_text_tokens,
            pack_max_vision_tokens=arguments.pack_max_vision_tokens,
            max_text_tokens=longest,
        )
        if batch is None and not config.data.packs:
            raise ValueError("--pack-max-text-tokens packs samples: give the batch in packs, --global-batch")
    field = "global_batch_packs" if data.packs else "global_batch_samples"
    if batch is not None:
        config = replace(config, data=data, train=replace(config.train, **{field: batch}))
    text = arguments.text_tokens or float(config.parallel.split_text_tokens)
    longest = arguments.longest_text or config.data.max_text_tokens
    if longest < text:
        raise ValueError(f"--longest-text ({longest}) is below --text-tokens ({text:g})")
    config = replace(config, parallel=replace(config.parallel, split_text_tokens=max(1, round(text))))
    sample = Sample(
        text_tokens=text,
        longest_text=longest,
        images=arguments.images,
        vision_tokens=mean_vision_tokens(config.vision, arguments.vision_tokens),
        label_share=arguments.label_share,
    )
    return config, sample


def choose(config: Config, machine: Machine, gpus: int, sample: Sample) -> list[Plan]:
    """Plans that fit, fastest first; of equal ones the one with less memory.

    Raises: ValueError if none fits; one line says what is too big, by how much, and what to change.
    """
    found = list(plans(config, machine, gpus, sample))
    room = machine.memory_gib
    fitting = sorted((plan for plan in found if plan.peak_gib <= room), key=lambda plan: (plan.seconds, plan.peak_gib))
    if fitting:
        return fitting
    flag, _ = config.batch_flags
    if not found:
        raise ValueError(
            f"{gpus} GPUs cannot share {config.recipe} with {flag} {config.global_batch}: no split of them divides heads, "
            "layers and the batch; use another number of GPUs, or a --global-batch that is a multiple of it"
        )
    least = min(found, key=lambda plan: plan.peak_gib)
    fullest = max(least.memory, key=lambda stage: stage.total)
    part = max((item.name for item in fields(RankMemory)), key=lambda name: float(getattr(fullest, name)))
    raise ValueError(
        f"{config.recipe} does not fit on {gpus} x {machine.name}: at the least ({described(least)}) a rank holds "
        f"{least.peak_gib:.1f} GiB, {least.peak_gib - room:.1f} more than the {room:.1f} there are; the most are {part} "
        f"({getattr(fullest, part) / GIB:.1f} GiB): use {REMEDIES[part]}"
    )


def described(plan: Plan) -> str:
    """TP2 PP4 VPP2 DP8, micro-batch 4, full recompute."""
    layout, config = plan.layout, plan.config
    return (
        f"TP{layout.tensor} PP{layout.pipeline} VPP{layout.virtual_pipeline} DP{layout.data}, "
        f"{'a pack' if config.data.packs else f'micro-batch {config.micro_batch}'}, {layout.recompute} recompute"
    )


def table(found: Sequence[Plan], machine: Machine, price: float, show: int) -> Iterator[str]:
    """The layouts, one a line: seconds of a step by what they go to."""
    yield (
        f"{'TP':>3}{'PP':>4}{'VPP':>4}{'DP':>5}{'micro':>6}{'recompute':>10}{'GiB':>7}{'step s':>9}{'compute':>9}{'tower':>8}"
        f"{'tensor':>8}{'pipeline':>9}{'data':>8}{'optim.':>8}{'bubble':>8}{'MFU':>7}{'decoder':>8}{'cost/M':>9}"
    )
    for plan in found[:show]:
        layout, time = plan.layout, plan.time
        yield (
            f"{layout.tensor:>3}{layout.pipeline:>4}{layout.virtual_pipeline:>4}{layout.data:>5}{plan.config.micro_batch:>6}"
            f"{layout.recompute:>10}{plan.peak_gib:>7.1f}{plan.seconds:>9.4f}{time.compute:>9.4f}{time.tower:>8.4f}"
            f"{time.tensor:>8.4f}{time.pipeline:>9.4f}{time.data:>8.4f}{time.optimizer:>8.4f}{time.bubble:>8.4f}"
            f"{100 * plan.utilisation(machine, tower=True):>6.1f}%{100 * plan.utilisation(machine, tower=False):>7.1f}%"
            f"{plan.cost_per_million(price):>9.2f}"
        )


def stages(plan: Plan) -> Iterator[str]:
    """Memory of each stage of the chosen layout."""
    for number, stage in enumerate(plan.memory):
        parts = ", ".join(f"{item.name} {getattr(stage, item.name) / GIB:.1f}" for item in fields(stage))
        yield f"  stage {number}: {stage.total / GIB:.1f} GiB: {parts}"


def command(plan: Plan, node_size: int, given: Sequence[str] = ()) -> str:
    """The command that runs it: torchrun on one node, sbatch on several. `given`: flags that it begins with."""
    config, layout, data = plan.config, plan.layout, plan.config.data
    packing = ("pack_max_text_tokens", "pack_max_vision_tokens", "max_text_tokens")
    values = {
        config.batch_flags[0]: config.global_batch,
        **({f"data.{name}": getattr(data, name) for name in packing} if data.packs else {}),
        **({} if data.packs else {"train.micro_batch_samples": config.micro_batch}),
        "train.recompute": layout.recompute,
        **{f"parallel.{name}": getattr(layout, name) for name in ("tensor", "pipeline", "virtual_pipeline")},
        **{f"parallel.{name}": getattr(config.parallel, name) for name in ("split", "split_text_tokens")},
    }
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]
    for name in ("sequence", "distributed_optimizer"):
        flags.append(f"--parallel.{'' if getattr(layout, name) else 'no-'}{name.replace('_', '-')}")
    nodes = max(1, layout.ranks // node_size)
    if nodes == 1:
        start = f"torchrun --nproc-per-node {layout.ranks} -m pipelines.pretrain"
    else:
        start = f"sbatch --nodes {nodes} --ntasks-per-node {node_size} --gpus-per-node {node_size} slurm/pretrain_himix.sh"
    return f"{start} {config.recipe} {' '.join([*map(shlex.quote, given), *flags])}"


def plan(arguments: Arguments, flags: Sequence[str] = ()) -> None:
    """The list, the choice and its command."""
    check(arguments)
    assert arguments.gpus is not None
    if arguments.machine_file is not None:
        machine = machine_of_file(arguments.machine_file, arguments.interconnect, arguments.gpus_per_node)
    else:
        machine = machine_named(arguments.gpu, arguments.interconnect, arguments.gpus_per_node)
    config, sample = settings(arguments, flags)
    found = choose(config, machine, arguments.gpus, sample)
    batch = f"{config.global_batch} {'packs' if config.data.packs else 'samples'}"
    print(
        f"{config.recipe} on {arguments.gpus} x {machine.name}: {batch} a step, {sample.text_tokens:g} text tokens (longest "
        f"{sample.longest_text}) and {sample.images:g} images of {sample.vision_tokens:g} vision tokens a sample; "
        f"{len(found)} layouts fit"
    )
    print(*table(found, machine, arguments.price_per_gpu_hour, arguments.show), sep="\n")
    best, price = found[0], arguments.price_per_gpu_hour
    print(
        f"best: {described(best)}: {best.samples / best.seconds:.1f} samples/s, {best.cost_per_million(price):.2f} for a "
        f"million samples at {price:g} a GPU hour"
    )
    print(*stages(best), command(best, machine.node_size, flags), sep="\n")


def main() -> int:
    """The command line."""
    arguments, flags = read_words(Arguments, PROGRAM, __doc__)
    if arguments.compare == "published":
        from tools.planner.published import compared

        print(*compared(), sep="\n")
    else:
        plan(arguments, flags)
    return 0


if __name__ == "__main__":
    run_main(main)
