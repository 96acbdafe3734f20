"""Whether one training is the same on one rank and on N, however they are laid out: over NCCL, without a GPU over gloo.

Every run starts from the same weights, takes the same global batches in fp32, and is started as a user starts it: by torchrun.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tools.bench.measure import Line
from tools.gpu_check.end_to_end import FP32_LOSS, HERE, specs
from tools.gpu_check.processes import Command, ProcessError, apart, complain, in_turn, losses, pretrain, scratch_folder
from tools.gpu_check.runner import Check, Context

TIMEOUT_SECONDS = "120"
"""A collective that hangs ends its own run, and leaves the other layouts their share of the budget."""
DATA = ("--parallel.distributed-optimizer",)
TENSOR = ("--parallel.sequence", "--parallel.tensor")


def layouts_of(gpus: int) -> dict[str, tuple[str, ...]]:
    """Flags by layout: each kind of parallelism alone on all ranks, and two of them at once where the ranks suffice."""
    found = {
        f"tensor {gpus}, sequence": (*TENSOR, str(gpus)),
        f"pipeline {gpus}": ("--parallel.pipeline", str(gpus)),
        f"data {gpus}, distributed optimizer": DATA,
    }
    if gpus >= 4 and gpus % 2 == 0:
        found[f"tensor 2, sequence, data {gpus // 2}, distributed optimizer"] = (*TENSOR, "2", *DATA)
    return found


def sizes(gpus: int) -> tuple[str, ...]:
    """Layers, heads, widths and a batch that divide over as many ranks; micro-batches of 2 samples in every layout."""
    model = {"num-layers": 2, "num-attention-heads": 2, "num-query-groups": 1, "ffn-hidden-size": 128}
    flags = [word for name, each in model.items() for word in (f"--model.{name}", str(each * gpus))]
    batch = ("--train.global-batch-samples", str(4 * gpus), "--train.micro-batch-samples", "2")
    return ("--model.head-dim", "32", *flags, *batch)


def layouts(context: Context) -> Iterator[Line]:
    """All of them for `context.gpus` ranks."""
    yield from beside_one_rank(context, layouts_of(context.gpus))


def beside_one_rank(context: Context, chosen: Mapping[str, tuple[str, ...]]) -> Iterator[Line]:
    """Losses and gradient norms of these layouts beside one rank's.

    Norms say more: left unsummed over tensor ranks, the norm layers' gradients moved them by 1e-3, and losses by 3e-5.
    """
    folder, steps = scratch_folder("layouts"), 10 if context.tiny else 20
    common = ("--model.layer-spec", specs(context)[0], "--parallel.timeout-seconds", TIMEOUT_SECONDS, *sizes(context.gpus))
    common += ("--data.datasets", str(folder / "data" / "shards"))

    def train(name: str, *flags: str) -> Command:
        where = ("--checkpoint.init-from", folder / "start", "--run.dir", folder / name)
        return pretrain("tiny_instruct", *common, *where, "--train.steps", str(steps), *flags)

    # One step at the warm-up's rate of 0: fresh weights as a checkpoint.
    start = pretrain("tiny_instruct", *common, "--train.steps", "1", "--run.dir", folder / "start")
    error = in_turn(context, [(f"{HERE}:mixed_data", folder / "data"), start, train("one rank")])
    of_one = losses(folder / "one rank")
    what = f"fall of the loss over {steps} steps on one rank: less would say little"
    yield Line(what, of_one[1][-1] - of_one[steps][-1] if steps in of_one else 0.0, 0.1)
    complain(error)
    errors: list[ProcessError] = []
    for name, flags in chosen.items():
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(context.gpus), "-m")
        if error := in_turn(context, [(*torchrun, *train(name, *flags))]):
            errors.append(error)
        for quantity, field in (("losses", "loss"), ("gradient norms", "grad_norm")):
            difference = apart(folder / name, folder / "one rank", range(1, steps + 1), field)
            what = f"largest relative difference of {steps} {quantity} from one rank's: {name}"
            yield Line(what, difference, FP32_LOSS, at_most=True)
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(chosen)} layouts did not train", errors)


CHECKS: tuple[Check, ...] = (Check("layouts", "correctness", 150, layouts, beside=True, gpus=2),)
