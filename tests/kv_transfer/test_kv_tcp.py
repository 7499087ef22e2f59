"""A transfer server among bad peers, and a reader among bad servers."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import kv_peer
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
    open_files,
    running,
)

from kv_transfer import session, wire
from kv_transfer.base import Endpoint
from kv_transfer.exporter import PoolExporter
from kv_transfer.server import TransferServer
from kv_transfer.session import Channel, Identity
from kv_transfer.tcp import TcpReader
from kv_transfer.wire import Challenge, Code, Hello, Status, Welcome
from pdserve.engine.memory import PoolMemory
from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    PdserveError,
    ProtocolError,
    StaleBlock,
    TransferError,
)
from pdserve.types import Transport

MESSAGE = 64 * 2**20
SETUP = PeerSetup(transports=(Transport.TCP,), handshake_seconds=1.5)


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running(SETUP) as peer:
        yield peer


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    pool = new_pool(8, SETUP.span_bytes)
    yield pool
    pool.close()


def open_reader(endpoint: Endpoint, pool: PoolMemory, token: str = TOKEN) -> TcpReader:
    return TcpReader(endpoint, pool, FINGERPRINT, token, MESSAGE, time.monotonic() + 3)


def still_serves(peer: Peer, pool: PoolMemory) -> None:
    reader = open_reader(peer.endpoint, pool)
    reader.read(peer.offers([3]), [0], time.monotonic() + 3)
    np.testing.assert_array_equal(all_bytes(pool)[0], peer.expected(3))
    reader.close()


def raw(peer: Peer) -> socket.socket:
    return socket.create_connection(session.parse_address(peer.endpoint.tcp_address), timeout=5)


def closed_by_peer(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


HELLO_HEADER = wire.encode(Hello(bytes(32), bytes(32), bytes(16), bytes(32), 1, 1))[:12]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096),
        b"\0" * 64,
        wire.HEADER.pack(wire.MAGIC, 1, wire.Kind.HELLO, 0, 2**32 - 1),
        wire.HEADER.pack(wire.MAGIC, 1, wire.Kind.READ, 0, 4 + 12 * 4097),
        wire.HEADER.pack(wire.MAGIC, 9, wire.Kind.HELLO, 0, 0),
        wire.encode(wire.Read(1000, (0,), (0,))),  # before it has said who it is
        wire.encode(wire.LinkOpen(1)),
    ],
    ids=["http", "random", "zeros", "oversize", "too many blocks", "version", "read", "link"],
)
def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    peer: Peer, pool: PoolMemory, data: bytes
) -> None:
    bad = peer.call("stats").bad_frames
    with raw(peer) as sock:
        sock.sendall(data)
        assert closed_by_peer(sock)
    assert eventually(lambda: peer.call("stats").bad_frames == bad + 1)
    still_serves(peer, pool)


@pytest.mark.parametrize("data", [b"", b"PDKV", HELLO_HEADER, HELLO_HEADER + bytes(100)])
def test_a_peer_that_leaves_in_mid_frame_is_counted_as_lost(
    peer: Peer, pool: PoolMemory, data: bytes
) -> None:
    # What the test before this one closed counts as lost, too, once the server has seen it.
    assert eventually(lambda: peer.call("open_connections") == 0)
    lost = peer.call("stats").lost
    with raw(peer) as sock:
        sock.sendall(data)
    assert eventually(lambda: peer.call("stats").lost == lost + 1)
    still_serves(peer, pool)


def test_one_byte_at_a_time_does_not_hold_a_place(peer: Peer, pool: PoolMemory) -> None:
    """A slow sender has as long for its handshake as a silent one."""
    with raw(peer) as sock:
        began = time.monotonic()
        for byte in HELLO_HEADER + bytes(148):
            try:
                sock.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
            if time.monotonic() - began > 4:
                break
        assert time.monotonic() - began < 3
    still_serves(peer, pool)


def test_a_wrong_token_learns_nothing(peer: Peer, pool: PoolMemory) -> None:
    """It is refused in the same way whether or not it knows the incarnation."""
    refused = peer.call("stats").refused
    with pytest.raises(ProtocolError):
        open_reader(peer.endpoint, pool, token="another")
    stranger = dataclasses.replace(peer.endpoint, incarnation=os.urandom(16))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        open_reader(stranger, pool, token="another")
    with pytest.raises(StaleBlock):
        open_reader(stranger, pool)
    assert eventually(lambda: peer.call("stats").refused == refused + 3)
    still_serves(peer, pool)


def test_the_token_does_not_travel_and_a_proof_cannot_be_replayed(
    peer: Peer, pool: PoolMemory
) -> None:
    recorded = bytearray()
    real = Channel.send

    def record(channel: Channel, message: wire.Message, deadline: float | None) -> None:
        recorded.extend(wire.encode(message))
        real(channel, message, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "send", record)
        open_reader(peer.endpoint, pool).close()
    assert TOKEN.encode() not in recorded
    with raw(peer) as sock:
        sock.sendall(recorded)
        channel = Channel(sock)
        deadline = time.monotonic() + 5
        assert isinstance(channel.receive(deadline), Challenge)
        assert channel.receive(deadline) == Status(Code.AUTH)


def test_an_authenticated_peer_can_ask_for_nothing_that_is_not_there(
    peer: Peer, pool: PoolMemory
) -> None:
    channel = session.connect(peer.endpoint, FINGERPRINT, TOKEN, time.monotonic() + 3)
    deadline = time.monotonic() + 5
    before = peer.call("stats").stale_reads
    for request, code in [
        (wire.Read(1000, (24,), (0,)), Code.RANGE),
        (wire.Read(1000, (0, 2**32 - 1), (0, 0)), Code.RANGE),
        (wire.Read(1000, (0, 1), (0, 1)), Code.STALE),
        (wire.Check((0, 1), (0, 2**64 - 1)), Code.STALE),
        (wire.Check((), ()), Code.OK),
    ]:
        channel.send(request, deadline)
        status = channel.receive(deadline)
        assert isinstance(status, Status)
        assert status.code is code
        assert status.position == max(0, len(request.blocks) - 1)
    assert peer.call("stats").stale_reads == before + 2, "what was asked for too late is counted"
    channel.send(wire.SlotRead(1, (0,), (0,)), deadline)  # no link was opened
    assert channel.receive(deadline) == Status(Code.BAD_FRAME)
    channel.close()
    still_serves(peer, pool)


def test_a_reader_that_stops_reading_does_not_hold_the_server_forever() -> None:
    """The server gives up when the reader's own deadline has passed."""
    with running(PeerSetup(40, 2**20, transports=(Transport.TCP,))) as peer:
        channel = session.connect(peer.endpoint, FINGERPRINT, TOKEN, time.monotonic() + 3)
        channel.send(wire.Read(300, tuple(range(40)), (0,) * 40), time.monotonic() + 1)
        assert eventually(lambda: peer.call("stats").lost == 1)
        channel.close()


