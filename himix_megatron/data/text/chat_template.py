"""A conversation in, token ids, a loss mask and the places of its images out: one template per model family.

HiMix puts no image token in the text: `<image>` marks are removed, each with one newline beside it, and an image keeps its
place as the number of text tokens before its mark, so the text is the same wherever its images stand. The loss covers each
answer and the token that ends it, nothing else. Every text has at least one token before its first answer, so that the
answer's first token is predicted too: a BOS where the family has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import BadSampleError
from .tokenizer import Piece, Tokenizer

IMAGE_MARK = "<image>"
_MARK = re.compile(r"<image>\n|\n<image>|<image>")

Conversation = Mapping[str, Any]
"""A sample as a shard holds it: {"id": ..., "conversations": [{"from": "human"|"gpt", "value": ...}, ...]}."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One sample's text."""

    ids: npt.NDArray[np.int64]
    """int64[T]."""
    loss_mask: npt.NDArray[np.bool_]
    """bool[T]: the token is part of an answer, so predicting it counts."""
    was_cut: bool
    """Tokens beyond the limit were dropped."""
    image_places: npt.NDArray[np.int64]
    """int64[images], 0 to T: the text tokens before each `<image>` mark, in the marks' order."""


class EncodedPrompt(NamedTuple):
    """What generation starts from."""

    ids: npt.NDArray[np.int64]
    """int64[T]."""
    image_places: tuple[int, ...]
    """0 to T: the text tokens before each `<image>` mark, in the marks' order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """How a family spells a conversation: opening, then per turn: before_question, question, before_answer, answer, end."""

    opening: tuple[Piece, ...]
    before_question: tuple[Piece, ...] = ()
    before_answer: tuple[Piece, ...] = ()
    answer_prefix: str = ""
    """Written before the answer, and part of it: tokenizers join the space with the first word."""
    end: Piece
    between: tuple[Piece, ...] = ()
    """Before each question but the first."""
    has_questions: bool = True
    """False: captions only, the question is not written."""

    @property
    def needs(self) -> list[str]:
        """Special tokens the tokenizer must have."""
        pieces = (*self.opening, *self.before_question, *self.before_answer, self.end, *self.between)
        return list(dict.fromkeys(piece.text for piece in pieces if piece.special))


def _special(name: str) -> Piece:
    return Piece(name, special=True)


def _header_llama3(role: str) -> tuple[Piece, ...]:
    return (_special("<|start_header_id|>"), Piece(role), _special("<|end_header_id|>"), Piece("\n\n"))


TEMPLATES = {
    # LLaVA's pretraining format: the caption and a newline. "start" is BOS, or EOS for a family without one (Qwen2).
    "plain": ChatTemplate(opening=(_special("start"),), end=Piece("\n", loss=True), has_questions=False),
    # Vicuna v1.1 (FastChat), as LLaVA-1.5 uses it.
    "vicuna": ChatTemplate(
        opening=(
            _special("bos"),
            Piece(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            ),
        ),
        before_question=(Piece("USER: "),),
        before_answer=(Piece(" ASSISTANT:"),),
        answer_prefix=" ",
        end=Piece("eos", special=True, loss=True),
    ),
    # Llama 3's own chat format, without a system turn.
    "llama3": ChatTemplate(
        opening=(_special("bos"),),
        before_question=_header_llama3("user"),
        before_answer=(_special("<|eot_id|>"), *_header_llama3("assistant")),
        end=Piece("<|eot_id|>", special=True, loss=True),
    ),
    # Qwen2's own chat format with its default system turn.
    "chatml": ChatTemplate(
        opening=(_special("<|im_start|>"), Piece("system\nYou are a helpful assistant."), _special("<|im_end|>"), Piece("\n")),
        before_question=(_special("<|im_start|>"), Piece("user\n")),
        before_answer=(_special("<|im_end|>"), Piece("\n"), _special("<|im_start|>"), Piece("assistant\n")),
        end=Piece("<|im_end|>", special=True, loss=True),
        between=(Piece("\n"),),
    ),
    # For the built-in byte tokenizer: four tokens of overhead for a question and its answer.
    "tiny": ChatTemplate(
        opening=(_special("bos"),),
        before_question=(_special("<user>"),),
        before_answer=(_special("<assistant>"),),
        end=Piece("<end>", special=True, loss=True),
    ),
}


def check_turns(turns: Any) -> None:
    """Check that what comes from outside has the form of turns. Raises: BadSampleError with reason `malformed`."""
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("malformed", "`conversations` is not a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise BadSampleError("malformed", 'a turn is not {"from": text, "value": text}')


def check_conversation(turns: Any, num_images: int) -> None:
    """Check a conversation as it comes from outside.

    Raises: BadSampleError with reason `malformed`, `roles` or `image_marks`.
    """
    check_turns(turns)
    roles = [turn["from"] for turn in turns]
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise BadSampleError("roles", "human and gpt must take turns, human first and gpt last")
    num_marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
    if num_marks != num_images:
        raise BadSampleError("image_marks", f"{num_marks} {IMAGE_MARK} marks for {num_images} images")


def without_marks(text: str) -> str:
    """Text without `<image>` marks; each takes the newline before it along, or else the one after it."""
    return _said(text).text


def _said(text: str, prefix: str = "", *, loss: bool = False) -> Piece:
    """A turn's text behind a prefix, without `<image>` marks, and where they stood."""
    stretches = _MARK.split(text)
    joined = "".join(stretches)
    said, stripped = joined.strip(), len(joined) - len(joined.lstrip())
    offsets = (min(max(0, offset - stripped), len(said)) for offset in accumulate(map(len, stretches[:-1])))
    return Piece(prefix + said, loss=loss, marks=tuple(len(prefix) + offset for offset in offsets))


