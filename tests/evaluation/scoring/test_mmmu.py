"""MMMU's rules, case by case. Source: eval/eval_utils.py of the benchmark (letters, option texts, key words, numbers)."""

from __future__ import annotations

import json

import pytest

from himix_megatron.evaluation.scoring import mmmu
from himix_megatron.evaluation.scoring.base import Question

OPTIONS = ("cat", "cat dog", "Blue Whale", "75 + 13.3 cos(250t)V")
CHOSEN = {
    "A": "A",
    "B.": "B",
    "(C)": "C",
    "C,": "C",
    "'D'": "D",
    "D?!": "D",
    "D!?": None,  # each mark is stripped once, in a fixed order: ! before ?
    "A or B": "B",  # the last letter counts
    "B, not A": "A",
    "(A) or (B)": "B",
    "(B) rather than A": "B",  # a bracketed letter before a bare one
    "The answer is (D).": "D",
    "The answer is D": "D",
    "answer:B": None,
    "A.": "A",
    "A. cat": None,  # neither "(A)" nor " A ", and too short to look for texts
    "A) cat": None,
    "a": None,
    "b dog": None,
    "E": None,
    "(E)": None,
    "": None,
    "cat": None,  # fewer than six words
    "I would say that it is a blue whale": "C",
    "it has to be a cat dog I think": "A",  # both texts begin there: the first of equals
    "one two three four five six": None,
    "The signal is 75 + 13.3 cos(250t)V as derived above": "D",
    "A blue whale is not what I see here": "A",
}


@pytest.mark.parametrize("response", CHOSEN)
def test_letter_is_found_as_published(response: str) -> None:
    assert mmmu.chosen(response, OPTIONS) == CHOSEN[response]


def question(*gold: str, options: tuple[str, ...] = (), identifier: str = "validation_Math_1") -> Question:
    return Question(id=identifier, text="?", prompt="?", gold=gold, options=options, groups=("Science", "Math"))


def test_where_no_letter_is_found_the_id_decides_a_guess() -> None:
    guesses = [mmmu.choice("hm", question(options=OPTIONS, identifier=f"validation_Math_{n}")) for n in range(400)]
    assert guesses == [mmmu.choice("what?", question(options=OPTIONS, identifier=f"validation_Math_{n}")) for n in range(400)]
    assert all(60 < guesses.count(letter) < 140 for letter in "ABCD")


OPEN = {
    # a number equals a number to two decimals, however it is written
    ("30", "30"): True,
    ("30.0", "30"): True,
    ("30.004", "30"): True,
    ("30.01", "30"): False,
    ("1,000", "1000"): True,
    ("1e3", "1000"): True,
    ("-3", "3"): False,
    ("x is .5", "0.5"): True,
    (".5", "0.5"): False,  # periods at the ends are taken off first
    ("36 watts", "36"): True,
    ("The answer is 36 watts.", "36"): True,
    ("36% of 50", "50"): True,
    ("x = 4 + 5 = 9", "9"): True,
    ("x = 4 + 5 = 9", "4"): False,  # only what stands behind the last equals sign
    ("First 7\nso the result is 8", "8"): True,
    ("First 7\nso the result is 8", "7"): False,
    ("1,000,000 dollars", "1000000"): True,
    # text: the right answer is a part of what was said
    ("It is a Sine Wave.", "sine wave"): True,
    ("sine", "sine wave"): False,
    ("the sine wave of course", "Sine Wave"): True,
    ("therefore mitochondria", "mitochondria"): True,
    ("I think that x", "y"): False,
    ("band", "b"): False,  # a single letter needs a space beside it
    ("b and c", "b"): True,
    ("", "30"): False,
    ("thirty", "30"): False,
}


@pytest.mark.parametrize(("response", "gold"), OPEN)
def test_open_answer_is_read_as_published(response: str, gold: str) -> None:
    assert mmmu.is_right(question(gold), response) is OPEN[response, gold]


def test_one_of_several_right_answers_is_enough() -> None:
    assert mmmu.is_right(question("24/7", "3.429"), "it is 3.43")
    assert mmmu.is_right(question("24/7", "3.429"), "24/7")


def test_readings_of_a_response_are_its_key_parts_and_their_numbers() -> None:
    assert mmmu.readings("The area could be 12 m2") == {"12 m2", 12.0, 2.0}
    assert mmmu.readings("So the total is 1,200.\nFinal answer 12") == {1200.0, 200.0, 12.0}
    assert mmmu.readings("Nothing of that kind") == {"nothing of that kind"}


def test_figures_by_domain_and_subject_and_the_file_is_the_official_one() -> None:
    answered = [
        (question("B", options=OPTIONS, identifier="validation_Math_1"), "(B)"),
        (question("A", options=OPTIONS, identifier="validation_Math_2"), "no idea"),
        (question("30", identifier="validation_Math_3"), "36 watts"),
    ]
    tallies = mmmu.tallies(answered)
    totals = {name: sum(tally.get(name, 0.0) for tally in tallies) for tally in tallies for name in tally}
    found = mmmu.figures(totals)
    guess = mmmu.choice("no idea", answered[1][0])
    right = 1 + (guess == "A")
    assert found["accuracy_percent"] == found["accuracy_percent/Science"] == found["accuracy_percent/Math"]
    assert found["accuracy_percent"] == pytest.approx(100 * right / 3)
    assert found["guessed_percent"] == pytest.approx(100 / 3)
    (content,) = mmmu.files(answered).values()
    wanted = {"validation_Math_1": "B", "validation_Math_2": guess, "validation_Math_3": "36 watts"}
    assert json.loads(content) == wanted


def test_subjects_come_from_ids() -> None:
    assert mmmu.subject_of("validation_Art_Theory_12") == "Art_Theory"
    assert len(mmmu.DOMAIN_OF) == 30
    with pytest.raises(ValueError, match="split_Subject_number, not 12"):
        mmmu.subject_of("12")
