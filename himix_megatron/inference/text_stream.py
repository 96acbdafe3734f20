"""An answer's token ids in, while they arrive; its text out, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.text.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are not yet a whole character."""
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
"""Every new token is compared with each of them, from each of their characters on."""


def check_stops(stops: Sequence[str]) -> None:
    """Raises: ValueError for stop texts that are too many, too long, or empty (each answer would end before its first word)."""
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        wanted = f"at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters"
        raise ValueError(f"a stop string is empty or too long, or there are too many: wanted {wanted}")


class TextStream:
    """Writes the text of one answer as soon as it is certain.

    Held back until more is known: a character of which bytes are missing, and what may be the beginning of a stop string.
    Space before the first word belongs to the template and is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), write: Callable[[str], object] | None = None):
        """`write` gets each new piece of text. Raises: as `check_stops`."""
        check_stops(stops)
        self.text = ""
        """What was written so far."""
        self._tokenizer, self._stops, self._write = tokenizer, tuple(stops), write
        self._decoded = ""

    def push(self, ids: Sequence[int]) -> bool:
        """Take the answer's ids so far. Returns: whether a stop string has come, so that the answer ends before it."""
        text = self._tokenizer.decode(ids).lstrip()
        found = [at for at in map(text.find, self._stops) if at >= 0]
        self._decoded = text[: min(found)] if found else text
        self._show(len(self._decoded) if found else len(text) - self._uncertain(text))
        return bool(found)

    def finish(self) -> str:
        """Write what was held back: no more tokens come. Returns: the whole text."""
        self._show(len(self._decoded))
        return self.text

    def _uncertain(self, text: str) -> int:
        """How many characters at the end may still change or turn out to begin a stop string."""
        whole = text.rstrip(_INCOMPLETE)
        begun = (n for stop in self._stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return len(text) - len(whole) + max(begun, default=0)

    def _show(self, length: int) -> None:
        new = self._decoded[len(self.text) : length]
        if new:
            self.text += new
            if self._write:
                self._write(new)
