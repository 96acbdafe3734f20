"""POPE: is there such an object in the image? Three splits by how the absent objects were chosen.

Source: Li et al., "Evaluating object hallucination in large vision-language models", 2023, and its evaluate.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from .base import Answered, Tally, one_line, ratio

NO = {"No", "not", "no"}


def verdict(answer: str) -> Literal["yes", "no"]:
    """`no` where the first sentence, up to a period, has the word No, no or not; `yes` in every other case, silence included.

    Words are what spaces separate, commas taken out. Upper-case NO is no such word, nor is "no!": so the official reading.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if NO.intersection(words) else "yes"


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """True and false positives and negatives by split; "yes" is positive."""
    found = []
    for question, answer in answered:
        said, right = verdict(answer), question.gold[0]
        outcome = ("true" if said == right else "false") + (" positive" if said == "yes" else " negative")
        (split,) = question.groups
        # Every outcome is named, so that a split without any still has its figures.
        kinds = ("true positive", "false positive", "true negative", "false negative")
        found.append({f"{split}: {kind}": float(kind == outcome) for kind in kinds})
    return found


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and share of yes for each split, and their means over the splits (as papers report)."""
    splits = list(dict.fromkeys(name.split(": ")[0] for name in totals))
    found = {
        f"{name}/{split}": value
        for split in splits
        for name, value in _of_split(
            {name.split(": ")[1]: n for name, n in totals.items() if name.startswith(f"{split}: ")}
        ).items()
    }
    names = dict.fromkeys(name.split("/")[0] for name in found)
    return {name: sum(found[f"{name}/{split}"] for split in splits) / len(splits) for name in names} | found


def _of_split(counts: Mapping[str, float]) -> dict[str, float]:
    """In percent. Where no answer was yes, precision and f1 are 0 (the official evaluation divides by zero)."""
    right_yes, wrong_yes = counts["true positive"], counts["false positive"]
    right_no, wrong_no = counts["true negative"], counts["false negative"]
    asked = right_yes + wrong_yes + right_no + wrong_no
    precision = right_yes / (right_yes + wrong_yes) if right_yes + wrong_yes else 0.0
    recall = right_yes / (right_yes + wrong_no) if right_yes + wrong_no else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "accuracy_percent": 100 * ratio(right_yes + right_no, asked),
        "precision_percent": 100 * precision,
        "recall_percent": 100 * recall,
        "f1_percent": 100 * f1,
        "yes_percent": 100 * ratio(right_yes + wrong_yes, asked),
    }


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """One answer file a split, in the questions' order: a line {"question": str, "answer": str} each."""
    lines: dict[str, list[str]] = {}
    for question, answer in answered:
        row = {"question_id": str(question.id).split("/")[-1], "question": question.text, "answer": one_line(answer)}
        lines.setdefault(question.groups[0], []).append(json.dumps(row))
    return {f"coco_pope_{split}_answers.json": "\n".join(rows) + "\n" for split, rows in lines.items()}
