"""VQAv2's rules, case by case. Source: visualqa.org/evaluation, its seven steps and its leave-one-out mean."""

from __future__ import annotations

import json

import pytest

from himix_megatron.evaluation.scoring import vqav2
from himix_megatron.evaluation.scoring.base import Question
from himix_megatron.evaluation.scoring.vqa import plain_words, soft_accuracy, without_punctuation

CLEANED = {
    # lower case; periods out unless they are decimal points
    "Yes": "yes",
    "Yes.": "yes",
    "u.s.": "us",
    "3.5": "3.5",
    "3.": "3",
    "v2.0.": "v2.0",
    "...": "",
    # number words
    "two": "2",
    "Ten": "10",
    "none": "0",
    "eleven": "eleven",
    "twenty one": "twenty 1",
    # articles
    "a dog": "dog",
    "The man and an umbrella": "man and umbrella",
    "vitamin a": "vitamin",
    # contractions
    "dont know": "don't know",
    "couldntve": "couldntve",  # two apostrophes missing: not in the list
    "couldnt've": "couldn't've",
    "hell": "hell",  # he'll is not in the list either
    "yall'll": "y'all'll",
    "somebody'd": "somebodyd",
    # apostrophes and colons stay
    "girl's": "girl's",
    "2:50 pm": "2:50 pm",
    # other marks become spaces, or nothing beside a space
    "t-shirt": "t shirt",
    "black/white": "black white",
    "black / white": "black white",
    "blue, green": "blue green",
    "blue,green": "blue green",
    "(red)": "red",
    "what?!": "what",
    # a comma between digits: nothing in the text becomes a space
    "100,978": "100978",
    "1,000 t-shirts": "1000 tshirts",
    # white space
    "  two \n dogs\t": "2 dogs",
    "": "",
}


@pytest.mark.parametrize("answer", CLEANED)
def test_answer_is_cleaned_as_published(answer: str) -> None:
    assert plain_words(without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())) == CLEANED[answer]


@pytest.mark.parametrize(("agreeing", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_three_agreeing_people_are_a_whole_point_less_what_leaving_one_out_takes(agreeing: int, wanted: float) -> None:
    assert soft_accuracy("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(wanted)


def test_soft_accuracy_equals_the_mean_over_the_ten_subsets() -> None:
    people = ["a", "a", "b", "c", "a", "b", "d", "d", "d", "d"]
    for said in "abcde":
        subsets = [people[:left] + people[left + 1 :] for left in range(10)]
        mean = sum(min(1.0, subset.count(said) / 3) for subset in subsets) / 10
        assert soft_accuracy(said, people) == pytest.approx(mean)


SCORED = {
    "all agree, in another case": ("Yes", ["yes"] * 10, 1.0),
    "all agree, with a period": ("yes.", ["yes"] * 10, 1.0),
    "a word for a number": ("Two", ["2"] * 4 + ["3"] * 6, 1.0),
    "an article more": ("a cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
    "people's marks go where they differ": ("t-shirt", ["t-shirt"] * 5 + ["shirt"] * 5, 1.0),
    "and stay where they do not": ("t-shirt", ["t-shirt"] * 10, 0.0),
    "people's number words stay": ("two", ["two"] * 5 + ["2"] * 5, 1.0),
    "of them alone nobody agrees": ("two", ["two"] * 5 + ["three"] * 5, 0.0),
    "silence": ("", ["yes"] * 10, 0.0),
    "more than was asked": ("yes it is", ["yes"] * 10, 0.0),
}


@pytest.mark.parametrize("case", SCORED)
def test_score(case: str) -> None:
    answer, people, wanted = SCORED[case]
    assert vqav2.score(answer, people) == pytest.approx(wanted)


def test_figures_are_means_by_answer_type_and_the_file_is_the_servers() -> None:
    def ask(identifier: int, kind: str, right: int) -> Question:
        gold = ("yes",) * right + ("no",) * (10 - right)
        return Question(id=identifier, text="?", prompt="?", gold=gold, groups=(kind,))

    answered = [(ask(1, "yes/no", 10), "Yes"), (ask(2, "yes/no", 0), "yes"), (ask(3, "other", 2), "yes")]
    tallies = vqav2.tallies(answered)
    totals = {name: sum(tally.get(name, 0.0) for tally in tallies) for tally in tallies for name in tally}
    wanted = {"accuracy_percent": 160 / 3, "accuracy_percent/yes/no": 50.0, "accuracy_percent/other": 60.0}
    assert vqav2.figures(totals) == pytest.approx(wanted)
    (content,) = vqav2.files(answered).values()
    assert json.loads(content)[0] == {"question_id": 1, "answer": "Yes"}
