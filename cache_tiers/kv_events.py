"""Publishes the changes of a worker's device index, as vLLM's KV events (cache_tiers/kv_wire.py).

    engine thread:     publish(events) -> queue
    publisher thread:  queue -> numbered batch -> PUB socket, and the replay log
                       ROUTER socket: replay request -> what the log can repeat -> end marker

A batch number that a subscriber misses is repeated on request; nothing is ever renumbered. Should
the queue overflow, what it held is replaced by one "cleared": subscribers then know less than the
truth, never more.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from cache_tiers.kv_replay import ReplayLog
from cache_tiers.kv_subscriber import KvEventSubscriber
from cache_tiers.kv_wire import END_SEQ, TOPIC, KvEvent, decode_seq, encode_batch, encode_seq
from pdserve.engine.api import Cleared
from pdserve.errors import ConfigError, ProtocolError
from pdserve.faults import Step, board

__all__ = ["TOPIC", "KvEventPublisher", "KvEventSubscriber", "PublisherStats"]

logger = logging.getLogger(__name__)

_REQUEST_BYTES_MAX = 1024
_REQUESTS_PER_TURN = 16
_LINGER_MS = 200


@dataclass(frozen=True, slots=True)
class PublisherStats:
    batches: int
    replays: int
    bad_requests: int
    overflows: int  # how often the queue was replaced by "cleared"


class KvEventPublisher:
    """Binds both sockets to ``host`` on ports of the system's choice. ConfigError if it cannot.

    ``replay_batches``, ``replay_bytes``: what is kept for replay as it was published; older
    batches are folded into one. ``queue_batches``: calls of ``publish`` that may wait.
    """

    def __init__(
        self,
        host: str,
        topic: str = TOPIC,
        replay_batches: int = 10_000,
        replay_bytes: int = 64 << 20,
        queue_batches: int = 100_000,
    ) -> None:
        self._topic = topic.encode()
        self._log = ReplayLog(replay_batches, replay_bytes)
        self._queue_max = queue_batches
        self._queue: deque[tuple[KvEvent, ...]] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._next = 0
        self._replays = 0
        self._bad_requests = 0
        self._overflows = 0
        self._context = zmq.Context()
        try:
            self._pub, self.address = self._bind(zmq.SocketType.PUB, host, queue_batches)
            # A client gets one whole replay queued and no more, however slowly it reads.
            self._router, self.replay_address = self._bind(
                zmq.SocketType.ROUTER, host, replay_batches + _REQUESTS_PER_TURN
            )
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"KV events cannot be published on {host}: {error}") from error
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[KvEvent]) -> None:
        """One batch, in the order of the calls. Does not block; any thread. No-op once closed."""
        if not events:
            return
        with self._lock:
            if self._closing:
                return
            if len(self._queue) >= self._queue_max:
                self._queue.clear()
                self._queue.append((Cleared(),))
                self._overflows += 1
            self._queue.append(tuple(events))
            os.eventfd_write(self._wake, 1)

    def stats(self) -> PublisherStats:
        return PublisherStats(self._next, self._replays, self._bad_requests, self._overflows)

    def close(self) -> None:
        """Sends what is queued, then closes both sockets."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _bind(
        self, kind: zmq.SocketType, host: str, queue_max: int
    ) -> tuple[zmq.Socket[bytes], str]:
        """A bound socket that queues so many messages for one peer, and its address."""
        sock = self._context.socket(kind)
        sock.sndhwm = queue_max
        sock.maxmsgsize = _REQUEST_BYTES_MAX
        sock.ipv6 = ":" in host
        literal = f"[{host}]" if ":" in host else host
        sock.bind(f"tcp://{literal}:0")
        port = sock.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1]
        return sock, f"tcp://{literal}:{port}"

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        try:
            while self._turn(poller):
                pass
        except zmq.ZMQError:
            logger.exception("KV events are not published any more")
        finally:
            self._pub.close(linger=_LINGER_MS)
            self._router.close(linger=0)
            self._context.term()

    def _turn(self, poller: zmq.Poller) -> bool:
        """Waits for work and does it; False once closed and all is sent."""
        ready = dict(poller.poll())
        if self._wake in ready:
            os.eventfd_read(self._wake)
        with self._lock:
            batches = list(self._queue)
            self._queue.clear()
            closing = self._closing
        for events in batches:
            self._publish(events)
        if self._router in ready:
            self._answer_requests()
        return not closing

    def _publish(self, events: tuple[KvEvent, ...]) -> None:
        payload = encode_batch(events, time.time())
        self._log.append(self._next, events, payload)
        self._pub.send_multipart([self._topic, encode_seq(self._next), payload])
        self._next += 1

    def _answer_requests(self) -> None:
        for _ in range(_REQUESTS_PER_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                first = _wanted(frames)
            except ProtocolError:
                self._bad_requests += 1
                continue
            client = frames[0]
            board.hit(Step.KV_REPLAY)
            self._replays += 1
            for seq, payload in self._log.since(first, time.time()):
                self._router.send_multipart([client, b"", self._topic, encode_seq(seq), payload])
            self._router.send_multipart([client, b"", b"", END_SEQ, b""])


def _wanted(frames: Sequence[bytes]) -> int:
    """The first batch that a replay request asks for."""
    if len(frames) != 3 or frames[1]:
        raise ProtocolError("not a replay request")
    return decode_seq(frames[2])
