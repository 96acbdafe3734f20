"""GQA's rules, case by case. Source: its eval.py (equal strings, binary or open by structural type), LLaVA's conversion."""

from __future__ import annotations

import json

import pytest

from himix_megatron.evaluation.scoring import gqa
from himix_megatron.evaluation.scoring.base import Question

RIGHT = {
    ("yes", "yes"): True,
    ("Yes", "yes"): True,
    ("Yes.", "yes"): True,
    ("YES...", "yes"): True,
    (" yes ", "yes"): True,
    ("yes", "no"): False,
    ("yes!", "yes"): False,
    ("yes,", "yes"): False,
    ("yes, it is", "yes"): False,
    ("the chair", "chair"): False,
    ("chairs", "chair"): False,
    ("chair", "chairs"): False,
    ("to the left of", "to the left of"): True,
    ("left", "to the left of"): False,
    ("T-shirt", "t-shirt"): True,
    ("t shirt", "t-shirt"): False,
    ("men's room.", "men's room"): True,
    ("3", "3"): True,
    ("three", "3"): False,
    ("grey", "gray"): False,
    ("", "yes"): False,
    (".", "yes"): False,
    ("light brown", "light brown"): True,
    ("brown", "light brown"): False,
    ("dr. pepper", "dr. pepper"): True,
    ("yes. no", "yes"): False,
}


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_only_the_right_answer_letter_for_letter_counts(answer: str, gold: str) -> None:
    (tally,) = gqa.tallies([(Question(id="1", text="?", prompt="?", gold=(gold,)), answer)])
    assert tally["accuracy_percent sum"] == 100.0 * RIGHT[answer, gold]


def test_figures_by_kind_and_type() -> None:
    def ask(identifier: str, gold: str, *groups: str) -> Question:
        return Question(id=identifier, text="?", prompt="?", gold=(gold,), groups=groups)

    answered = [
        (ask("1", "yes", "binary", "structural verify"), "Yes"),
        (ask("2", "no", "binary", "structural logical"), "Yes"),
        (ask("3", "red", "open", "structural query"), "red."),
        (ask("4", "car", "open", "structural query"), "bus"),
        (ask("5", "car", "open", "structural query"), "car"),
    ]
    tallies = gqa.tallies(answered)
    totals = {name: sum(tally.get(name, 0.0) for tally in tallies) for tally in tallies for name in tally}
    assert gqa.figures(totals) == pytest.approx(
        {
            "accuracy_percent": 60.0,
            "accuracy_percent/binary": 50.0,
            "accuracy_percent/open": 200 / 3,
            "accuracy_percent/structural verify": 100.0,
            "accuracy_percent/structural logical": 0.0,
            "accuracy_percent/structural query": 200 / 3,
        }
    )
    (content,) = gqa.files(answered).values()
    assert json.loads(content)[2] == {"questionId": "3", "prediction": "red"}
