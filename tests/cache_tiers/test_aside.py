"""Rows that wait for Redis: as many as fit, the same ones again, and never one for two."""

import random

import numpy as np

from cache_tiers.aside import Aside

SPAN = 64


def test_no_more_rows_are_given_than_fit() -> None:
    aside = Aside(3 * SPAN + 1, SPAN)
    first = aside.take(2)
    assert len(first) == 2
    assert len(aside.take(2)) == 1
    assert aside.take(1) == []
    aside.give_back(first)
    assert len(aside.take(5)) == 2


def test_a_row_that_was_given_back_is_taken_first() -> None:
    aside = Aside(100 * SPAN, SPAN)
    once = aside.take(4)
    for _ in range(50):
        aside.give_back(once)
        assert aside.take(4) == once


def test_rows_in_use_keep_their_bytes() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    aside = Aside(20 * SPAN, SPAN)
    held: dict[int, bytes] = {}
    for _ in range(500):
        if rng.random() < 0.5:
            for row in aside.take(rng.randrange(8)):
                assert row not in held
                held[row] = rng.randbytes(SPAN)
                aside.row(row)[:] = np.frombuffer(held[row], np.uint8)
        else:
            back = rng.sample(sorted(held), rng.randrange(len(held) + 1))
            aside.give_back(back)
            for row in back:
                del held[row]
        assert all(aside.row(row).tobytes() == kept for row, kept in held.items())


def test_rows_larger_than_all_the_room_are_none() -> None:
    assert Aside(SPAN - 1, SPAN).take(1) == []
