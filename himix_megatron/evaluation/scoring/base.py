"""What every benchmark's question is to the scorers, and figures that are means over questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a benchmark."""

    id: str | int
    """As the benchmark numbers it, and as its answer file repeats it; unique among the questions of a run."""
    text: str
    """The question as published."""
    prompt: str
    """What the model is asked: the question and the benchmark's instruction."""
    images: tuple[str, ...] = ()
    """Files, relative to the benchmark's image folder."""
    gold: tuple[str, ...] = ()
    """Right answers: ten people's (VQAv2, TextVQA), or the accepted ones. Empty where they are not public."""
    groups: tuple[str, ...] = ()
    """Under which further headings its score is reported: answer type, split, category, subject."""
    options: tuple[str, ...] = ()
    """Of a multiple-choice question, A first; empty for an open one."""


Answered = tuple[Question, str]
"""A question and the model's answer."""

Tally = dict[str, float]
"""What one unit (a question, or an image with its questions) adds to each sum."""


def mean_tally(value: float, groups: Iterable[str], figure: str = "accuracy_percent") -> Tally:
    """A question's part in the mean over all questions, and in the mean over each of its groups."""
    tally: Tally = {}
    for name in (figure, *(f"{figure}/{group}" for group in groups)):
        tally |= {f"{name} sum": 100.0 * value, f"{name} count": 1.0}
    return tally


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """The means that `mean_tally` prepared, in percent; nan for a group without a question."""
    names = [name.removesuffix(" sum") for name in totals if name.endswith(" sum")]
    return {name: ratio(totals[f"{name} sum"], totals[f"{name} count"]) for name in names}


def ratio(part: float, whole: float) -> float:
    """part / whole; nan where there is nothing."""
    return part / whole if whole else math.nan


def one_line(text: str) -> str:
    """Without line breaks and tabs, which the line formats cannot hold."""
    return " ".join(text.replace("\t", " ").splitlines()).strip()
