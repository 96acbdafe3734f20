"""Answers questions with an exported folder, by transformers alone: run in a process of its own, by tests.

    python plain_transformers.py FOLDER QUESTIONS.json ANSWERS.json

QUESTIONS.json: a list of {"messages": [...], "images": [paths]}; ANSWERS.json: a list of texts. Imports nothing of this
project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

# As in an environment without them: importing either fails from here on, wherever they are installed.
sys.modules["himix_megatron"] = sys.modules["megatron"] = None  # type: ignore[assignment]
BATCH = 32


def main(folder: str, questions: str, answers: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    asked = json.loads(Path(questions).read_text())
    found: list[str] = []
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        images = [question["images"] for question in part]
        inputs = processor(conversation=[question["messages"] for question in part], images=images if any(images) else None)
        found += processor.answers(model.generate(**inputs, max_new_tokens=32), inputs)
    Path(answers).write_text(json.dumps(found))
    try:
        import himix_megatron  # noqa: F401
    except ImportError:
        return
    raise SystemExit("himix_megatron can be imported: this proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
