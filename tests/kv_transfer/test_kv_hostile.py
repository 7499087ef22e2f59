"""Fuzzed frames, before and after the handshake: none ends the server, and a canary reads on."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from kv_peer import (
    FINGERPRINT,
    TOKEN,
    Peer,
    PeerSetup,
    all_bytes,
    eventually,
    new_pool,
    running,
)

from kv_transfer import session, wire
from kv_transfer.tcp import TcpReader
from pdserve.engine.memory import PoolMemory
from pdserve.errors import PdserveError, ProtocolError
from pdserve.types import Fingerprint, Incarnation, Transport
from tests.fuzz import FRAMES, mutated, seeded

SETUP = PeerSetup(transports=(Transport.TCP,), handshake_seconds=3.0)
PER_CONNECTION = 10
CANARY_EVERY = 20

GOOD = [
    wire.encode(message)
    for message in (
        wire.Challenge(os.urandom(wire.NONCE_BYTES)),
        wire.Hello(
            os.urandom(wire.NONCE_BYTES),
            bytes(32),
            Incarnation(bytes(16)),
            Fingerprint(bytes(32)),
            24,
            1536,
        ),
        wire.Welcome(bytes(32), 24, 1536),
        wire.Status(wire.Code.OK),
        wire.Read(500, (1, 2, 3), (0, 0, 0)),
        wire.Read(500, tuple(range(24)), (2**64 - 1,) * 24),
        wire.Check((1, 2**32 - 1), (7, 7)),
        wire.LinkOpen(4),
        wire.LinkId(bytes(wire.LINK_ID_BYTES)),
        wire.SlotRead(9, (5,), (1,)),
        wire.SlotStatus(9, wire.Code.STALE, 3),
    )
]


def test_a_damaged_frame_is_a_message_or_a_protocol_error() -> None:
    rng = seeded("frames")
    refused = 0
    for _ in range(FRAMES):
        data = mutated(rng, GOOD)
        try:
            header = wire.decode_header(data[: wire.HEADER.size])
            wire.decode_payload(header.kind, data[wire.HEADER.size :])
        except ProtocolError:
            refused += 1
    assert FRAMES // 2 < refused < FRAMES, "the damage is too great or too small to tell anything"


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running(SETUP) as peer:
        yield peer


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    pool = new_pool(8, SETUP.span_bytes)
    yield pool
    pool.close()


def canary(peer: Peer, pool: PoolMemory) -> None:
    reader = TcpReader(peer.endpoint, pool, FINGERPRINT, TOKEN, 2**26, time.monotonic() + 10)
    reader.read(peer.offers([3]), [0], time.monotonic() + 10)
    np.testing.assert_array_equal(all_bytes(pool)[0], peer.expected(3))
    reader.close()


@pytest.mark.parametrize("authenticated", [False, True])
def test_no_frame_ends_a_server_and_a_canary_always_reads(
    peer: Peer, pool: PoolMemory, authenticated: bool
) -> None:
    rng = seeded(f"server-{authenticated}")
    for number in range(FRAMES // 2 // PER_CONNECTION):
        frames = [
            mutated(rng, GOOD) if rng.random() < 0.7 else rng.choice(GOOD)
            for _ in range(PER_CONNECTION)
        ]
        sock = open_socket(peer, authenticated)
        # The server closes as soon as a frame is bad; what follows is then lost on the way.
        with sock, contextlib.suppress(OSError):
            sock.sendall(b"".join(frames))
            sock.shutdown(socket.SHUT_WR)
            if number % 7 == 0:
                while sock.recv(65536):
                    pass
        if number % CANARY_EVERY == 0:
            canary(peer, pool)
    canary(peer, pool)
    stats = peer.call("stats")
    print(stats)
    assert stats.failed == 0, "a frame reached code that did not expect it"
    assert eventually(lambda: open_files(peer) < 60), "connections are left open"


def open_socket(peer: Peer, authenticated: bool) -> socket.socket:
    if not authenticated:
        sock = socket.create_connection(session.parse_address(peer.endpoint.tcp_address), 10)
    else:
        channel = session.connect(peer.endpoint, FINGERPRINT, TOKEN, time.monotonic() + 10)
        sock = channel._sock
    sock.settimeout(10)
    return sock


def open_files(peer: Peer) -> int:
    assert peer.process.pid is not None
    return len(os.listdir(f"/proc/{peer.process.pid}/fd"))


def test_a_server_that_talks_nonsense_is_a_typed_error_to_its_reader() -> None:
    """The same the other way round: what a reader hears before it trusts its server."""
    rng = seeded("reader")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(FRAMES // 50):
            ours = socket.create_connection(listener.getsockname(), 5)
            theirs, _ = listener.accept()
            with ours, theirs:
                theirs.sendall(mutated(rng, GOOD) + mutated(rng, GOOD))
                theirs.shutdown(socket.SHUT_WR)
                with pytest.raises(PdserveError):
                    listen_on(session.Channel(ours))


def listen_on(channel: session.Channel) -> None:
    while True:
        channel.receive(time.monotonic() + 5)
