"""Token ids to text, one token at a time: text that was given is never taken back.

feed(id) -> the text that is certain now     flush() -> the rest, once no token can follow

The state is a window: a few ids, and how many characters of their text were given. A new id joins
the window, the window is decoded, and what is certain beyond the given part goes out. Where the
text ends in a whole character the window shrinks to its last id, which stays for decoders that
treat the start of a text differently (they drop its first space). So a token costs constant time.

Certain is all but up to HOLD trailing replacement characters: an unfinished UTF-8 character has at
most 3 bytes, and decodes to 1 to 3 of them. A run of invalid bytes offers no whole character; past
LONG ids the window is split where decoding both sides apart changes nothing.

The text equals the tokenizer's own decoding of all ids. One exception: tokenizers that spell
unknown characters as byte tokens decode a run of them all or nothing; here every whole character
that was given stays, also when invalid bytes follow in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "\ufffd"
HOLD = 3
LONG = 8
TOO_LONG = 64
# Prompt ids that a continued text is decoded after.
CONTEXT_IDS = 4


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What decoding needs to know of a tokenizer."""

    decode: Callable[[Sequence[int]], str]  # special tokens included
    known: Callable[[int], bool]  # ids that the tokenizer has a piece for
    special: frozenset[int]
    bytes: frozenset[int]  # ids that stand for one byte each, in tokenizers with byte fallback
    filler: int | None  # an id of plain text, put where a window needs a first token


class Detokenizer:
    """One sequence's text. ``context``: ids that the text continues; theirs is not given."""

    def __init__(
        self, vocabulary: Vocabulary, *, skip_special: bool, context: Sequence[int] = ()
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = vocabulary.special if skip_special else frozenset()
        self._window = [token for token in context if self._counts(token)][-CONTEXT_IDS:]
        self._anchor: int | None = None
        text = vocabulary.decode(self._window) if self._window else ""
        self._given = _certain(text)

    def feed(self, token: int) -> str:
        if not self._counts(token):
            return ""
        self._window.append(token)
        text = self._vocabulary.decode(self._window)
        certain = _certain(text)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._shrink(token)
        elif len(self._window) > LONG:
            new += self._split(text)
        return new

    def flush(self) -> str:
        """What was held back; unfinished characters become replacement characters."""
        text = self._vocabulary.decode(self._window) if self._window else ""
        rest = text[self._given :]
        self._given = len(text)
        return rest

    def _counts(self, token: int) -> bool:
        return token not in self._skip and self._vocabulary.known(token)

    def _shrink(self, last: int) -> None:
        """The text ends in a whole character: nothing before it can change any more."""
        if last not in self._vocabulary.bytes:
            self._anchor = last
        elif self._anchor is None:
            self._anchor = self._vocabulary.filler
        self._window = [] if self._anchor is None else [self._anchor]
        self._given = len(self._vocabulary.decode(self._window)) if self._window else 0

    def _split(self, text: str) -> str:
        """Drops a settled head of a window of invalid bytes and returns its ungiven text."""
        decode = self._vocabulary.decode
        for cut in range(len(self._window) - 1, 0, -1):
            head = decode(self._window[:cut])
            if head + decode(self._window[cut:]) == text:
                new = head[self._given :]
                self._given = max(0, self._given - len(head))
                del self._window[:cut]
                return new
        if len(self._window) <= TOO_LONG:
            return ""
        new = text[self._given :]
        self._window.clear()
        self._given = 0
        return new


def _certain(text: str) -> int:
    """How many characters of a decoded window cannot change by ids that follow."""
    if not text.endswith(REPLACEMENT):
        return len(text)
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return len(text) - min(trailing, HOLD)
