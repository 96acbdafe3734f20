"""MME: two yes-no questions an image, one to be affirmed and one denied, in 14 categories.

Source: Fu et al., "MME: a comprehensive evaluation benchmark for multimodal large language models", 2023, section 2.1, and its
eval_tool/calculation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal

from .base import Answered, Tally, one_line, ratio

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def verdict(answer: str) -> Literal["yes", "no", "other"]:
    """What the first four characters contain, in any case: yes, else no, else neither (always wrong)."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _by_image(answered: Sequence[Answered]) -> dict[tuple[str, str], list[Answered]]:
    """The two questions of each image, by (category, image).

    Raises: ValueError where an image does not have two.
    """
    pairs: dict[tuple[str, str], list[Answered]] = {}
    for question, answer in answered:
        pairs.setdefault((question.groups[0], question.images[0]), []).append((question, answer))
    for (category, image), pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"MME asks two questions an image, but {category} has {len(pair)} about {image}")
    return pairs


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """One for each image: its right answers, and whether both are right."""
    found = []
    for (category, _), pair in _by_image(answered).items():
        right = sum(verdict(answer) == question.gold[0].strip().lower() for question, answer in pair)
        values = {"right": right, "questions": 2, "both right": right == 2, "images": 1}
        found.append({f"{category}: {name}": float(value) for name, value in values.items()})
    return found


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """perception (0 to 2000) and cognition (0 to 800): sums over categories of accuracy + accuracy_plus, in percent each.

    accuracy counts questions; accuracy_plus counts images with both questions right.
    """
    parts: dict[str, float] = {}
    scores: dict[str, float] = {}
    for category in dict.fromkeys(name.split(": ")[0] for name in totals):
        accuracy = 100 * ratio(totals[f"{category}: right"], totals[f"{category}: questions"])
        plus = 100 * ratio(totals[f"{category}: both right"], totals[f"{category}: images"])
        scores[category] = accuracy + plus
        parts |= {f"accuracy_percent/{category}": accuracy, f"accuracy_plus_percent/{category}": plus}
    sums = {
        name: sum(scores[category] for category in group if category in scores)
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
        if any(category in scores for category in group)
    }
    return sums | {f"score/{category}": score for category, score in scores.items()} | parts


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """One file a category, a line a question: image, question, right answer, answer, with tabs between."""
    lines: dict[str, list[str]] = {}
    for (category, image), pair in _by_image(answered).items():
        for question, answer in pair:
            gold = question.gold[0] if question.gold else ""
            cells = (PurePosixPath(image).name, question.text, gold, one_line(answer))
            lines.setdefault(category, []).append("\t".join(cells))
    return {f"{category}.txt": "\n".join(rows) + "\n" for category, rows in lines.items()}
