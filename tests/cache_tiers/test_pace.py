"""When a piece may go: after a pause, when nobody computes; at once when somebody is held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cache_tiers.pace import Pace

LONG_S = 600.0


def never() -> bool:
    return False


def always() -> bool:
    return True


def pace(
    pause_s: float, computing: Callable[[], bool] = never, scarce: Callable[[], bool] = never
) -> Pace:
    return Pace(pause_s, computing, scarce)


def in_patience() -> float:
    return time.monotonic() + LONG_S


def test_the_first_piece_goes_and_the_next_after_the_pause() -> None:
    one = pace(0.05)
    assert one.wait_slowly(in_patience())
    began = time.monotonic()
    one.sent()
    assert one.wait_slowly(in_patience())
    assert time.monotonic() - began >= 0.05


def test_a_piece_waits_until_nobody_computes() -> None:
    asked: list[bool] = []

    def computing() -> bool:
        asked.append(len(asked) < 3)
        return asked[-1]

    assert pace(0.001, computing).wait_slowly(in_patience())
    assert asked == [True, True, True, False]


def test_patience_ends_and_the_pauses_stay() -> None:
    one = pace(0.05, always)
    began = time.monotonic()
    assert one.wait_slowly(began + 0.1)
    assert time.monotonic() - began >= 0.1
    began = time.monotonic()
    one.sent()
    assert one.wait_slowly(began)  # its patience was over before
    assert time.monotonic() - began >= 0.05


def test_without_pauses_there_are_no_pieces() -> None:
    assert not pace(0.0, always).wait_slowly(in_patience())


@pytest.mark.parametrize("held_by", ["a pause", "computing"])
@pytest.mark.parametrize("by", ["press", "end", "room_taken"])
def test_whoever_is_held_up_ends_the_wait(by: str, held_by: str) -> None:
    is_scarce = threading.Event()
    one = pace(LONG_S, always if held_by == "computing" else never, is_scarce.is_set)
    if held_by == "a pause":
        one.sent()
    answers: list[bool] = []
    sender = threading.Thread(
        target=lambda: answers.append(one.wait_slowly(in_patience())), daemon=True
    )
    sender.start()
    time.sleep(0.05)
    assert answers == [], "nobody is held up yet"
    if by == "room_taken":
        one.room_taken()  # there is still room
        time.sleep(0.05)
        assert answers == []
        is_scarce.set()
    getattr(one, by)()
    sender.join(10)
    assert answers == [False]


def test_one_who_was_held_up_and_is_done_hurries_nobody_more() -> None:
    one = pace(0.05)
    one.press()
    one.press()
    one.sent()
    assert not one.wait_slowly(in_patience())
    one.release()
    assert not one.wait_slowly(in_patience()), "another one still waits"
    one.release()
    began = time.monotonic()
    one.sent()
    assert one.wait_slowly(in_patience())
    assert time.monotonic() - began >= 0.05
