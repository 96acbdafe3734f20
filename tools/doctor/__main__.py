"""Check what is installed and usable on this machine: one line each, with the remedy.

    python -m tools.doctor                                     this machine
    python -m tools.doctor --data DIR --recipe llama3_2_1b_align    also datasets, and the recipe's tower and tokenizer
    srun --nodes 4 --ntasks-per-node 1 python -m tools.doctor  every node, one file system, and the network between them

`ok`; `warning`: works, but deserves a look; `missing`: not installed, and training works without it; `broken`: does not work,
or is missing and needed. With several ranks (srun, torchrun) rank 0 prints, for other nodes only what differs from its own
findings. Exit code 1 if something that training needs is broken, else 0.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from himix_megatron.config import Positive
from himix_megatron.runtime.errors import RankError
from pipelines.cli import load_recipe, parse_settings, run_main
from tools.doctor import machine, software
from tools.doctor.finding import Finding


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check this machine, or with several ranks the machines of a job."""

    data: tuple[str, ...] = ()
    """Shard datasets to check."""
    recipe: str | None = None
    """Recipe whose datasets (without --data), tower and tokenizer to check."""
    tower: Path | None = None
    """Folder of a vision tower. None: the recipe's."""
    tokenizer: str | None = None
    """Folder of a tokenizer. None: the recipe's."""
    folder: Path = Path(".")
    """Folder for runs; on a cluster one that all nodes see."""
    timeout_seconds: Positive = 30.0
    """Longest wait for an answer of another rank."""
    json: bool = False
    """Print one JSON object a line."""


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.doctor", __doc__)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: a failure to connect is one line, ours
    own = [*software.findings(), *machine.findings(arguments.folder), *files(arguments)]
    from himix_megatron.distributed.launch import launch_from_environment
    from himix_megatron.runtime.stop_signals import exit_now

    try:
        launch = launch_from_environment(os.environ)
    except RankError as error:
        own.append(Finding("ranks", "broken", str(error), needed=True))
        return show(own, arguments.json)
    if launch.world_size == 1:
        own.append(Finding("network", "ok", "one process: nothing to measure (srun or torchrun with several does)"))
        return show(own, arguments.json)
    from tools.doctor.network import meet

    met = meet(launch, own, arguments.folder, arguments.timeout_seconds)
    code = show(met.findings, arguments.json) if launch.rank == 0 or met.alone else met.code
    if met.alone:
        exit_now(code)  # past torch: a thread of this process may be stuck in it for ever
    return code


def files(arguments: Arguments) -> list[Finding]:
    """Datasets, tower and tokenizer that are named."""
    config = load_recipe(arguments.recipe)() if arguments.recipe else None
    data = arguments.data or (config.data.datasets if config else ())
    found = [software.dataset(path) for path in data]
    if not data:
        found.append(Finding("dataset", "missing", "none was named", "--data DIR looks into one (tiny recipes make their own)"))
    tower = arguments.tower or (Path(config.vision.path) if config and config.vision.path else None)
    if tower:
        found.append(software.tower(tower))
    tokenizer = arguments.tokenizer or (config.data.tokenizer if config else None)
    if tokenizer:
        found.append(software.tokenizer(tokenizer, config.model.vocab_size if config else None))
    return found


def show(findings: Iterable[Finding], as_json: bool) -> int:
    """Print them. Returns: the exit code."""
    findings = list(findings)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        remedy = f": {finding.remedy}" if finding.remedy else ""
        line = f"{finding.state:<7}  {finding.what:<{width}}  {finding.detail}{remedy}"
        print(json.dumps(asdict(finding)) if as_json else line, flush=True)
    return Finding.code(findings)


if __name__ == "__main__":
    run_main(main)
