"""lmms-eval's model interface over an exported folder; where lmms-eval is not installed, over a stand-in of the parts used."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines import lmms_eval_adapter as adapter
from tests.support.exported_models import export_random, random_config
from tests.support.ranks import run_ranks

from .test_mistakes import message

DOCUMENTS = [
    {"picture": Image.new("RGB", (20, 20), colour), "question": question}
    for colour, question in (("red", "What is it?"), ("blue", "And this, at greater length?"), ("green", "Colour?"))
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    run_ranks(export_random, 1, random_config(), out, start_gloo=False)
    return out


@pytest.fixture(scope="module")
def library() -> Any:
    """lmms-eval's registry; of a stand-in with what the adapter uses, where the package is not there."""
    if importlib.util.find_spec("lmms_eval") is not None:
        yield importlib.import_module("lmms_eval.models").MODEL_REGISTRY_V2
        return

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str

    class Registry:
        def __init__(self) -> None:
            self.known: dict[str, ModelManifest] = {}

        def register_manifest(self, manifest: ModelManifest, *, overwrite: bool = False) -> None:
            self.known[manifest.model_id] = manifest

        def get_model_class(self, name: str) -> Any:
            module, _, cls = self.known[name].simple_class_path.rpartition(".")
            return getattr(importlib.import_module(module), cls)

    class CacheHook:
        def add_partial(self, *_: Any) -> None: ...

    class LMMs:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1
            self.cache_hook, self.task_dict = CacheHook(), {}

        @classmethod
        def create_from_arg_string(cls, words: str, additional_config: dict[str, Any]) -> Any:
            given = dict(word.split("=") for word in words.split(","))
            return cls(**given, **{name: value for name, value in additional_config.items() if value is not None})

    registry = Registry()
    parts: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": LMMs},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": registry},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in parts.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    yield registry
    for name in parts:
        del sys.modules[name]
    adapter.model_class.cache_clear()


@pytest.fixture(scope="module")
def model(exported: Path, library: Any) -> Any:
    """As lmms-eval makes it from --model himix --model_args pretrained=DIR --batch_size 2."""
    adapter.register()
    cls = library.get_model_class("himix")
    made = cls.create_from_arg_string(f"pretrained={exported}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"})
    made.task_dict = {"task": {"test": DOCUMENTS}}
    return made


@dataclass
class Request:
    args: tuple[Any, ...]


def asked(document: int, settings: dict[str, Any]) -> Request:
    return Request((DOCUMENTS[document]["question"], settings, lambda doc: [doc["picture"]], document, "task", "test"))


def directly(model: Any, document: int, max_new_tokens: int) -> str:
    """The same by transformers alone, one at a time."""
    exported = model.exported
    message = {"role": "user", "content": DOCUMENTS[document]["question"]}
    inputs = exported.processor(conversation=[message], images=[DOCUMENTS[document]["picture"]])
    (answer,) = exported.processor.answers(exported.model.generate(**inputs, max_new_tokens=max_new_tokens), inputs)
    return str(answer)


def test_answers_are_those_of_the_folder_in_the_order_of_the_requests(model: Any) -> None:
    lengths = (8, 4, 8)
    requests = [asked(n, {"max_new_tokens": length, "temperature": 0}) for n, length in enumerate(lengths)]
    assert model.generate_until(requests) == [directly(model, n, length) for n, length in enumerate(lengths)]


def test_an_answer_ends_before_a_tasks_stop_text(model: Any) -> None:
    whole = directly(model, 0, 8)
    stop = whole[2]
    (cut,) = model.generate_until([asked(0, {"max_new_tokens": 8, "until": [stop]})])
    assert cut == whole.split(stop)[0].strip()


def next_token(model: Any, question: str, answer: bytes = b"") -> torch.Tensor:
    """Logits after a question about the first picture and the beginning of an answer, by the folder itself."""
    exported = model.exported
    message = {"role": "user", "content": question}
    inputs = dict(exported.processor(conversation=[message], images=[DOCUMENTS[0]["picture"]]))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(answer)], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits: torch.Tensor = exported.model(**inputs).logits[0, -1]
    return logits


def weighed(model: Any, question: str, answer: str) -> tuple[float, bool]:
    (found,) = model.loglikelihood([Request((question, answer, lambda doc: [doc["picture"]], 0, "task", "test"))])
    return found  # type: ignore[no-any-return]


def test_loglikelihood_is_the_sum_over_the_answers_tokens(model: Any) -> None:
    steps = [next_token(model, "What is it?", b"red"[:n]).log_softmax(-1)[byte] for n, byte in enumerate(b"red")]
    likelihood, _ = weighed(model, "What is it?", "red")
    assert likelihood == pytest.approx(float(sum(steps)), abs=1e-4)


def test_the_most_likely_letter_is_greedy_and_another_is_not(model: Any) -> None:
    likely = {question: int(next_token(model, question).argmax()) for question in "abcdefghijklmnop"}
    question = next(question for question, token in likely.items() if 33 <= token < 127)
    assert weighed(model, question, chr(likely[question]))[1]
    assert not weighed(model, question, "x" if likely[question] != ord("x") else "y")[1]


def test_a_video_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="himix sees pictures only, and a task shows str"):
        model.generate_until([Request(("?", {}, lambda doc: ["clip.mp4"], 0, "task", "test"))])


MISTAKES = {
    "no folder": ([], "give the exported folder first"),
    "no model": (["EMPTY", "--tasks", "pope"], "is no exported model: it has no config.json"),
    "not installed": (["MODEL", "--tasks", "pope"], "lmms-eval is not installed here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text("{}")
    words, wanted = MISTAKES[name]
    for module in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    assert wanted in message(adapter.main, words, monkeypatch, capsys)
