"""Train a recipe, or continue its run.

    python -m pipelines.pretrain tiny_align
    torchrun --nproc-per-node 8 -m pipelines.pretrain qwen2_0_5b_align --data.datasets DIR --checkpoint.init-from CONVERTED
    srun python -m pipelines.pretrain ...            (slurm/pretrain_himix.sh does this)

All three start the same ranks and give the same losses. A run folder that holds a checkpoint is continued. On TERM, USR1 or
USR2 the run saves after its current step and leaves with exit code 85: start the same command again.
"""

from __future__ import annotations

from himix_megatron.runtime.stop_signals import StopRequest

# Before the libraries are loaded, which takes seconds, or a minute on a busy file system: a request to stop then counts too.
REQUEST = StopRequest() if __name__ == "__main__" else None

import dataclasses  # noqa: E402
import sys  # noqa: E402

from himix_megatron.config import Config  # noqa: E402
from himix_megatron.runtime.process import bulk_import  # noqa: E402
from himix_megatron.runtime.stop_signals import exit_now  # noqa: E402
from pipelines.cli import parse, run_main  # noqa: E402


def with_data(config: Config) -> Config:
    """A tiny recipe without --data.datasets or --data.webdataset-urls trains on scenes that it renders and preprocesses."""
    if config.data.datasets or config.data.webdataset_urls or not config.recipe.startswith("tiny_"):
        return config
    from pipelines.scenes import ensure_scene_data

    path = ensure_scene_data() / ("align" if config.recipe == "tiny_align" else "instruct")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=(str(path),)))


def main() -> int:
    """The command line. Returns: the exit code."""
    config = parse(sys.argv[1:])
    with bulk_import():  # torch and megatron-core: after the settings are checked
        from himix_megatron.training.loop import pretrain

    return pretrain(with_data(config), REQUEST)


if __name__ == "__main__":
    # All is written then. What torch's threads do while an interpreter is taken down must not turn a run that is done into a
    # crash.
    run_main(lambda: exit_now(main()))
