"""The command line: what is typed becomes the run that is meant, or one line that says what to type."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from himix_megatron.config import differences
from himix_megatron.config.serialization import COUNTED_IMAGES, RENAMED_FIELDS
from himix_megatron.runtime.errors import RankError
from pipelines import scaling
from pipelines.cli import parse, parse_settings, run_main
from pipelines.flags import Word, current_flags, flag
from pipelines.recipes import RECIPES
from slurm import submit
from tests.support import ROOT


def test_a_recipe_alone_is_the_recipes_own_config() -> None:
    for name, recipe in RECIPES.items():
        assert parse([name]) == recipe()


def test_flags_change_the_fields_they_name_and_nothing_else() -> None:
    flags = "--train.steps 7 --train.trainable-parts tower language --parallel.tensor=2 --parallel.sequence"
    flags += " --vision.feature-layer -2"
    config = parse(
        ["tiny-align", *flags.split(), "--run.dir", "some where", "--log.no-ledger", "--data.validation-path", "None"]
    )
    assert differences(RECIPES["tiny_align"](), config) == [
        ("vision.feature_layer", -1, -2),
        ("train.trainable_parts", ("vision_kv",), ("tower", "language")),
        ("train.steps", 200, 7),
        ("parallel.tensor", 1, 2),
        ("parallel.sequence", False, True),
        ("run.dir", None, "some where"),
    ]


def test_values_may_follow_an_equals_sign_or_look_like_flags() -> None:
    words = "tiny_align --data.datasets=a b --vision.pixel-mean=-1e-5 .5 1 --run.dir=x=y --train.steps 3 --train.steps=4"
    config = parse(words.split())
    assert (config.data.datasets, config.vision.pixel_mean) == (("a", "b"), (-1e-5, 0.5, 1.0))
    assert (config.run.dir, config.train.steps) == ("x=y", 4)


def test_help_is_shown_beside_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["tiny_align", "--typo", "--help"])
    assert "--train.steps" in capsys.readouterr().out


def test_dashes_and_underscores_are_one() -> None:
    spelled = [parse(["tiny_align", flag, "32"]) for flag in ("--train.global-batch-samples", "--train.global_batch_samples")]
    assert spelled[0] == spelled[1]
    assert spelled[0].train.global_batch_samples == 32


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "no recipe given: use .* RECIPE, with RECIPE one of tiny_align, tiny_instruct"),
        ("tiny_aling", "unknown recipe tiny_aling: did you mean tiny_align[?] There are tiny_align, .*vicuna_7b_instruct$"),
        ("qwen2_align", "did you mean qwen2_0_5b_align[?]"),
        ("--train.steps 3 tiny_align", "--train.steps comes before the recipe"),
        ("tiny_align --recipe x", "--recipe is not a flag"),
        ("tiny_align --train.stepz 3", "unknown setting --train.stepz: did you mean --train.steps[?]"),
        ("tiny_align --learning_rate 3", "unknown setting --learning_rate: did you mean --optimizer.learning-rate[?]"),
        ("tiny_align --paralel.tensr=2", "did you mean --parallel.tensor[?]"),
        ("tiny_align --zzzz 2", "unknown setting --zzzz: no setting has a name like it"),
        ("tiny_align --train.steps abc", "--train.steps is 'abc': wanted a whole number or None"),
        ("tiny_align --model.num-layers 4.5", "--model.num-layers is '4.5': wanted a whole number"),
        ("tiny_align --train.epochs many", "--train.epochs is 'many': wanted a number"),
        ("tiny_align --train.precision fp8", "--train.precision is 'fp8': wanted one of bf16, fp32"),
        ("tiny_align --model.family lama", "model.family is lama: wanted one of llama, qwen2"),
        ("tiny_align --vision.tower siglp", "vision.tower is siglp: wanted one of tiny, tiny_native, siglip, clip"),
        (
            "tiny_align --train.trainable-parts foo",
            "--train.trainable-parts is 'foo': wanted one of vision_kv, language, tower",
        ),
        ("tiny_align --train.trainable-parts", r"train.trainable_parts is \[\]: name each part"),
        ("tiny_align --train.steps", "--train.steps needs a value"),
        ("tiny_align --vision.pixel-mean 1 2", "--vision.pixel-mean needs 3 values"),
        ("tiny_align --train.epochs 1 2", "2 belongs to no setting"),
        ("tiny_align stray", "stray belongs to no setting"),
        ("tiny_align --log.ledger True", "--log.ledger takes no value"),
        ("tiny_align --log.ledger=True", "--log.ledger takes no value"),
        (
            "tiny_align --log.no-ledger false",
            r"--log.no-ledger takes no value \(false\): write it alone; --log.no-ledger clears",
        ),
        ("tiny_align --train.steps 0", "train.steps is 0: wanted 1 or more"),
        ("tiny_align --parallel.tensor 3", r"model.num_attention_heads \(4\) does not divide .*: use --parallel.tensor 1 or 2"),
        ("tiny_align --run.dir=", "--run.dir is empty: wanted a value"),
        ("tiny_align --data.datasets=", "--data.datasets is empty: wanted a value"),
        ("tiny_align --run.dir runs/\udcff", r"--run.dir is 'runs/\\udcff': wanted text in UTF-8"),
        ("tiny_align --data.max-bad-fraction nan", "data.max_bad_fraction is nan: wanted 0 to 1"),
        ("tiny_align --parallel.sequence", "parallel.sequence needs parallel.tensor above 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse(typed.split())
    assert "\n" not in str(caught.value)
    assert not set("│─╭╰") & set(str(caught.value))


def test_help_without_a_recipe_lists_every_recipe_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name} " in shown
        assert (recipe.__doc__ or "").splitlines()[0] in shown


def test_help_with_a_recipe_teaches_its_facts_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["llama3_2_1b_instruct", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert {line.split(":")[0] for line in printed.splitlines()} >= {"Command", "Hardware", "Expected", "model", "run"}
    shown = " ".join(printed.split())
    assert "meta-llama/Llama-3.2-1B" in shown
    assert "--train.global-batch-samples INT|None Samples per optimizer step, over all ranks." in shown
    assert "(default: 128)" in shown
    assert "--recipe" not in shown


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings of an entry point of its own."""

    out: str
    """Where."""
    num_workers: int = 3
    """How many."""


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Settings that are given by their position."""

    run: Annotated[Path, Word("RUN")]
    """Where."""
    kind: Annotated[Literal["a", "b"], Word("KIND")]
    """Which."""
    more: Annotated[tuple[Path, ...], Word("MORE")] = ()
    """Others."""


def test_a_missing_word_is_named() -> None:
    with pytest.raises(ValueError, match=r"^RUN and KIND must be given"):
        parse_settings(_Places, [], "prog")
    with pytest.raises(ValueError, match=r"^KIND must be given"):
        parse_settings(_Places, ["x"], "prog")
    assert parse_settings(_Places, ["x", "a"], "prog") == _Places(run=Path("x"), kind="a")
    assert parse_settings(_Places, ["x", "a", "y", "z"], "prog").more == (Path("y"), Path("z"))


def test_other_entry_points_get_the_same_lines() -> None:
    assert parse_settings(_Settings, ["--out", "x"], "prog") == _Settings(out="x")
    with pytest.raises(ValueError, match=r"^--out must be given \(prog --help tells more\)$"):
        parse_settings(_Settings, [], "prog")
    with pytest.raises(ValueError, match=r"did you mean --num-workers[?]"):
        parse_settings(_Settings, ["--workers", "2"], "prog")


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 85", 85, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise ValueError('too\\n  big')", 2, "error: too big\n"),
        ("open('/no/such/file')", 2, "error: /no/such/file: No such file or directory\n"),
    ],
)
def test_run_main_turns_mistakes_into_one_line_and_exit_code_2(body: str, code: int, stderr: str, tmp_path: Path) -> None:
    script = tmp_path / "entry.py"
    script.write_text(f"from pipelines.cli import run_main\ndef main():\n    {body}\nrun_main(main)\n")
    path = str(ROOT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={"PYTHONPATH": path, "RANK": "0"})
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room on the disk, and run the"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error: what lies there cannot be read or written"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), "/mnt/x: Read-only file system: choose a place"),
        (OSError(errno.EFBIG, "File too large"), "File too large: this process may not write so large a file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/mnt/x"), "/mnt/x: Disk quota exceeded: make room in your quota"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 400), f"{'n' * 300}... (401 characters) File name too long"),
        (OSError(errno.ENOTEMPTY, "Directory not empty", b"/a\xff"), "/a\\udcff: Directory not empty"),
        (ValueError("a column called \x1b[2J\x1b]0;title\x07"), "a column called \\x1b[2J\\x1b]0;title\\x07"),
        (ValueError(f"--x is {'9' * 5000} : no"), f"--x is {'9' * 300}... (5000 characters) : no"),
    ],
)
def test_a_disk_that_takes_no_more_and_text_from_outside_are_one_plain_line(
    capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_run_main_leaves_a_bug_its_traceback_and_tells_a_mistake_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> None:
        raise KeyError("bug")

    def mistake() -> None:
        raise ValueError("no")

    def own_mistake() -> None:
        raise RankError("no GPU here")

    with pytest.raises(KeyError):
        run_main(bug)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as caught:
        run_main(mistake)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""  # rank 0 says it for all
    with pytest.raises(SystemExit) as caught:
        run_main(own_mistake)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: rank 3: no GPU here\n"


def test_help_into_a_closed_pipe_is_no_error() -> None:
    command = (
        f'{sys.executable} -c \'from pipelines.cli import *; run_main(lambda: parse(["tiny_align", "--help"]) and 0)\' | true'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""


COMMANDS = """
pipelines.pretrain pipelines.evaluate pipelines.generate pipelines.serve pipelines.encode pipelines.preprocess pipelines.scaling
pipelines.compare pipelines.quickstart pipelines.scenes slurm.submit tools.convert tools.flops tools.plan tools.doctor.__main__
tools.dev_slurm tools.inspect_shards.__main__ tools.scaling_report.__main__ tools.gpu_check.__main__
"""
SAY_WHAT_IS_IMPORTED = """
import contextlib, importlib, io, sys
large = ("torch", "ray", "megatron", "transformers", "tensorboard", "pyarrow", "submitit", "matplotlib")
first = {"tools.convert": ["hf-to-himix"], "slurm.submit": ["tiny"]}
first |= dict.fromkeys(("pipelines.pretrain", "pipelines.encode", "pipelines.scaling", "pipelines.compare"), ["tiny_align"])
for command in sys.argv[1:]:
    module = importlib.import_module(command)
    for words in (["--help"], ["--no-such-flag", "1"]):
        sys.argv, said = [command, *first.get(command, []), *words], ""
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                module.main()
            except SystemExit as stop:
                said = f"exit code {stop.code}"
            except ValueError as error:
                said = str(error)
        print(command, words[0], [name for name in large if name in sys.modules], said)
