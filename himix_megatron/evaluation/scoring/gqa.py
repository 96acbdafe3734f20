"""GQA: compositional questions about real scenes, one right answer each.

Source: Hudson and Manning, "GQA", 2019, and its eval.py; LLaVA-1.5 lowers the answer's case and takes its last periods off.
Its other measures (consistency, validity, plausibility) need files of 1 GB with all questions and choices: for them there is
eval.py, which reads our answer file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .base import Answered, Tally, mean_tally, means


def prediction(answer: str) -> str:
    """An answer as GQA's vocabulary spells it."""
    return answer.strip().rstrip(".").lower()


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """1 where the answer is the right one, letter for letter; by kind of answer (binary, open) and type of question."""
    return [mean_tally(prediction(answer) in question.gold, question.groups) for question, answer in answered]


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """accuracy_percent, and the same by kind of answer and type of question."""
    return means(totals)


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """What eval.py reads as {tier}_predictions.json: [{"questionId": str, "prediction": str}]."""
    rows = [{"questionId": str(question.id), "prediction": prediction(answer)} for question, answer in answered]
    return {"gqa_predictions.json": json.dumps(rows) + "\n"}
