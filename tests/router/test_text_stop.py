"""Stop strings: the text ends where the first one is complete, however the text was cut up."""

from __future__ import annotations

import random

import pytest

from router.stop import StopMatcher


def run(text: str, stops: tuple[str, ...], cuts: list[int], *, include: bool = False):
    """(what was shown, stop string or None) for the text cut into pieces at ``cuts``."""
    matcher = StopMatcher(stops, include=include)
    shown = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = matcher.feed(text[start:end])
        shown.append(piece.text)
        if piece.stop is not None:
            return "".join(shown), piece.stop
    return "".join(shown) + matcher.flush(), None


def oracle(text: str, stops: tuple[str, ...], *, include: bool = False):
    """The first complete stop string by plain search; of those, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


@pytest.mark.parametrize("include", [False, True])
def test_equals_plain_search_however_the_text_is_cut(include: bool) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    hits = 0
    for _ in range(3000):
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(0, 40)))
        stops = tuple(
            "".join(rng.choice("abc") for _ in range(rng.randrange(1, 7)))
            for _ in range(rng.randrange(1, 5))
        )
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(0, 12)))
        expected = oracle(text, stops, include=include)
        hits += expected[1] is not None
        assert run(text, stops, cuts, include=include) == expected, (text, stops, cuts)
    assert 500 < hits < 3000


def test_holds_back_only_what_may_begin_a_stop_string() -> None:
    matcher = StopMatcher(("END", "NOPE"))
    assert matcher.feed("the E").text == "the "
    assert matcher.feed("N").text == ""
    assert matcher.feed("TRY N").text == "ENTRY "
    last = matcher.feed("OPEN")
    assert (last.text, last.stop) == ("", "NOPE")


def test_a_stop_string_across_three_pieces_is_cut_off() -> None:
    matcher = StopMatcher(("<end>",))
    assert matcher.feed("hello <e").text == "hello "
    assert matcher.feed("nd").text == ""
    last = matcher.feed("> more")
    assert (last.text, last.stop) == ("", "<end>")


def test_strings_completed_too_early_do_not_count_but_later_ones_do() -> None:
    matcher = StopMatcher(("aa",))
    assert matcher.feed("aa", may_stop=False).stop is None
    # The second a of the early match may begin a match that counts.
    assert matcher.feed("a").stop == "aa"


def test_without_stop_strings_text_passes_through() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("anything").text == "anything"
    assert matcher.flush() == ""
