"""A stored value is what its reader asked for, byte for byte, or it is refused with the reason."""

from __future__ import annotations

import os
import random

import pytest

from cache_tiers.codec import (
    HEADER_BYTES,
    VERSION,
    BadValue,
    Expected,
    Fault,
    checksum,
    decode,
    encode_header,
)
from pdserve.types import BlockKey, Fingerprint, Incarnation

SPAN = 300
FINGERPRINT = Fingerprint(bytes(range(32)))
KEY = BlockKey(b"k" * 16)
WRITER = Incarnation(b"w" * 16)
EXPECTED = Expected(FINGERPRINT, SPAN)


def value(payload: bytes, key: BlockKey = KEY, fingerprint: Fingerprint = FINGERPRINT) -> bytes:
    return encode_header(fingerprint, key, WRITER, payload) + payload


def reason(data: bytes, expected: Expected = EXPECTED, key: BlockKey = KEY) -> Fault:
    with pytest.raises(BadValue) as caught:
        decode(data, expected, key)
    return caught.value.fault


def test_what_was_put_is_what_comes_out() -> None:
    payload = os.urandom(SPAN)
    header, view = decode(value(payload), EXPECTED, KEY)
    assert view == payload
    assert header.writer == WRITER
    assert HEADER_BYTES == 104


def test_the_payload_is_a_view_of_the_value() -> None:
    data = bytearray(value(os.urandom(SPAN)))
    _, view = decode(data, EXPECTED, KEY)
    data[-1] ^= 1
    assert view[-1] == data[-1]


def test_every_refusal_names_its_reason() -> None:
    payload = os.urandom(SPAN)
    good = value(payload)
    assert reason(b"") is Fault.SHORT
    assert reason(good[: HEADER_BYTES - 1]) is Fault.SHORT
    assert reason(b"X" + good[1:]) is Fault.MAGIC
    assert reason(good[:8] + (VERSION + 1).to_bytes(4, "little") + good[12:]) is Fault.VERSION
    assert reason(good[:20] + bytes([good[20] ^ 1]) + good[21:]) is Fault.HEADER
    assert reason(value(payload, fingerprint=Fingerprint(b"x" * 32))) is Fault.FINGERPRINT
    assert reason(value(payload, key=BlockKey(b"x" * 16))) is Fault.KEY
    assert reason(value(payload[:-1])) is Fault.LENGTH
    assert reason(good[:-1]) is Fault.LENGTH
    assert reason(good + b"x") is Fault.LENGTH
    assert reason(good[:-1] + bytes([good[-1] ^ 0x80])) is Fault.PAYLOAD
    revoked = Expected(FINGERPRINT, SPAN, frozenset({WRITER}))
    assert reason(good, revoked) is Fault.REVOKED


def test_no_flipped_bit_passes() -> None:
    good = value(os.urandom(SPAN))
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadValue):
            decode(bad, EXPECTED, KEY)


def test_no_garbage_passes_and_none_raises_anything_else() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    good = value(draw.randbytes(SPAN))
    for _ in range(3000):
        kind = draw.randrange(4)
        if kind == 0:
            bad = draw.randbytes(draw.randrange(2 * len(good)))
        elif kind == 1:
            bad = good[: draw.randrange(len(good))]
        elif kind == 2:
            at = draw.randrange(len(good))
            bad = good[:at] + draw.randbytes(draw.randrange(1, 40)) + good[at:]
        else:
            # A header that seals itself properly around wrong fields.
            payload = draw.randbytes(draw.randrange(2 * SPAN))
            bad = value(payload, key=BlockKey(draw.randbytes(16)))
        with pytest.raises(BadValue):
            decode(bad, EXPECTED, KEY)


def test_the_checksum_is_xxh3() -> None:
    # A known value: other programs and other versions must agree on it.
    assert checksum(b"") == 0x2D06800538D394C2
