"""What Transformer Engine's callables take, recorded where it is installed, for machines without it.

    python -m tests.model.te_signatures        writes tests/data/reference/te_signatures.json anew

It needs no GPU: nothing is built, and nothing runs.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from importlib import metadata

from tests.support import ROOT

RECORD = ROOT / "tests" / "data" / "reference" / "te_signatures.json"
PACKAGE = "transformer-engine"
CLASSES = ("LayerNormLinear", "Linear", "RMSNorm", "DotProductAttention", "ops.SwiGLU")
FUNCTIONS = ("cross_entropy.parallel_cross_entropy", "attention.rope.apply_rotary_pos_emb")
"""The second is what megatron-core calls for `apply_rope_fusion`."""
NAMES = tuple(
    f"transformer_engine.pytorch.{name}"
    for name in (*(f"{one}.{method}" for one in CLASSES for method in ("__init__", "forward")), *FUNCTIONS)
)
Parameters = list[tuple[str, str, bool]]
"""Of each: its name, its kind as `inspect` calls it, and whether it has a default."""


def installed() -> dict[str, Parameters]:
    """Read from the package."""
    import torch  # noqa: F401  # loads the libraries that Transformer Engine is linked with
    import transformer_engine.pytorch  # noqa: F401

    found = {}
    for name in NAMES:
        parameters = inspect.signature(pkgutil.resolve_name(name)).parameters.values()
        found[name] = [(one.name, one.kind.name, one.default is not one.empty) for one in parameters]
    return found


def recorded() -> dict[str, inspect.Signature]:
    """Read from the record; a default is only known to be there."""

    def parameter(name: str, kind: str, has_default: bool) -> inspect.Parameter:
        return inspect.Parameter(name, inspect._ParameterKind[kind], default=None if has_default else inspect.Parameter.empty)

    callables = json.loads(RECORD.read_text())["callables"]
    return {name: inspect.Signature([parameter(*one) for one in parameters]) for name, parameters in callables.items()}


def main() -> None:
    callables = installed()
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(parameters)}" for name, parameters in callables.items())
    version = json.dumps(metadata.version(PACKAGE))
    RECORD.write_text(f'{{\n "{PACKAGE}": {version},\n "callables": {{\n{lines}\n }}\n}}\n')
    print(f"{len(callables)} callables of {PACKAGE} {version}: {RECORD}")


if __name__ == "__main__":
    main()