"""


def test_help_and_a_misspelt_flag_import_no_large_library() -> None:
    """They take some 0.5 seconds of CPU; torch alone takes 3, megatron-core 2 more."""
    words = [sys.executable, "-c", SAY_WHAT_IS_IMPORTED, *COMMANDS.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    for command, help_line, mistake in zip(COMMANDS.split(), *(done.stdout.splitlines()[i::2] for i in (0, 1)), strict=True):
        assert help_line in (f"{command} --help [] exit code 0", f"{command} --help [] exit code None")
        assert mistake.startswith(f"{command} --no-such-flag [] unknown setting --no-such-flag: ")


def test_an_old_flag_names_the_new_one() -> None:
    for old, new in RENAMED_FIELDS.items():
        said = f"unknown setting {flag(old)}: it is now {flag(new)} ("
        with pytest.raises(ValueError, match=re.escape(said)):
            parse(["tiny_align", flag(old), "1"])
    for old in COUNTED_IMAGES:
        with pytest.raises(ValueError, match=r"limited in vision tokens: --data\.pack-max-vision-tokens, ") as refused:
            parse(["tiny_align", flag(old), "26"])
        assert "\n" not in str(refused.value)


def test_a_recipe_of_another_package_is_named_by_module_and_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "our_lab"
    package.mkdir()
    (package / "broken.py").write_text("import no_such_library\n")
    (package / "recipes.py").write_text(
        "from dataclasses import replace\n"
        "from pipelines.recipes import tiny_align, tiny_instruct\n\n\n"
        "def small_align():\n"
        '    """Our small run."""\n'
        "    recipe = tiny_align()\n"
        "    return replace(recipe, train=replace(recipe.train, steps=7))\n\n\n"
        "small_instruct = tiny_instruct\n"
        "def number():\n    return 7\n"
        "def wants(size):\n    return size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "our_lab.recipes:small_align"
    config = parse([name, "--train.global-batch-samples", "16"])
    assert (config.recipe, config.train.steps, config.train.global_batch_samples) == (name, 7, 16)
    assert config.run_dir == Path("runs/our_lab.recipes.small_align")
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    shown = capsys.readouterr().out
    assert "Our small run." in shown
    assert "(default: 7)" in shown
    for word, said in {
        "our_lab.recipes:large_align": "our_lab.recipes has no function 'large_align'",
        "our_lab.recipes:": "our_lab.recipes has no function ''",
        "our_lab.recipes:replace.x": "has no function 'replace.x'",
        "our_lab.recipe:small_align": "the module 'our_lab.recipe' cannot be imported",
        "our_lab.broken:small_align": "the module 'our_lab.broken' cannot be imported .No module named 'no_such_library'",
        ":small_align": "the module '' cannot be imported",
        "our_lab.recipes:number": "it returns int, wanted himix_megatron.config.Config",
        "our_lab.recipes:wants": "missing 1 required positional argument",
    }.items():
        with pytest.raises(ValueError, match=f"^recipe {word}: .*{said}") as caught:
            parse([word])
        assert "\n" not in str(caught.value)
    _, stages = submit.read(["our_lab.recipes:small"])
    assert [stage.config.recipe for stage in stages] == [name, "our_lab.recipes:small_instruct"]
    settings, recipe, flags = scaling.arguments([name, "--world-sizes", "1", "2"])
    assert scaling.plan(settings, recipe, flags)[1].config.run_dir == Path("runs/our_lab.recipes.small_align-weak-002")


def test_words_of_an_earlier_version_get_their_names_of_today() -> None:
    typed = (
        "tiny_align --data.too-long cut --run.no-resume-after-stop --train.parts=language --train.steps 3 --data.too_long=cut"
    )
    meant = "tiny_align --data.overlong truncate --run.no-ignore-stop-file --train.trainable-parts=language --train.steps 3"
    assert current_flags(typed.split()) == [*meant.split(), "--data.overlong=truncate"]
    assert parse(current_flags(typed.split())).data.overlong == "truncate"


@dataclass(frozen=True)
class AskingSettings:
    """A command with a word of its own."""

    run: Annotated[str, Word("RUN")]
    """The run."""
    stop: tuple[str, ...] = ()
    """Texts."""
    verify: bool = False
    """Whether to."""


def test_a_value_that_looks_like_a_flag_and_a_word_behind_a_switch_are_values() -> None:
    read = parse_settings(AskingSettings, ["--verify", "1", "--stop=---"], "prog", "")
    assert (read.run, read.verify, read.stop) == ("1", True, ("---",))


def test_libraries_come_without_the_collector_which_does_not_look_at_them_later() -> None:
    script = """
import gc
from himix_megatron.runtime.process import bulk_import
states = []
with bulk_import():
    states.append(gc.isenabled())
    with bulk_import():
        import decimal
    states.append(gc.isenabled())
assert (states, gc.isenabled()) == ([False, False], True), states
assert not any(kept is decimal for kept in gc.get_objects())
gc.disable()
with bulk_import():
    pass
assert not gc.isenabled(), "who had turned it off has it turned on again"
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
