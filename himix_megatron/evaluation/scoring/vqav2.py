"""VQAv2: open questions about COCO images, ten people's answers each.

Source: Goyal et al., "Making the V in VQA matter", 2017; visualqa.org/evaluation; GT-Vision-Lab/VQA, vqaEval.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .base import Answered, Tally, mean_tally, means
from .vqa import plain_words, soft_accuracy, without_punctuation


def score(answer: str, people: Sequence[str]) -> float:
    """0 to 1. The answer is cleaned wholly; people's answers only of punctuation, and only where they differ."""
    said = plain_words(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))
    known = [without_punctuation(text) for text in people] if len(set(people)) > 1 else people
    return soft_accuracy(said, known)


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """By answer type (yes/no, number, other)."""
    return [mean_tally(score(answer, question.gold), question.groups) for question, answer in answered]


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """accuracy_percent, and the same by answer type."""
    return means(totals)


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """The result file of visualqa.org and its server: [{"question_id": int, "answer": str}]."""
    rows = [{"question_id": question.id, "answer": answer} for question, answer in answered]
    return {"vqav2_results.json": json.dumps(rows) + "\n"}
