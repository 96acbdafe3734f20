"""What docs/security.md promises: data is never run, nothing listens further than it says, and each promise names its test."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from himix_megatron.data.text.tokenizer import load_tokenizer
from tests.support import ROOT

PRODUCT = ("himix_megatron", "pipelines", "slurm", "tools")
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cloudpickle.load",
        "cloudpickle.loads",
        "marshal.loads",
        "shelve.open",
    ),
    *(
        "torch.load",
        "torch.jit.load",
        "torch.hub.load",
        "numpy.load",
        "np.load",
        "joblib.load",
        "yaml.load",
        "yaml.unsafe_load",
    ),
}
CALLS_OF_DATA = {"allow_pickle", "trust_remote_code", "weights_only"}


def product_files() -> list[Path]:
    return sorted(file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py"))


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called (`?` for a part that is no name)."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            parts, target = [], node.func
            while isinstance(target, ast.Attribute):
                parts.append(target.attr)
                target = target.value
            parts.append(target.id if isinstance(target, ast.Name) else "?")
            found.append((".".join(reversed(parts)), node))
    return found


def test_no_product_code_runs_or_unpickles_what_it_reads() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno} {name}"
        for file in product_files()
        for name, call in calls(file)
        if name in FORBIDDEN_CALLS
    ]
    assert not found


def test_one_file_reads_pickles_and_only_looks_through_them() -> None:
    opening = {
        str(file.relative_to(ROOT))
        for file in product_files()
        if re.search(r"Unpickler\b|^\s*import pickle|\bpickle\.", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert opening == {"himix_megatron/checkpoint/torch_metadata.py"}


def test_json_from_outside_is_read_in_one_place() -> None:
    """Elsewhere `json.loads` sees only what this program has just written, or, in tools for developers, files of their own."""
    own = ("tools/gpu_check/", "tools/bench/", "tools/dev_slurm.py", "tools/doctor/network.py", "tools/compare_reference.py")
    found = [
        f"{place}:{call.lineno}"
        for file in product_files()
        for name, call in calls(file)
        if name in ("json.load", "json.loads")
        and not (place := str(file.relative_to(ROOT))).startswith(own)
        and not (isinstance(call.args[0], ast.Call) and ast.unparse(call.args[0].func) in ("to_json", "json.dumps"))
    ]
    assert [place.split(":")[0] for place in found] == ["himix_megatron/runtime/typed_json.py"]


def test_no_product_code_starts_a_shell() -> None:
    found = []
    for file in product_files():
        for name, call in calls(file):
            shell = [word for word in call.keywords if word.arg == "shell"]
            if any(not (isinstance(word.value, ast.Constant) and word.value.value is False) for word in shell):
                found.append(f"{file.relative_to(ROOT)}:{call.lineno} {name}")
    assert not found


def test_code_of_a_model_folder_runs_only_where_we_wrote_it_ourselves() -> None:
    """`trust_remote_code=True`: for a folder that this project has just exported, and for lmms-eval, which is handed one."""
    trusting = set()
    for file in product_files():
        for _, call in calls(file):
            for word in call.keywords:
                if word.arg in ("trust_remote_code", "allow_pickle") and not (
                    isinstance(word.value, ast.Constant) and not word.value.value
                ):
                    trusting.add(str(file.relative_to(ROOT)))
    assert trusting == {"himix_megatron/conversion/export/parity.py", "pipelines/lmms_eval_adapter.py"}


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w')\nclass Tok: pass\n")
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Tok"}}))
    with pytest.raises(ValueError, match=r"data\.tokenizer is"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "MARK").exists()


def test_make_tensorboard_listens_on_this_machine_only(tmp_path: Path) -> None:
    """With the very words of the Makefile; another port, and no runs."""
    recipe = re.search(r"^tensorboard:.*\n\t\S*/tensorboard (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*recipe[1].replace("runs", str(tmp_path)).split(), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        listening: set[str] = set()
        deadline = time.monotonic() + 120
        while not listening:
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.3)
            of_server = {server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))}
            listening = {
                found.laddr.ip
                for found in psutil.net_connections("inet")
                if found.pid in of_server and found.status == psutil.CONN_LISTEN and found.laddr.port == port
            }
        assert listening == {"127.0.0.1"}
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_the_tests_that_the_document_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert not named - defined
