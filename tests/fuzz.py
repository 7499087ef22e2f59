"""Bytes and JSON values that nobody sane would send, from a seed.

PDSERVE_LONG=1 asks for the long form of the tests that use them.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Sequence
from typing import Any

LONG = os.environ.get("PDSERVE_LONG") == "1"
FRAMES = 100_000 if LONG else 5_000
REQUESTS = 10_000 if LONG else 1_000
_EDGES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_TEXTS = ("", "a", "\0", "\ud800", "🙂" * 40, "x" * 5000, "../../etc/passwd", "{{ 7*7 }}", "-1")


def seeded(name: str) -> random.Random:
    seed = os.environ.get("PDSERVE_SEED", "1")
    print(f"PDSERVE_SEED={seed} for {name}")
    return random.Random(f"{name}-{seed}")


def mutated(rng: random.Random, good: Sequence[bytes]) -> bytes:
    """One of ``good`` with some damage, or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 300))
    data = bytearray(rng.choice(good))
    for _ in range(rng.randrange(1, 4)):
        _damage(rng, data, good)
    return bytes(data)


def _damage(rng: random.Random, data: bytearray, good: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        case 3:
            other = rng.choice(good)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        case 4:
            edge = rng.choice(_EDGES)
            size, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
            data[at : at + size] = struct.pack(f"<{code}", edge % 2 ** (8 * size))
        case _:
            data += data[at : at + rng.randrange(1, 100)]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, lone surrogates and numbers of any size included."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((1, -1)) * rng.choice(_EDGES)
    if kind == 2:
        return rng.choice((0.0, -0.5, 1e-30, 1.5, 1e30, 1e308, float("inf"), float("nan")))
    if kind in (3, 4):
        return rng.choice(_TEXTS)
    if kind == 5:
        return rng.randrange(-5, 300)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(_TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
