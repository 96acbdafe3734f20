"""MMMU: college-level questions of 30 subjects, multiple-choice or open.

Source: Yue et al., "MMMU", 2024, and its eval/eval_utils.py (MMMU-Benchmark/MMMU), whose reading of free-form answers this is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from .base import Answered, Question, Tally, mean_tally, means

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}

# Words after which the answer of a free-form response usually stands; an equals sign only in the last line.
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# Three ways to write a number: 1,000,000; 1.5e-3; 12, 1.5, .5. The last is not the start of one of the others.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])"),
)


def subject_of(identifier: str) -> str:
    """`validation_Art_Theory_12` is of Art_Theory. Raises: ValueError for another form."""
    found = re.fullmatch(r"[a-z]+_(.+)_\d+", identifier)
    if found is None:
        raise ValueError(f"MMMU's questions are called split_Subject_number, not {identifier}")
    return found[1]


def chosen(response: str, options: Sequence[str]) -> str | None:
    """The letter a response chooses: the last "(A)" in it, else the last " A " between spaces, else, in a response of more than
    five words, the option whose text comes last; None where there is none of these.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    padded = f" {response} "
    letters = [chr(ord("A") + number) for number in range(len(options))]
    for form in ("({})", " {} "):
        places = {letter: padded.rfind(form.format(letter)) for letter in letters}
        if max(places.values(), default=-1) >= 0:
            return max(letters, key=lambda letter: places[letter])
    if len(padded.split()) > 5:
        places = {letter: padded.lower().rfind(text.lower()) for letter, text in zip(letters, options, strict=True)}
        if max(places.values(), default=-1) >= 0:
            return max(letters, key=lambda letter: places[letter])
    return None


def choice(response: str, question: Question) -> str:
    """The letter a response chooses, or a guess where it chooses none.

    The official evaluation guesses with a seeded generator, in the order of the questions; here the question's id decides,
    so that the guess stays the same whatever else is asked.
    """
    guess = int(hashlib.sha256(str(question.id).encode()).hexdigest(), 16) % len(question.options)
    return chosen(response, question.options) or chr(ord("A") + guess)


def _forms(text: str) -> list[str | float]:
    """A number rounded to two decimals; other text in lower case, a single letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _key_parts(response: str) -> list[str]:
    """Of each line the shortest end behind a key word; the whole response where no line has one."""
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    found = []
    for number, line in enumerate(lines):
        shortest = ""
        for key in (*_KEYS, "=") if number == len(lines) - 1 else _KEYS:
            if key in line:
                end = line.split(key)[-1].strip()
                shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in set(":,.!?;'"):
            found.append(shortest)
    return found or [whole]


def readings(response: str) -> set[str | float]:
    """Everything an open response may mean: its key parts, and the numbers in them."""
    parts = _key_parts(response)
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return {form for text in (*parts, *numbers) for form in _forms(text)}


def is_right(question: Question, response: str) -> bool:
    """Multiple choice: the right letter. Open: a right answer is among the numbers read, or is part of a text read."""
    if question.options:
        return choice(response, question) in question.gold
    wanted = {form for answer in question.gold for form in _forms(answer)}
    texts = [form for form in wanted if isinstance(form, str)]
    return any(
        any(text in reading for text in texts) if isinstance(reading, str) else reading in wanted
        for reading in readings(response)
    )


def tallies(answered: Sequence[Answered]) -> list[Tally]:
    """By subject and domain; and how often a choice had to be guessed."""
    found = []
    for question, response in answered:
        guessed = bool(question.options) and chosen(response, question.options) is None
        tally = mean_tally(is_right(question, response), question.groups)
        found.append(tally | mean_tally(guessed, (), "guessed_percent"))
    return found


def figures(totals: Mapping[str, float]) -> dict[str, float]:
    """accuracy_percent over all questions, by domain and by subject; guessed_percent of them had no readable choice."""
    return means(totals)


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """What main_eval_only.py and the test server read: {id: letter, or the open response as it is}."""
    rows = {str(question.id): choice(answer, question) if question.options else answer for question, answer in answered}
    return {"mmmu_results.json": json.dumps(rows, indent=2) + "\n"}