def with_marks(turns: Sequence[Mapping[str, str]], num_images: int) -> list[dict[str, str]]:
    """Turns as most datasets have them: with a mark for each image before the first question, if there are no marks yet."""
    marks = IMAGE_MARK * num_images * all(IMAGE_MARK not in turn["value"] for turn in turns)
    return [{**turn, "value": (marks if number == 0 else "") + turn["value"]} for number, turn in enumerate(turns)]


def turns_of(conversation: Conversation) -> list[tuple[str, str]]:
    """(question, answer) of each turn, marks removed; the last answer is empty where the last turn is a question."""
    return [(without_marks(question), without_marks(answer)) for question, answer in _marked_turns(conversation)]


def _marked_turns(conversation: Conversation) -> list[tuple[str, str]]:
    texts = [turn["value"] for turn in conversation["conversations"]]
    return list(zip(texts[::2], [*texts[1::2], ""][: len(texts[::2])], strict=True))


def check_tokenizer(tokenizer: Tokenizer, template: str) -> None:
    """Raises: ValueError when the tokenizer lacks a token that the template needs."""
    missing = [name for name in template_of(template, tokenizer).needs if tokenizer.special_id(name) is None]
    if missing:
        raise ValueError(
            f"data.template {template} needs {' and '.join(missing)}, which this tokenizer does not have: "
            f"choose the template of the tokenizer's own family with --data.template"
        )


def encode(conversation: Conversation, tokenizer: Tokenizer, template: str, max_tokens: int) -> EncodedText:
    """A whole conversation as ids, at most `max_tokens` of them.

    Raises: ValueError for a conversation of several turns under `plain`, which has no questions.
    """
    form = template_of(template, tokenizer)
    turns = _marked_turns(conversation)
    if len(turns) > 1 and not form.has_questions:
        raise ValueError(f"data.template {template} is for captions (one answer), not for {len(turns)} turns: choose another")
    ids, loss, places = tokenizer.encode(_render(form, turns))
    return EncodedText(
        ids=np.array(ids[:max_tokens], np.int64),
        loss_mask=np.array(loss[:max_tokens], np.bool_),
        was_cut=len(ids) > max_tokens,
        image_places=np.minimum(np.array(places, np.int64), min(len(ids), max_tokens)),
    )


def prompt(conversation: Conversation, tokenizer: Tokenizer, template: str, answer: int = 0) -> EncodedPrompt:
    """The ids before answer number `answer`, its header included: a prefix of `encode`'s.

    Earlier answers are the conversation's own; the asked one and all after it are not looked at.
    """
    form = template_of(template, tokenizer)
    turns = _marked_turns(conversation)
    pieces = _render(form, turns[:answer]) + (list(form.between) if answer else []) + _ask(form, turns[answer][0])
    tokens = tokenizer.encode(pieces)
    return EncodedPrompt(np.array(tokens.ids, np.int64), tuple(tokens.image_places))


def end_of_turn(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The ids that end an answer; one id in every template but `plain`, where it is the newline's."""
    # Behind some text: alone, a newline gets a space prefix from tokenizers that add one to every text.
    ids, is_end, _ = tokenizer.encode([Piece("a"), template_of(template, tokenizer).end])
    return tuple(token for token, counts in zip(ids, is_end, strict=True) if counts)


def template_of(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The named template, with `start` settled for this tokenizer."""
    form = TEMPLATES[name]
    if form.opening != (_special("start"),):
        return form
    start = "eos" if tokenizer.special_id("bos") is None else "bos"
    return ChatTemplate(opening=(_special(start),), end=form.end, has_questions=False)


def _ask(form: ChatTemplate, question: str) -> list[Piece]:
    """A question and the header of its answer."""
    said = _said(question)
    # A question that is not written leaves its images where it would have stood.
    asked = [*form.before_question, said] if form.has_questions else [Piece("", marks=(0,) * len(said.marks))]
    return [*asked, *form.before_answer]


def _render(form: ChatTemplate, turns: Sequence[tuple[str, str]]) -> list[Piece]:
    """Opening and whole turns, whose texts still have their marks."""
    pieces = list(form.opening)
    for number, (question, answer) in enumerate(turns):
        pieces += form.between if number else ()
        pieces += [*_ask(form, question), _said(answer, form.answer_prefix, loss=True), form.end]
    return pieces
