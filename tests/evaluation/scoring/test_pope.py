"""POPE's rules, case by case. Source: its evaluate.py: the first sentence, three words that mean no, everything else yes."""

from __future__ import annotations

import json

import pytest

from himix_megatron.evaluation.scoring import pope
from himix_megatron.evaluation.scoring.base import Question

VERDICTS = {
    "yes": "yes",
    "Yes": "yes",
    "Yes.": "yes",
    "no": "no",
    "No": "no",
    "No.": "no",
    "No, there is no dog": "no",
    "no,": "no",
    "NO": "yes",  # only No and no are words for it
    "nO": "yes",
    "no!": "yes",
    "no\n": "yes",
    "There is not a dog": "no",
    "Not a dog": "yes",
    "There isn't a dog": "yes",
    "None": "yes",
    "nothing": "yes",
    "Yes. No": "yes",  # the first sentence decides
    "There is a dog. There is no cat": "yes",
    "Yes, there is no doubt": "no",
    "I do not know": "no",
    "I don't know": "yes",
    ". no": "yes",
    "": "yes",
    "maybe": "yes",
    "0": "yes",
    " no": "no",
    "no  ": "no",
    "Is there a dog, no": "no",
    "no.1": "no",
}


@pytest.mark.parametrize("answer", VERDICTS)
def test_verdict_is_the_official_one(answer: str) -> None:
    assert pope.verdict(answer) == VERDICTS[answer]


def ask(number: int, label: str, split: str) -> Question:
    return Question(
        id=f"{split}/{number}", text=f"Is there a {number} in the image?", prompt="", gold=(label,), groups=(split,)
    )


def figures_of(answered: list[tuple[Question, str]]) -> dict[str, float]:
    tallies = pope.tallies(answered)
    return pope.figures({name: sum(t.get(name, 0.0) for t in tallies) for tally in tallies for name in tally})


def test_figures_of_a_worked_split() -> None:
    """3 true positives, 1 false positive, 4 true negatives, 2 false negatives."""
    rows = [("yes", "yes")] * 3 + [("no", "yes")] + [("no", "no")] * 4 + [("yes", "no")] * 2
    found = figures_of([(ask(n, label, "random"), answer) for n, (label, answer) in enumerate(rows)])
    precision, recall = 3 / 4, 3 / 5
    wanted = {
        "accuracy_percent": 70.0,
        "precision_percent": 100 * precision,
        "recall_percent": 100 * recall,
        "f1_percent": 100 * 2 * precision * recall / (precision + recall),
        "yes_percent": 40.0,
    }
    assert found == pytest.approx(wanted | {f"{name}/random": value for name, value in wanted.items()})


def test_the_mean_is_over_splits_and_not_over_questions() -> None:
    answered = [(ask(n, "yes", "random"), "yes") for n in range(9)] + [(ask(0, "yes", "popular"), "no")]
    found = figures_of(answered)
    assert found["f1_percent/random"] == 100.0
    assert found["f1_percent/popular"] == 0.0
    assert found["f1_percent"] == 50.0


def test_a_model_that_never_says_yes_has_no_precision_and_no_error() -> None:
    found = figures_of([(ask(0, "yes", "random"), "no"), (ask(1, "no", "random"), "no")])
    assert found["f1_percent"] == found["precision_percent"] == 0.0
    assert found["accuracy_percent"] == 50.0


def test_files_are_lines_of_question_and_answer_for_each_split() -> None:
    files = pope.files(
        [(ask(1, "yes", "random"), "Yes.\nIt is"), (ask(2, "no", "random"), "No"), (ask(1, "no", "popular"), "No")]
    )
    assert list(files) == ["coco_pope_random_answers.json", "coco_pope_popular_answers.json"]
    lines = [json.loads(line) for line in files["coco_pope_random_answers.json"].splitlines()]
    assert lines[0] == {"question_id": "1", "question": "Is there a 1 in the image?", "answer": "Yes. It is"}
    assert len(lines) == 2
