"""When two short answers are the same, and how much of a point an answer gets from ten people: VQA's and TextVQA's rules.

Both benchmarks compare answers as text after the same clean-up; they differ in what is cleaned and when (`vqav2`, `textvqa`).
The odd corners (see the comments) are those of the official evaluators, since figures are compared across papers.

Source: visualqa.org/evaluation and its evaluation code (GT-Vision-Lab/VQA, vqaEval.py); for TextVQA the EvalAI processor of
M4C (facebookresearch/mmf), which LLaVA-1.5 uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

NUMBER_WORDS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1)
}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Apostrophes stay (girl's is not girls), and so do colons (2:50)."""

# Contractions, spelled right. Each is also recognised with any one of its apostrophes left out, and put right. Those whose
# bare form is another word (he'll, I'll, she'd, we'd, we're) are not in the published list.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
you'd've you'll you're you've
"""
CONTRACTIONS = {
    right[:place] + right[place + 1 :]: right
    for right in _CONTRACTIONS.split()
    for place, letter in enumerate(right)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the published list

# The official pattern means to spare the point after a digit as well, but its look-behind is misspelt and always true.
_PERIOD = re.compile(r"\.(?!\d)")
# re.UNICODE is handed to re.sub as its count: at most 32 periods go.
_MOST_PERIODS = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")


@functools.lru_cache(maxsize=100_000)  # the same few answers make up most of two million
def without_punctuation(text: str) -> str:
    """Punctuation out.

    A mark that stands beside a space anywhere in the text is deleted wherever it is; another one becomes a space. Where a
    comma stands between digits anywhere, every mark is deleted (100,978 is 100978). Periods go unless a digit follows.
    """
    number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back into contractions, single spaces."""
    numbered = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """The mean of min(1, agreeing people / 3) over all ways to leave one person out: three who agree are enough.

    Answer and people's answers are compared as they are. Source: visualqa.org/evaluation.
    """
    agreeing = sum(other == answer for other in people)
    without_one_agreeing = min(1.0, (agreeing - 1) / 3) if agreeing else 0.0
    without_another = min(1.0, agreeing / 3)
    return (agreeing * without_one_agreeing + (len(people) - agreeing) * without_another) / len(people)
