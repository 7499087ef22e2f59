"""Copying past the caches: the same bytes as numpy copies, and not one more."""

from __future__ import annotations

import numpy as np
import pytest

from pdserve.engine.native import copies_right, native_copy
from tests.engine.model_world import kernel

# More than is fetched ahead, and no multiple of a line.
SPAN = 12_345


def test_it_copies_what_numpy_copies_and_touches_nothing_beside() -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    copy = native_copy(kernel())
    for _ in range(300):
        size = int(rng.choice([0, 1, 15, 63, 64, 65, 4096, 4097, int(rng.integers(SPAN))]))
        begin, end = (int(at) for at in rng.integers(0, 130, 2))
        source = rng.integers(0, 256, begin + size, dtype=np.uint8)[begin:]
        target = rng.integers(0, 256, end + size + 130, dtype=np.uint8)
        expected = target.copy()
        np.copyto(expected[end : end + size], source)
        copy(source, target[end : end + size])
        np.testing.assert_array_equal(target, expected)


def test_it_copies_several_spans_at_once() -> None:
    source = np.random.default_rng(3).integers(0, 256, (3, SPAN), dtype=np.uint8)
    target = np.zeros((5, SPAN), dtype=np.uint8)
    native_copy(kernel())(source, target[1:4])
    np.testing.assert_array_equal(target[1:4], source)
    assert not target[[0, 4]].any()


def test_what_cannot_be_copied_is_refused() -> None:
    copy = native_copy(kernel())
    with pytest.raises(ValueError, match="cannot be copied into"):
        copy(np.zeros((2, 8), np.uint8), np.zeros((1, 8), np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        copy(np.zeros((4, 8), np.uint8)[:, :4], np.zeros((4, 4), np.uint8))


def test_a_copy_that_is_wrong_is_found_out() -> None:
    right = native_copy(kernel())
    assert copies_right(right)
    assert copies_right(lambda source, target: np.copyto(target, source))
    assert not copies_right(lambda source, target: None)
    assert not copies_right(lambda source, target: right(source[:-1], target[:-1]))
    assert not copies_right(lambda source, target: right(source[::-1].copy(), target))
