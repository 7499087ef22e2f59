"""Bytes that are not what a Redis says end an exchange with a TierError, in time, always."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_redis import SPAN, blank, new_keys, open_tier

from cache_tiers.resp import (
    Refusal,
    ServerRefused,
    Wire,
    WireClosed,
    WireProtocol,
    WireTimeout,
    command,
)
from pdserve.errors import TierError


def heard(data: bytes, read: Callable[[Wire], object], wait: float = 0.3) -> object:
    """What ``read`` makes of ``data`` and then the end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        return read(Wire(ours, time.monotonic() + wait))


def test_replies_of_every_type() -> None:
    for data, expected in (
        (b"+OK\r\n", b"OK"),
        (b":-12\r\n", -12),
        (b"$3\r\na\r\n\r\n", b"a\r\n"),
        (b"$-1\r\n", None),
        (b"_\r\n", None),
        (b"-ERR no\r\n", Refusal("ERR no")),
        (b"*2\r\n$1\r\n0\r\n*1\r\n$1\r\nx\r\n", [b"0", [b"x"]]),
    ):
        assert heard(data, Wire.reply) == expected
    assert command(b"GET", b"a b") == b"*2\r\n$3\r\nGET\r\n$3\r\na b\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"?3\r\n",
        b":1_0\r\n",
        b":\r\n",
        b": 1\r\n",
        b":" + b"9" * 30 + b"\r\n",
        b"$99999999\r\n",
        b"$-2\r\n",
        b"*99999999\r\n",
        b"*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
        b"$1\r\nab\r\n",
        b"+" + b"x" * 5000,
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(WireProtocol):
        heard(data, Wire.reply)


def test_an_end_in_the_middle_is_noticed() -> None:
    for data in (b"", b"$5\r\nab", b"*2\r\n:1\r\n", b"+O"):
        with pytest.raises(WireClosed):
            heard(data, Wire.reply)


def test_an_array_must_be_as_long_as_was_asked() -> None:
    with pytest.raises(WireProtocol):
        heard(b"*3\r\n", lambda wire: wire.array_header(2))
    with pytest.raises(ServerRefused):
        heard(b"-LOADING\r\n", lambda wire: wire.array_header(2))
    with pytest.raises(WireProtocol):
        heard(b"$999999999999\r\n", Wire.bulk_header)


def test_a_server_that_trickles_is_given_up_at_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        theirs.sendall(b"$100000\r\n")
        while not stop.wait(0.01):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    wire = Wire(ours, start + 0.3)
    assert wire.bulk_header() == 100000
    with pytest.raises(WireTimeout):
        wire.read_into(memoryview(bytearray(100000)))
    assert time.monotonic() - start < 10, "whoever waits for all of it waits for 1,000 s"
    stop.set()
    thread.join()
    ours.close()
    theirs.close()


def test_a_get_from_a_server_of_garbage_raises_tier_errors_alone(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    pieces = [b"*2\r\n", b"$6104\r\n", b"$-1\r\n", b"\r\n", b"-ERR\r\n", b":1\r\n", b"PDSKVBLK"]

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(65536)
                answer = [draw.choice([*pieces, draw.randbytes(SPAN)]) for _ in range(12)]
                try:
                    peer.sendall(b"*2\r\n" * draw.randrange(2) + b"".join(answer))
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    tier = open_tier(f"unix://{tmp_path}/s", timeout_s=0.2, breaker_failures=10**6)
    for _ in range(150):
        with contextlib.suppress(TierError):
            assert tier.get(new_keys(2), blank(2), 1.0) == 0
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
