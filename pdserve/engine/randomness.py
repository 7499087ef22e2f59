"""One uniform number for each (seed, index of a generated token), whatever else runs.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011): ten rounds of multiplication and exchange turn a key (the
seed) and a counter (the index) into 128 random bits. There is no state, so a sequence that is
continued elsewhere draws what it would have drawn here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# The upper 53 of 64 bits: every result is a float64 without rounding, and below 1.
_DROP = np.uint64(11)
_SCALE = 2.0**-53

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words for each of n counters; 4 and 2 arrays of n words, held in 64 bits each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left = c0 * _MULTIPLIERS[0]
        right = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> _HALF) ^ c1 ^ k0,
            right & _LOW,
            (left >> _HALF) ^ c3 ^ k1,
            left & _LOW,
        )
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """[n] numbers in [0, 1), one for each pair; 0 <= seed, index < 2**64."""
    seed = np.array(seeds, dtype=np.uint64)
    index = np.array(indices, dtype=np.uint64)
    zero = np.zeros_like(seed)
    first, second, _, _ = philox4x32(
        (index & _LOW, index >> _HALF, zero, zero), (seed & _LOW, seed >> _HALF)
    )
    bits = ((first << _HALF) | second) >> _DROP
    return bits.astype(np.float64) * _SCALE
