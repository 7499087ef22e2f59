"""A pool, a tier manager over it, and jobs whose ends are watched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from real_redis import CONFIG, FINGERPRINT, WRITER

from cache_tiers.device_spans import DevicePool
from cache_tiers.manager import TierManager
from cache_tiers.spans import HostPool
from cache_tiers.write_jobs import WriteLimits
from pdserve.config import CacheConfig, HostTierConfig
from pdserve.engine.api import (
    BlockId,
    PinTicket,
    SeqId,
    TierRead,
    TierReadDone,
    Unpin,
    WriteBack,
)
from pdserve.types import BlockKey, Incarnation, Tier

SPAN = 4800


def value_of(key: BlockKey) -> bytes:
    """The one true value of a key: what a test writes and expects."""
    return (key * (SPAN // len(key) + 1))[:SPAN]


class World:
    """``host``: spans of the host tier. ``on_span``: called before the manager sees a block.

    ``as_device``: the pool is copied as one on a device is, without its streams.
    """

    def __init__(
        self,
        redis_url: str = "",
        host: int = 0,
        blocks: int = 64,
        limits: WriteLimits | None = None,
        writer: Incarnation = WRITER,
        on_span: Callable[[int], None] = lambda block: None,
        as_device: bool = False,
        computing: Callable[[], bool] = lambda: False,
        **redis: object,
    ) -> None:
        self.pool = np.zeros((blocks, SPAN), dtype=np.uint8)
        self._on_span = on_span
        self._lock = threading.Lock()
        self._ticket = 0
        self.ends: dict[object, list[object]] = {}  # job -> every answer that it got
        self.manager = TierManager(
            CacheConfig(HostTierConfig(host * SPAN), replace(CONFIG, **redis)),
            SPAN,
            FINGERPRINT,
            writer,
            redis_url,
            DevicePool(torch.from_numpy(self.pool)) if as_device else HostPool(self._span),
            limits or WriteLimits(),
            computing,
        )

    def _span(self, block: int) -> memoryview:
        self._on_span(block)
        return self.pool[block].data

    def _end(self, job: object, answer: object) -> None:
        with self._lock:
            self.ends[job].append(answer)

    def start_write(
        self, keys: Sequence[BlockKey], first_block: int = 0, from_peer: bool = False
    ) -> PinTicket:
        """Puts the keys' values into the pool and gives them to the manager."""
        with self._lock:
            self._ticket += 1
            ticket = PinTicket(self._ticket)
            self.ends[ticket] = []
        blocks = [BlockId(first_block + i) for i in range(len(keys))]
        for block, key in zip(blocks, keys, strict=True):
            self.pool[block] = np.frombuffer(value_of(key), np.uint8)
        job = WriteBack(ticket, tuple(keys), tuple(blocks), from_peer)
        self.manager.write_back(job, lambda unpin: self._end(ticket, unpin))
        return ticket

    def start_read(self, keys: Sequence[BlockKey], first_block: int = 0) -> SeqId:
        with self._lock:
            self._ticket += 1
            seq = SeqId(self._ticket.to_bytes(16, "big"))
            self.ends[seq] = []
        blocks = tuple(BlockId(first_block + i) for i in range(len(keys)))
        job = TierRead(seq, tuple(keys), blocks)
        self.manager.read(job, lambda done: self._end(seq, done))
        return seq

    def wait(self, job: object, timeout: float = 10.0) -> object:
        deadline = time.monotonic() + timeout
        while not self.ends[job]:
            assert time.monotonic() < deadline, "the job did not end"
            time.sleep(0.001)
        (answer,) = self.ends[job]
        return answer

    def write(self, keys: Sequence[BlockKey], first_block: int = 0) -> None:
        """A write-back that has arrived everywhere."""
        ticket = self.start_write(keys, first_block)
        assert self.wait(ticket) == Unpin(ticket)
        assert self.manager.quiesce(10)

    def read(self, keys: Sequence[BlockKey], first_block: int = 32) -> list[Tier]:
        """Which tier filled each block of the prefix that was found; the bytes are checked."""
        self.pool[first_block : first_block + len(keys)] = 0xEE
        answer = self.wait(self.start_read(keys, first_block))
        assert isinstance(answer, TierReadDone)
        return self.checked(keys, answer, first_block)

    def checked(
        self, keys: Sequence[BlockKey], answer: TierReadDone, first_block: int
    ) -> list[Tier]:
        assert len(answer.hits) == len(keys)
        hits = [hit for hit in answer.hits if hit is not None]
        assert answer.hits == (*hits, *[None] * (len(keys) - len(hits))), "not a prefix"
        for i, key in enumerate(keys[: len(hits)]):
            assert self.pool[first_block + i].tobytes() == value_of(key)
        return hits


def open_world(worlds: list[World], *args: object, **kwargs: object) -> World:
    world = World(*args, **kwargs)  # type: ignore[arg-type]
    worlds.append(world)
    return world
