"""What a Redis may hold or say that we never wrote: a miss or a typed error, nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from cache_tiers.codec import BadValue, Expected, decode, encode_header
from cache_tiers.resp import Wire
from pdserve.errors import TierError
from pdserve.types import BlockKey, Fingerprint, Incarnation
from tests.fuzz import FRAMES, mutated, seeded

SPAN = 64
KEY = BlockKey(bytes(range(16)))
EXPECTED = Expected(Fingerprint(b"F" * 32), SPAN)


def test_a_damaged_value_is_refused_and_its_payload_never_believed() -> None:
    rng = seeded("values")
    payload = os.urandom(SPAN)
    good = encode_header(EXPECTED.fingerprint, KEY, Incarnation(b"W" * 16), payload) + payload
    assert bytes(decode(good, EXPECTED, KEY)[1]) == payload
    refused = 0
    for _ in range(FRAMES):
        data = mutated(rng, [good])
        try:
            _, found = decode(data, EXPECTED, KEY)
        except BadValue:
            refused += 1
        else:
            assert bytes(found) == payload
    assert refused > FRAMES * 0.9


ANSWERS = [
    b"+OK\r\n",
    b"-ERR no\r\n",
    b":12\r\n",
    b"$5\r\nhello\r\n",
    b"$-1\r\n",
    b"*2\r\n$1\r\na\r\n:7\r\n",
    b"*2\r\n$1\r\n0\r\n*1\r\n$9\r\npdserve:1\r\n",
    b"$99999999999999\r\n",
    b"*-1\r\n",
    b"*100000000\r\n",
]


def test_a_server_that_answers_nonsense_is_a_typed_error() -> None:
    rng = seeded("answers")
    taken = 0
    for _ in range(FRAMES // 5):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(mutated(rng, ANSWERS) + mutated(rng, ANSWERS))
            theirs.shutdown(socket.SHUT_WR)
            wire = Wire(ours, time.monotonic() + 5)
            with contextlib.suppress(TierError):
                for _ in range(5):
                    wire.reply()
                    taken += 1
    assert taken > 0, "not one was sound: nothing but the first byte was tried"


@pytest.mark.parametrize("answer", [b"$536870913\r\n", b"*65537\r\n", b"$" + b"9" * 5000])
def test_no_memory_is_taken_for_what_was_only_announced(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        with pytest.raises(TierError):
            Wire(ours, time.monotonic() + 0.3).reply()