def test_more_connections_than_allowed_are_refused_and_counted(pool: PoolMemory) -> None:
    identity = Identity(pool.incarnation, FINGERPRINT, pool.num_blocks, pool.span_bytes)
    server = TransferServer(pool, identity, "127.0.0.1", TOKEN, max_connections=2)
    endpoint = endpoint_of(pool, server.address("127.0.0.1"))
    first, second = open_reader(endpoint, pool), open_reader(endpoint, pool)
    with pytest.raises(TransferError):
        open_reader(endpoint, pool)
    assert server.stats().refused == 1
    first.close()
    assert eventually(lambda: server.open_connections() == 1)
    third = open_reader(endpoint, pool)
    server.close()
    for reader in (second, third):
        with pytest.raises(TransferError):
            reader.read([kv_peer.BlockOffer(0, 0, 0, 0)], [1], time.monotonic() + 3)
        assert not reader.usable
    assert not [t for t in threading.enumerate() if t.name in {"kv-peer", "kv-transfer"}]


def test_a_server_without_a_token_does_not_start(pool: PoolMemory) -> None:
    with pytest.raises(ConfigError):
        PoolExporter(pool, FINGERPRINT, "127.0.0.1", "", [Transport.TCP])
    with pytest.raises(ConfigError):
        PoolExporter(pool, FINGERPRINT, "127.0.0.1", TOKEN, [Transport.CUDA_IPC])


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with running(PeerSetup(transports=(Transport.TCP,), host="::1")) as peer:
        assert peer.endpoint.tcp_address.startswith("[::1]:")
        pool = new_pool(8, peer.setup.span_bytes)
        still_serves(peer, pool)
        pool.close()


# ---- bad servers --------------------------------------------------------------------------------


