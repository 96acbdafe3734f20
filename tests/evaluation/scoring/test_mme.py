"""MME's rules, case by case. Source: section 2.1 of the paper, eval_tool/calculation.py: the first four characters decide."""

from __future__ import annotations

import pytest

from himix_megatron.evaluation.scoring import mme
from himix_megatron.evaluation.scoring.base import Question

VERDICTS = {
    "yes": "yes",
    "Yes": "yes",
    "YES.": "yes",
    "no": "no",
    "No, it is not": "no",
    "Yes, no": "yes",
    "no yes": "no",  # "no y": no yes among the first four
    "a yes": "other",
    " yes": "yes",
    "  yes": "other",
    "\nyes": "yes",
    "not": "no",
    "none": "no",
    "nope": "no",
    "known": "no",
    "Nyes": "yes",
    "N": "other",
    "Y": "other",
    "yeah": "other",
    "yep": "other",
    "true": "other",
    "I think yes": "other",
    "": "other",
    "0": "other",
    "Eyes": "yes",
    "snow": "no",
    "piano": "other",
}


@pytest.mark.parametrize("answer", VERDICTS)
def test_verdict_is_the_official_one(answer: str) -> None:
    assert mme.verdict(answer) == VERDICTS[answer]


def pair(category: str, image: str, *answers: str) -> list[tuple[Question, str]]:
    """The two questions of an image: the first is to be affirmed, the second denied."""
    return [
        (
            Question(
                id=f"{image}#{n}", text=f"Q{n}?", prompt="", images=(f"{category}/{image}",), gold=(gold,), groups=(category,)
            ),
            answer,
        )
        for n, (gold, answer) in enumerate(zip(("Yes", "No"), answers, strict=True))
    ]


def figures_of(answered: list[tuple[Question, str]]) -> dict[str, float]:
    tallies = mme.tallies(answered)
    return mme.figures({name: sum(t.get(name, 0.0) for t in tallies) for tally in tallies for name in tally})


PAIRS = {
    ("yes", "no"): (100.0, 100.0),
    ("yes", "yes"): (50.0, 0.0),
    ("no", "no"): (50.0, 0.0),
    ("no", "yes"): (0.0, 0.0),
    ("yes", "perhaps"): (50.0, 0.0),
    ("perhaps", "perhaps"): (0.0, 0.0),
    ("Yes.", "No, there is not."): (100.0, 100.0),
}


@pytest.mark.parametrize("answers", PAIRS)
def test_accuracy_counts_questions_and_accuracy_plus_images(answers: tuple[str, str]) -> None:
    found = figures_of(pair("color", "1.jpg", *answers))
    assert (found["accuracy_percent/color"], found["accuracy_plus_percent/color"]) == PAIRS[answers]


def test_a_perfect_model_has_2000_and_800() -> None:
    answered = [row for category in (*mme.PERCEPTION, *mme.COGNITION) for row in pair(category, "1.jpg", "yes", "no")]
    found = figures_of(answered)
    assert (found["perception"], found["cognition"]) == (2000.0, 800.0)


def test_a_category_weighs_the_same_whatever_its_size() -> None:
    answered = [row for n in range(3) for row in pair("color", f"{n}.jpg", "yes", "no")] + pair("count", "1.jpg", "yes", "yes")
    found = figures_of(answered)
    assert found["score/color"] == 200.0
    assert found["score/count"] == 50.0
    assert found["perception"] == 250.0
    assert "cognition" not in found


def test_an_image_with_one_question_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two questions an image, but color has 1 about color/1\.jpg"):
        mme.tallies(pair("color", "1.jpg", "yes", "no")[:1])


def test_files_are_what_the_official_tool_reads() -> None:
    answered = [*pair("color", "1.jpg", "Yes\tor\nno", "No"), *pair("OCR", "2.png", "yes", "")]
    files = mme.files(answered)
    assert files["color.txt"] == "1.jpg\tQ0?\tYes\tYes or no\n1.jpg\tQ1?\tNo\tNo\n"
    assert [len(line.split("\t")) for line in files["OCR.txt"].splitlines()] == [4, 4]
