"""Pieces of text in; token ids, a loss mask and places of images out. By a Hugging Face folder, or by bytes, which is built in.

A template (chat_template.py) spells a conversation as `Piece`s. Special tokens are pieces of their own, so that a tokenizer
which lacks one is refused before training, and so that text can be masked piece by piece.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is wholly inside or wholly outside the loss."""

    text: str
    special: bool = False
    """`text` is the name of one token: `bos`, `eos`, or the token's own spelling, e.g. `<|im_end|>`."""
    loss: bool = False
    marks: tuple[int, ...] = ()
    """Where images stand: for each the characters of `text` before it, rising."""


class Tokens(NamedTuple):
    """What `Tokenizer.encode` makes of pieces."""

    ids: list[int]
    loss: list[bool]
    """For each id whether it counts in the loss."""
    image_places: list[int]
    """For each mark, in order, the ids before it. A token with characters on both sides of a mark comes after it."""


class Tokenizer(Protocol):
    """What templates and the loader need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def fingerprint(self) -> str:
        """The same for two tokenizers that give the same ids."""

    def special_id(self, name: str) -> int | None:
        """The id of `bos`, `eos` or a special token by its spelling; None where the tokenizer has none."""

    def encode(self, pieces: Sequence[Piece]) -> Tokens:
        """The pieces, joined, as ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""


BYTE_SPECIAL = {"bos": 256, "<user>": 257, "<assistant>": 258, "<end>": 259, "eos": 259}


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then four special tokens. No file, no training, any text."""

    vocab_size = 260
    fingerprint = "bytes-1"

    def special_id(self, name: str) -> int | None:
        """See `Tokenizer`."""
        return BYTE_SPECIAL.get(name)

    def encode(self, pieces: Sequence[Piece]) -> Tokens:
        """See `Tokenizer`."""
        tokens = Tokens([], [], [])
        for piece in pieces:
            new = [BYTE_SPECIAL[piece.text]] if piece.special else list(piece.text.encode())
            tokens.image_places.extend(len(tokens.ids) + len(piece.text[:mark].encode()) for mark in piece.marks)
            tokens.ids.extend(new)
            tokens.loss.extend([piece.loss] * len(new))
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer folder, through `transformers.AutoTokenizer`; no network, no code from the folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"data.tokenizer is {folder}: no such folder (a Hugging Face tokenizer folder, or `bytes`)")
        from transformers import AutoTokenizer  # seconds to import, and `bytes` does without

        for path in folder.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):  # transformers would wait for a FIFO
                raise ValueError(f"data.tokenizer is {folder}: {path.name} is no regular file")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # at a broken model or regex in tokenizer.json, tokenizers raises no narrower one
            raise ValueError(
                f"data.tokenizer is {folder}: transformers cannot read it ({' '.join(str(error).split())})"
            ) from None
        if not self._tokenizer.is_fast:
            raise ValueError(f"data.tokenizer is {folder}: it has no tokenizer.json, which the loss mask needs (token offsets)")
        self.vocab_size = len(self._tokenizer)
        if (last := max(self._tokenizer.get_vocab().values(), default=0)) > 2 * self.vocab_size + 1000:
            raise ValueError(f"data.tokenizer is {folder}: it has {self.vocab_size} tokens, whose numbers reach {last}")
        self._added: dict[str, int] = self._tokenizer.get_added_vocab()
        definition = self._tokenizer.backend_tokenizer.to_str()
        # The 2 says that texts hold no control tokens: without it lengths were counted of the same texts with them.
        self.fingerprint = f"2-{hashlib.sha256(definition.encode()).hexdigest()}"
        self._rust, self._aliases, self._originals = _with_aliases(definition)

    def special_id(self, name: str) -> int | None:
        """See `Tokenizer`. Only control tokens count: `<|im_end|>` as ordinary text would fall into several."""
        token = self._added.get(getattr(self._tokenizer, f"{name}_token") if name in ("bos", "eos") else name)
        return token if token in self._aliases else None

    def encode(self, pieces: Sequence[Piece]) -> Tokens:
        """See `Tokenizer`.

        Special tokens at the start become ids directly; all that follows is tokenized as one string, exactly as the model
        saw text in its own pretraining (merges and space prefixes depend on the neighbours), and mask and places are taken
        from the tokens' character spans: a token counts when any of its characters does, and is before an image when all are.
        The name of a control token in a text is text. Raises: ValueError where the tokenizer's regular expression gives up.
        """
        start = next((i for i, piece in enumerate(pieces) if not piece.special), len(pieces))
        ids = [self._known(piece.text) for piece in pieces[:start]]
        loss = [piece.loss for piece in pieces[:start]]
        text, counts, marks = "", bytearray(), list[int]()
        for piece in pieces[start:]:
            marks += [len(text) + mark for mark in piece.marks]
            spelling = self._aliases[self._known(piece.text)] if piece.special else piece.text
            text += spelling
            counts += bytes([piece.loss]) * len(spelling)
        try:
            encoding = self._rust.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
                raise
            raise ValueError(f"data.tokenizer cannot read a text of {len(text)} characters: {error}") from None
        ids += [self._originals.get(token, token) for token in encoding.ids]
        # A token without characters (a space prefix some tokenizers add) belongs to what follows it.
        spans = [(begin, max(end, begin + 1)) for begin, end in encoding.offsets]
        loss += [any(counts[begin:end]) for begin, end in spans]
        ends = [end for _, end in spans]
        return Tokens(ids, loss, [start + bisect_right(ends, mark) for mark in marks])

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _known(self, name: str) -> int:
        token = self.special_id(name)
        assert token is not None, f"{name} is missing: chat_template.check_tokenizer was not called"
        return token


def _with_aliases(definition: str) -> tuple[Any, dict[int, str], dict[int, int]]:
    """A tokenizer that takes the names of control tokens for text; each token's alias, by which templates write it; and back.

    Control tokens are those that the tokenizer calls special, and `<|...|>`. No text can hold an alias, since nobody can guess
    it; what is around one becomes what it becomes around the token. `conversion/export/modeling_himix.py` has the same.
    """
    import tokenizers as hf

    rust: Any = hf.Tokenizer.from_str(definition)
    rust.no_truncation()
    rust.no_padding()
    control = {i: t for i, t in rust.get_added_tokens_decoder().items() if t.special or t.content.startswith("<|")}
    aliases = {i: f"\U000f0000{secrets.token_hex(16)}" for i in control}
    rust.add_special_tokens(list(control.values()))  # all of them, so that the next line holds for all
    rust.encode_special_tokens = True
    rust.add_tokens([hf.AddedToken(aliases[i], normalized=False, lstrip=t.lstrip, rstrip=t.rstrip) for i, t in control.items()])
    return rust, aliases, {rust.token_to_id(alias): i for i, alias in aliases.items()}


@functools.lru_cache(maxsize=4)  # a large vocabulary takes seconds
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, or a folder.

    Raises: ValueError for a folder that is missing or holds no usable tokenizer.
    """
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(Path(name))