def endpoint_of(pool: PoolMemory, address: str) -> Endpoint:
    return Endpoint(
        pool.incarnation,
        FINGERPRINT,
        pool.num_blocks,
        pool.span_bytes,
        host_id="",
        pid=0,
        shm_fd=0,
        tcp_address=address,
        device_uuid="",
        cuda_ipc_handle=b"",
        cuda_ipc_offset=0,
        transports=(Transport.TCP,),
    )


@pytest.fixture
def bad_server(pool: PoolMemory) -> Iterator[Callable[[Callable[[Channel], None]], Endpoint]]:
    """Starts a server that does what the test says with its first connection."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(behave: Callable[[Channel], None]) -> Endpoint:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            sock, _ = listener.accept()
            channel = Channel(sock)
            try:
                behave(channel)
            except PdserveError as error:
                print(f"the bad server saw {error!r}")
            finally:
                channel.close()

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return endpoint_of(pool, f"127.0.0.1:{listener.getsockname()[1]}")

    yield start
    for listener in listeners:
        listener.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def soon() -> float:
    return time.monotonic() + 2


def say(data: bytes) -> Callable[[Channel], None]:
    def behave(channel: Channel) -> None:
        channel.send_views([memoryview(data)], soon())
        channel.receive_into(memoryview(bytearray(1)), soon())

    return behave


def impostor(channel: Channel) -> None:
    """Welcomes everybody without knowing the token."""
    channel.send(Challenge(bytes(32)), soon())
    channel.receive(soon())
    channel.send(Welcome(bytes(32), 8, SETUP.span_bytes), soon())


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ProtocolError),
        (say(wire.HEADER.pack(wire.MAGIC, 1, wire.Kind.WELCOME, 0, 2**31)), ProtocolError),
        (say(wire.encode(Status(Code.BUSY))), TransferError),
        (say(wire.encode(Status(Code.OK))), ProtocolError),
        (impostor, ProtocolError),
        (lambda channel: None, TransferError),
        (lambda channel: time.sleep(1.5), DeadlineExceeded),
    ],
    ids=["http", "oversize", "busy", "ok", "impostor", "leaves", "silent"],
)
def test_a_reader_does_not_open_a_bad_server(
    pool: PoolMemory,
    bad_server: Callable[[Callable[[Channel], None]], Endpoint],
    behave: Callable[[Channel], None],
    error: type[PdserveError],
) -> None:
    endpoint = bad_server(behave)
    files = open_files()
    with pytest.raises(error):
        TcpReader(endpoint, pool, FINGERPRINT, TOKEN, MESSAGE, time.monotonic() + 1)
    # Ours is closed; the server's end of the pair may come and go.
    assert len(open_files() - files) <= 1


def welcomed(then: Callable[[Channel], None], pool: PoolMemory) -> Callable[[Channel], None]:
    identity = Identity(pool.incarnation, FINGERPRINT, pool.num_blocks, pool.span_bytes)

    def behave(channel: Channel) -> None:
        assert session.welcome(channel, identity, TOKEN, soon()) is Code.OK
        channel.receive(soon())  # the read
        then(channel)

    return behave


def _spans(channel: Channel, count: int) -> None:
    channel.send(Status(Code.OK), soon())
    channel.send_views([memoryview(bytes(count))], soon())


@pytest.mark.parametrize(
    ("then", "error"),
    [
        (lambda channel: None, TransferError),
        (lambda channel: _spans(channel, 100), TransferError),
        (lambda channel: _spans(channel, SETUP.span_bytes), TransferError),
        (lambda channel: _spans(channel, SETUP.span_bytes + 12), ProtocolError),
        (lambda channel: channel.send(Challenge(bytes(32)), soon()), ProtocolError),
        (lambda channel: (_spans(channel, 100), time.sleep(2.5)), DeadlineExceeded),
    ],
    ids=["leaves", "truncated", "no trailer", "more than asked", "out of order", "stalls"],
)
def test_a_read_from_a_server_that_goes_bad_ends_the_connection(
    pool: PoolMemory,
    bad_server: Callable[[Callable[[Channel], None]], Endpoint],
    then: Callable[[Channel], None],
    error: type[PdserveError],
) -> None:
    reader = open_reader(bad_server(welcomed(then, pool)), pool)
    offer = kv_peer.BlockOffer(0, 0, 0, 0)
    with pytest.raises(error):
        reader.read([offer], [1], time.monotonic() + 1.5)
    assert not reader.usable
    neighbours = all_bytes(pool)
    assert not np.delete(neighbours, 1, axis=0).any()
    with pytest.raises(TransferError):
        reader.read([offer], [1], time.monotonic() + 0.5)
