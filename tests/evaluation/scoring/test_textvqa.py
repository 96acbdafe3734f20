"""TextVQA's rules, case by case. Source: the EvalAI processor of M4C, and VQA's soft accuracy."""

from __future__ import annotations

import json

import pytest

from himix_megatron.evaluation.scoring import textvqa
from himix_megatron.evaluation.scoring.base import Question

NORMALISED = {
    "Nokia": "nokia",
    "NOKIA.": "nokia",
    "the nokia": "nokia",
    "a an the": "",
    "Coca-Cola": "coca cola",
    "coca - cola": "coca cola",
    "mcdonald's": "mcdonald 's",  # a possessive is a word of its own
    "McDonalds": "mcdonalds",
    "it's": "it 's",
    "12:45": "12:45",
    "$5.99": "$5.99",
    "1,000": "1000",
    "1,2,3": "123",
    "9,": "9",
    "yes, sir": "yes sir",
    "why?": "why",
    "why ?": "why",
    "st. louis": "st louis",
    "p.m.": "pm",
    ".com": "com",
    "20.": "20",
    "twenty": "twenty",
    "Seven up": "7 up",
    "none": "0",
    "dont walk": "don't walk",
    "a/c": "c",  # the letter before the slash is an article once it stands alone
    "r&b": "r&b",
    "50%": "50%",
    "(stop)": "stop",
    "john@mail.com": "john mailcom",
    "line\none": "line 1",
    "tab\tone": "tab 1",
    "   ": "",
}


@pytest.mark.parametrize("answer", NORMALISED)
def test_answer_is_normalised_as_published(answer: str) -> None:
    assert textvqa.normalised(answer) == NORMALISED[answer]


SCORED = {
    "all agree": ("nokia", ["nokia"] * 10, 1.0),
    "people are normalised too": ("7", ["Seven."] * 10, 1.0),
    "two of ten": ("ibm", ["IBM", "ibm."] + ["hp"] * 8, 0.6),
    "one of ten": ("ibm", ["IBM"] + ["hp"] * 9, 0.3),
    "none of ten": ("dell", ["IBM"] + ["hp"] * 9, 0.0),
    "close is not equal": ("mcdonalds", ["mcdonald's"] * 10, 0.0),
    "unanswerable as people said": ("unanswerable", ["unanswerable"] * 3 + ["2"] * 7, 0.9),
    "silence where people were silent": ("", ["."] * 10, 1.0),
}


@pytest.mark.parametrize("case", SCORED)
def test_score(case: str) -> None:
    answer, people, wanted = SCORED[case]
    assert textvqa.score(answer, people) == pytest.approx(wanted)


def test_the_file_is_the_challenges() -> None:
    question = Question(id=34602, text="what brand?", prompt="what brand?", gold=("dakota",) * 10)
    (content,) = textvqa.files([(question, "Dakota")]).values()
    assert json.loads(content) == [{"question_id": 34602, "answer": "Dakota"}]
