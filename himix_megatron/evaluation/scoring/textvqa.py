"""TextVQA: questions about text in images, ten people's answers each.

Source: Singh et al., "Towards VQA models that can read", 2019; the EvalAI processor of M4C, as LLaVA-1.5's evaluation uses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .base import Answered, Tally, mean_tally, means
from .vqa import plain_words, soft_accuracy, without_punctuation


def normalised(answer: str) -> str:
    """Commas and question marks out, a possessive 's a word of its own, then VQA's clean-up."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def score(answer: str, people: Sequence[str]) -> float:
    """0 to 1; the answer and people's answers are cleaned alike."""
    return soft_accuracy(normalised(answer), [normalised(text) for text in people])


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """One mean."""
    return [mean_tally(score(answer, question.gold), question.groups) for question, answer in answered]


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """accuracy_percent."""
    return means(totals)


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """The submission file of the TextVQA challenge: [{"question_id": int, "answer": str}]."""
    rows = [{"question_id": question.id, "answer": answer} for question, answer in answered]
    return {"textvqa_results.json": json.dumps(rows) + "\n"}
