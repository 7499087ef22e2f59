"""Keeps the router's view of one worker's device index, from that worker's KV events.

    BLIND --(a replay from 0 was complete)--> LIVE --(a gap that no replay fills)--> BLIND

BLIND: the worker's view is dropped, and a replay from 0 is asked for again and again. LIVE: batches
are applied in order; a missing number is asked for before anything later is applied, and when it
has been quiet for a while the tail is asked for, since a lost last batch leaves no gap to see.
A batch that cannot be read is one that is missing; a message that is no batch at all is counted and
passed over.

One subscriber per worker *incarnation*: its owner closes it and opens another when the worker was
restarted, and drops a dead worker from the index.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from dataclasses import dataclass, replace

import zmq
import zmq.asyncio

from cache_tiers.kv_wire import (
    END_SEQ,
    MESSAGE_BYTES_MAX,
    TOPIC,
    KvEvent,
    decode_batch,
    decode_seq,
    encode_seq,
)
from cache_tiers.prefix_index import PrefixIndex
from pdserve.engine.api import Cleared
from pdserve.errors import ProtocolError
from pdserve.types import WorkerId

logger = logging.getLogger(__name__)

_QUEUE_MAX = 10_000  # published batches that may wait for us; what does not fit is a gap
_REPLAY_TIMEOUT_S = 2.0
_QUIET_S = 2.0
# The quiet time and a replay, with as much again for one that is slow.
SURE_WITHIN_S = _QUIET_S + 2 * _REPLAY_TIMEOUT_S


class _Replay(enum.Enum):
    COMPLETE = "complete"  # the end marker came, and no number was missing before it
    GAP = "gap"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class SubscriberStats:
    batches: int = 0
    duplicates: int = 0
    bad_messages: int = 0
    gaps: int = 0
    replays: int = 0
    went_blind: int = 0


class KvEventSubscriber:
    """Lives on one event loop. Addresses are ZMQ's (``tcp://host:port``), from the registry."""

    def __init__(
        self,
        worker: WorkerId,
        events_address: str,
        replay_address: str,
        index: PrefixIndex,
        *,
        topic: str = TOPIC,
        replay_timeout_s: float = _REPLAY_TIMEOUT_S,
        quiet_s: float = _QUIET_S,
        retry_s: float = 1.0,
    ) -> None:
        self._worker = worker
        self._events_address = events_address
        self._replay_address = replay_address
        self._index = index
        self._topic = topic.encode()
        self._replay_timeout_s = replay_timeout_s
        self._quiet_s = quiet_s
        self._retry_s = retry_s
        self._next = 0  # the number that is to be applied next
        self._blind = True
        self._sure_at = time.monotonic()  # when the view was last known to be complete
        self._learned = False
        self._live = asyncio.Event()
        self._stats = SubscriberStats()
        self._dealer: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def blind(self) -> bool:
        """Whether the index knows nothing of this worker."""
        return self._blind

    @property
    def learned(self) -> bool:
        """Whether the view was ever complete."""
        return self._learned

    def unsure_s(self) -> float:
        """Seconds since the view was last known to be complete, or since it was opened.

        Below ``SURE_WITHIN_S`` while all is well, with the default times.
        """
        return time.monotonic() - self._sure_at

    def stats(self) -> SubscriberStats:
        return self._stats

    def start(self) -> None:
        assert self._task is None
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name=f"kv-events-{self._worker}"
        )

    async def wait_live(self) -> None:
        """Returns when the view is not blind."""
        await self._live.wait()

    async def close(self) -> None:
        """Applies nothing more. The view stays as it is; the owner drops or rebuilds it."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        self._hang_up()

    # ---- the loop --------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            sub = self._socket(zmq.SocketType.SUB, self._events_address)
            try:
                sub.subscribe(self._topic)
                await self._follow(sub)
            except (zmq.ZMQError, OSError):
                logger.exception("KV events of %s: socket failed", self._worker)
            finally:
                sub.close(linger=0)
            self._go_blind("its socket failed")
            await asyncio.sleep(self._retry_s)

    async def _follow(self, sub: zmq.asyncio.Socket) -> None:
        while True:
            if self._blind:
                await self._rebuild()
                if self._blind:
                    await asyncio.sleep(self._retry_s)
                    continue
            if await sub.poll(int(self._quiet_s * 1000)):
                await self._message(await sub.recv_multipart())
            elif await self._replay() is _Replay.GAP:
                self._go_blind("the publisher cannot repeat what is missing")

    async def _rebuild(self) -> None:
        """Asks for everything; what comes is applied to an empty view."""
        self._index.cleared(self._worker)
        self._next = 0
        if await self._replay() is _Replay.COMPLETE:
            self._blind = False
            self._learned = True
            self._live.set()
            logger.info("KV events of %s: view is complete", self._worker)
        else:
            self._index.cleared(self._worker)

    async def _message(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 3:
                raise ProtocolError("a published batch has three frames")
            seq = decode_seq(frames[1])
        except ProtocolError:
            self._count(bad_messages=1)
            return
        if seq > self._next:
            self._count(gaps=1)
            if await self._replay() is not _Replay.COMPLETE or seq > self._next:
                self._go_blind("a gap could not be filled")
                return
        if seq < self._next:
            self._count(duplicates=1)
            return
        events = self._decode(frames[2])
        if events is None:
            self._go_blind("a batch cannot be read")
            return
        self._apply(seq, events)
        self._sure_at = time.monotonic()

    def _go_blind(self, why: str) -> None:
        if not self._blind:
            logger.warning("KV events of %s: view dropped, %s", self._worker, why)
            self._count(went_blind=1)
        self._blind = True
        self._live.clear()
        self._index.cleared(self._worker)

    def _decode(self, payload: bytes) -> list[KvEvent] | None:
        """None: it cannot be read, and nobody knows what it changed."""
        try:
            return decode_batch(payload)
        except ProtocolError:
            self._count(bad_messages=1)
            return None

    def _apply(self, seq: int, events: list[KvEvent]) -> None:
        for event in events:
            self._index.apply(self._worker, event)
        self._next = seq + 1
        self._count(batches=1)

    # ---- replay ----------------------------------------------------------------------------------

    async def _replay(self) -> _Replay:
        """Applies everything from ``_next`` on that the publisher can repeat."""
        self._count(replays=1)
        if self._dealer is None:
            self._dealer = self._socket(zmq.SocketType.DEALER, self._replay_address)
        result = _Replay.SILENT
        try:
            await self._dealer.send_multipart([b"", encode_seq(self._next)])
            result = await self._replies(self._dealer)
        finally:
            if result is not _Replay.COMPLETE:
                # Answers to this request may still come; they must not meet the next one.
                self._hang_up()
        return result

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._dealer.close(linger=0)
            self._dealer = None

    async def _replies(self, dealer: zmq.asyncio.Socket) -> _Replay:
        while await dealer.poll(int(self._replay_timeout_s * 1000)):
            frames = await dealer.recv_multipart()
            try:
                if len(frames) != 4 or frames[0]:
                    raise ProtocolError("a replayed batch has three frames after the delimiter")
                seq = decode_seq(frames[2])
            except ProtocolError:
                self._count(bad_messages=1)
                continue
            if frames[2] == END_SEQ:
                self._sure_at = time.monotonic()
                return _Replay.COMPLETE
            events = self._decode(frames[3])
            if events is None:
                return _Replay.GAP
            # A batch that starts with "cleared" stands for all before it.
            if seq > self._next and not (events and isinstance(events[0], Cleared)):
                return _Replay.GAP
            if seq >= self._next:
                self._apply(seq, events)
        return _Replay.SILENT

    def _socket(self, kind: zmq.SocketType, address: str) -> zmq.asyncio.Socket:
        # One context, hence one I/O thread, for the subscribers of all workers.
        sock = zmq.asyncio.Context.instance().socket(kind)
        sock.maxmsgsize = MESSAGE_BYTES_MAX
        # A replay is bounded by its publisher, and losing a part of it would be of no use.
        sock.rcvhwm = 0 if kind is zmq.SocketType.DEALER else _QUEUE_MAX
        sock.ipv6 = "[" in address
        sock.connect(address)
        return sock

    def _count(
        self,
        batches: int = 0,
        duplicates: int = 0,
        bad_messages: int = 0,
        gaps: int = 0,
        replays: int = 0,
        went_blind: int = 0,
    ) -> None:
        now = self._stats
        self._stats = replace(
            now,
            batches=now.batches + batches,
            duplicates=now.duplicates + duplicates,
            bad_messages=now.bad_messages + bad_messages,
            gaps=now.gaps + gaps,
            replays=now.replays + replays,
            went_blind=now.went_blind + went_blind,
        )
