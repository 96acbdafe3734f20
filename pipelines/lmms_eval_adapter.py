"""Score an exported folder with lmms-eval: its tasks, our model.

    python -m pipelines.lmms_eval_adapter exported/my-model --tasks pope,mme --batch_size 8

Everything behind the folder goes to lmms-eval as it is. It is not installed with this package (pip install lmms-eval), and is
imported when it is used. The model runs in transformers alone, from `himix-to-hf`'s folder, whose own code is trusted.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from himix_megatron.data.text.chat_template import without_marks
from pipelines.cli import run_main

MODEL = "himix"
"""The model's name in lmms-eval: --model himix --model_args pretrained=DIR."""
MODULE = "pipelines.lmms_eval_adapter"

Message = dict[str, Any]


class Exported:
    """An exported folder that answers and that weighs answers."""

    def __init__(self, folder: str, device: str | None, dtype: str) -> None:
        """Raises: ValueError if there is no exported model in the folder."""
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{folder} is no exported model: it has no config.json (make one with python -m tools.convert himix-to-hf)"
            )
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        self.model = model.to(self.device).eval()

    def _inputs(self, conversations: Sequence[list[Message]]) -> Any:
        # Pixels are floats, and the weights may be of another kind; integers keep theirs.
        return self.processor(conversation=list(conversations)).to(self.device, self.model.dtype)

    @torch.inference_mode()
    def answers(self, conversations: Sequence[list[Message]], settings: Mapping[str, Any], until: Sequence[str]) -> list[str]:
        """One answer to each, cut before the first text of `until`."""
        inputs = self._inputs(conversations)
        found: list[str] = self.processor.answers(self.model.generate(**inputs, **settings), inputs)
        return [min((text.split(stop)[0] for stop in until if stop), key=len, default=text).strip() for text in found]

    @torch.inference_mode()
    def weigh(self, question: Message, answer: str) -> tuple[float, bool]:
        """The logarithm of an answer's probability, and whether it is what greedy generation begins with."""
        spell = functools.partial(self.processor.apply_chat_template, tokenize=False)
        asked = spell([question], add_generation_prompt=True)
        whole = spell([question, {"role": "assistant", "content": answer}])
        # Without the template's end of the turn, which is no part of the continuation that is weighed.
        whole = whole[: whole.rindex(answer.strip()) + len(answer.strip())]
        start, ids = len(self.processor.encode(asked)), self.processor.encode(whole)
        inputs = self._inputs([[question]])
        text = torch.tensor([ids], device=self.device)
        pictures = {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", "attention_mask")}
        logits = self.model(input_ids=text, attention_mask=torch.ones_like(text), **pictures).logits[0, start - 1 : -1].float()
        chosen = text[0, start:]
        likelihood = logits.log_softmax(-1).gather(1, chosen[:, None]).sum()
        return float(likelihood), bool((logits.argmax(-1) == chosen).all())


def user(text: str, visuals: Sequence[Any]) -> Message:
    """A question with its pictures. Raises: ValueError for what is no picture."""
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(f"{MODEL} sees pictures only, and a task shows {type(visual).__name__}")
    # A task may name one picture twice, and lmms-eval then has another number of "<image>" marks than of pictures.
    said = {"type": "text", "text": without_marks(text)}
    return {"role": "user", "content": [*({"type": "image", "image": visual} for visual in visuals), said]}


def generation(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's settings in transformers' terms, and the texts that end an answer."""
    until = given.get("until", [])
    temperature = float(given.get("temperature") or 0)
    settings = {
        "max_new_tokens": given.get("max_new_tokens", 1024),
        "num_beams": given.get("num_beams", 1),
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": given.get("top_p") or 1.0}
    return settings, [until] if isinstance(until, str) else list(until)


@functools.cache
def model_class() -> type:
    """The model as lmms-eval knows models. Raises: ValueError if lmms-eval is not installed."""
    library = _library("lmms_eval.api.model")

    class HiMix(library.lmms):  # type: ignore[misc, name-defined]
        """`--model himix --model_args pretrained=DIR[,dtype=bfloat16]`."""

        is_simple = True  # tasks hand over a text and pictures

        def __init__(
            self, pretrained: str, device: str | None = None, batch_size: int | str = 1, dtype: str = "auto", **_: Any
        ):
            super().__init__()
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(f"{MODEL} runs in one process under lmms-eval: start it without torchrun or accelerate launch")
            self.exported = Exported(pretrained, device, dtype)
            self.device, self.batch_size = self.exported.device, max(1, int(batch_size)) if batch_size != "auto" else 1

        def _message(self, text: str, to_visual: Any, doc_id: Any, task: str, split: str) -> Message:
            return user(text, (to_visual(self.task_dict[task][split][doc_id]) if to_visual else None) or [])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Requests hold: text, settings, the pictures' function, the document's number, task, split."""
            found: dict[int, str] = {}
            alike: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
            for numbers in alike.values():
                settings, until = generation(requests[numbers[0]].args[1])
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    messages = [[self._message(r.args[0], *r.args[2:6])] for r in (requests[number] for number in batch)]
                    for number, answer in zip(batch, self.exported.answers(messages, settings, until), strict=True):
                        found[number] = answer
                        self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer)
            return [found[number] for number in range(len(requests))]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Requests hold: text, the answer or its function, the pictures' function, the document's number, task, split."""
            found = []
            for text, target, to_visual, doc_id, task, split in (request.args for request in requests):
                answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                found.append(self.exported.weigh(self._message(text, to_visual, doc_id, task, split), answer))
            return found

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError(f"{MODEL} has no multi-round generation: choose another task")

    HiMix.__module__ = MODULE
    return HiMix


def __getattr__(name: str) -> Any:
    """`HiMix`, made when lmms-eval asks for it: nothing else here needs lmms-eval."""
    if name == "HiMix":
        return model_class()
    raise AttributeError(f"module {MODULE} has no attribute {name}")


def _library(module: str) -> Any:
    """Raises: ValueError if lmms-eval is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"lmms-eval is not installed here ({error}): pip install lmms-eval") from None


def register() -> None:
    """Make lmms-eval know `--model himix`. Raises: ValueError if lmms-eval is not installed."""
    models, registry = _library("lmms_eval.models"), _library("lmms_eval.models.registry_v2")
    manifest = registry.ModelManifest(model_id=MODEL, simple_class_path=f"{MODULE}.HiMix")
    models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"give the exported folder first: python -m {MODULE} DIR --tasks pope,mme (further flags are lmms-eval's)"
        )
    if not (Path(words[0]) / "config.json").is_file():
        raise ValueError(f"{words[0]} is no exported model: it has no config.json")
    register()
    sys.argv = ["lmms_eval", "--model", MODEL, "--model_args", f"pretrained={words[0]}", *words[1:]]
    _library("lmms_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    run_main(main)
