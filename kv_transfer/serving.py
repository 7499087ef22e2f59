"""What a transfer server does for one peer: handshake, then requests until the peer leaves.

    CHALLENGED -> SERVING -> CLOSED       (a bad proof or another pool: refused, CLOSED)

Only generations and spans of the local pool are read here; nothing is ever written to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from kv_transfer import session
from kv_transfer.session import Channel, Identity
from kv_transfer.slots import LinkFactory, SlotSender
from kv_transfer.spans import spans_of
from kv_transfer.wire import (
    MAX_ENTRIES,
    Check,
    Code,
    LinkOpen,
    Read,
    SlotRead,
    Status,
    WireVersionMismatch,
)
from pdserve.engine.memory import PoolMemory
from pdserve.errors import DeadlineExceeded, ProtocolError, TransferError
from pdserve.faults import Step, board, flip_bit

# A peer that has not proven itself by then gives its place to another.
HANDSHAKE_SECONDS = 5.0
_GOODBYE_SECONDS = 1.0
# A client asks for no more than its own deadline; this bounds what a wrong one can ask for.
_READ_SECONDS_MAX = 600.0


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Counts since the server's start."""

    connections: int = 0
    refused: int = 0  # wrong token, incarnation or layout, or no room
    bad_frames: int = 0
    lost: int = 0  # the peer vanished or stalled
    failed: int = 0  # we broke
    reads: int = 0
    stale_reads: int = 0
    bytes_sent: int = 0


class Counters:
    """Thread-safe ServerStats in the making."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = ServerStats()
        self._names = {field.name for field in fields(ServerStats)}

    def add(self, name: str, amount: int = 1) -> None:
        assert name in self._names
        with self._lock:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + amount})

    def snapshot(self) -> ServerStats:
        with self._lock:
            return self._stats


def judge_blocks(
    pool: PoolMemory, blocks: Sequence[int], generations: Sequence[int]
) -> tuple[Code, int]:
    """OK, or why and at which position the first block cannot be read."""
    table = np.asarray(blocks, dtype=np.int64)
    outside = np.flatnonzero(table >= pool.num_blocks)
    if outside.size:
        return Code.RANGE, int(outside[0])
    freed = np.flatnonzero(pool.generations[table] != np.asarray(generations, dtype=np.uint64))
    if freed.size:
        return Code.STALE, int(freed[0])
    return Code.OK, 0


class Connection:
    """Serves one peer on the thread that calls ``run``."""

    def __init__(
        self,
        channel: Channel,
        pool: PoolMemory,
        identity: Identity,
        token: str,
        links: LinkFactory | None,
        counters: Counters,
    ) -> None:
        self._channel = channel
        self._pool = pool
        self._identity = identity
        self._token = token
        self._links = links
        self._counters = counters
        self._source = spans_of(pool)
        self._slots: SlotSender | None = None

    def run(self) -> None:
        """Returns when the peer is gone, whatever it did. Closes the channel."""
        try:
            deadline = time.monotonic() + HANDSHAKE_SECONDS
            if session.welcome(self._channel, self._identity, self._token, deadline) is not Code.OK:
                self._counters.add("refused")
                return
            self._counters.add("connections")
            while True:
                self._serve_one()
        except ProtocolError as error:
            self._counters.add("bad_frames")
            version = isinstance(error, WireVersionMismatch)
            self._say_goodbye(Code.VERSION if version else Code.BAD_FRAME)
        except (TransferError, DeadlineExceeded):
            self._counters.add("lost")
        finally:
            if self._slots is not None:
                self._slots.close()
            self._channel.close()

    def _serve_one(self) -> None:
        request = self._channel.receive(None)
        match request:
            case Read(remaining_ms, blocks, generations):
                self._serve_read(remaining_ms, blocks, generations)
            case Check(blocks, generations):
                self._reply(*self._judge(self._pool, blocks, generations))
            case LinkOpen():
                self._open_link(request)
            case SlotRead() if self._slots is not None:
                self._counters.add("reads")
                self._counters.add("bytes_sent", self._slots.serve(request))
            case _:
                raise ProtocolError(f"{type(request).__name__} is no request that fits here")

    def _serve_read(
        self, remaining_ms: int, blocks: tuple[int, ...], generations: tuple[int, ...]
    ) -> None:
        deadline = time.monotonic() + min(remaining_ms / 1000, _READ_SECONDS_MAX)
        code, position = self._judge(self._pool, blocks, generations)
        self._reply(code, position)
        self._counters.add("reads")
        if code is not Code.OK:
            return
        damage = board.hit(Step.TRANSFER_SERVE)
        for views in self._source.batches(blocks):
            self._channel.send_views(flip_bit(views) if damage else views, deadline)
        # A block that was freed meanwhile may have left with other bytes in it.
        code, position = self._judge(self._pool, blocks, generations)
        self._reply(code, position)
        self._counters.add("bytes_sent", len(blocks) * self._pool.span_bytes)

    def _judge(
        self, pool: PoolMemory, blocks: Sequence[int], generations: Sequence[int]
    ) -> tuple[Code, int]:
        """Counts too. Shared memory is read without asking: its readers judge for themselves."""
        code, position = judge_blocks(pool, blocks, generations)
        if code is Code.STALE:
            self._counters.add("stale_reads")
        return code, position

    def _open_link(self, request: LinkOpen) -> None:
        if self._slots is not None or not 1 <= request.slot_blocks <= MAX_ENTRIES:
            raise ProtocolError(f"a link with slots of {request.slot_blocks} blocks")
        if self._links is None:
            self._reply(Code.LINK, 0)
            raise TransferError("a peer asked for a link, but there is no NCCL here")
        self._slots = SlotSender(self._channel, self._pool, self._links, self._judge)
        self._slots.open(request.slot_blocks)

    def _reply(self, code: Code, position: int) -> None:
        self._channel.send(Status(code, position), time.monotonic() + session.FRAME_SECONDS)

    def _say_goodbye(self, code: Code) -> None:
        try:
            self._channel.send(Status(code), time.monotonic() + _GOODBYE_SECONDS)
        except (TransferError, DeadlineExceeded):
            self._counters.add("lost")
