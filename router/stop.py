"""Stop strings in a stream of text, also across the borders of its pieces.

feed(text) -> what may be shown now, and the stop string if one is complete
flush()    -> what was held back, once nothing more can come

The text ends at the first character that completes a stop string; if it completes several, the
longest counts. That depends on the characters alone, never on how they were cut into pieces.
Text that could still turn out to be the start of a stop string is held back. Each string is tracked
by its own Knuth-Morris-Pratt automaton, so a character costs amortized constant time for each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shown:
    text: str
    stop: str | None = None


def _borders(pattern: str) -> tuple[int, ...]:
    """For each prefix of the pattern: the length of its longest proper prefix that is a suffix."""
    borders = [0] * len(pattern)
    length = 0
    for at in range(1, len(pattern)):
        while length and pattern[at] != pattern[length]:
            length = borders[length - 1]
        if pattern[at] == pattern[length]:
            length += 1
        borders[at] = length
    return tuple(borders)


class StopMatcher:
    """One sequence's matcher. ``include``: the stop string itself is shown."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._borders = tuple(_borders(stop) for stop in stops)
        # How much of each stop string the text ends with.
        self._matched = [0] * len(stops)
        # At least as long as the longest partial match, so a match never starts before it.
        self._held = ""
        self._include = include

    def feed(self, text: str, *, may_stop: bool = True) -> Shown:
        """``may_stop`` False: strings completed within this text do not count."""
        if not self._stops or not text:
            return Shown(text)
        buffer = self._held + text
        start = len(self._held)
        for at, char in enumerate(text, start + 1):
            stop = self._advance(char)
            if stop is not None and may_stop:
                self._held = ""
                return Shown(buffer[: at if self._include else at - len(stop)], stop)
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return Shown(buffer[:cut])

    def flush(self) -> str:
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every automaton by one character; the longest stop string completed by it."""
        complete: str | None = None
        for index, stop in enumerate(self._stops):
            borders = self._borders[index]
            length = self._matched[index]
            while length and stop[length] != char:
                length = borders[length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                if complete is None or len(stop) > len(complete):
                    complete = stop
                length = borders[length - 1]
            self._matched[index] = length
        return complete
