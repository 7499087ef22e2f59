"""Each protection of a read is needed: the same story, told without it, goes wrong.

Two real pools; the reader maps the other's memory. "Switched off" replaces one check of the
production code by one that is always content.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from kv_peer import FINGERPRINT, TOKEN

import kv_transfer.shm
from kv_transfer.exporter import PoolExporter
from kv_transfer.readers import ReaderPool
from kv_transfer.shm import ShmReader
from pdserve.config import TransferConfig
from pdserve.engine.host_spans import PlainSpans, Rows
from pdserve.engine.memory import PoolMemory, allocate_shared
from pdserve.errors import ChecksumMismatch, StaleBlock
from pdserve.types import Incarnation, Transport

BLOCKS, SPAN = 4, 1536


@dataclass
class Two:
    theirs: PoolMemory
    ours: PoolMemory
    exporter: PoolExporter
    readers: ReaderPool

    def fill(self, block: int, value: int) -> None:
        np.frombuffer(self.theirs.block_bytes(block), dtype=np.uint8)[:] = value

    def read(self, offer: object) -> bytes:
        reader = self.readers.reader_for(self.exporter.endpoint())
        reader.read([offer], [2], time.monotonic() + 5)  # type: ignore[list-item]
        return bytes(self.ours.block_bytes(2))


@pytest.fixture
def two() -> Iterator[Two]:
    theirs, ours = (allocate_shared(BLOCKS, SPAN, Incarnation(os.urandom(16))) for _ in range(2))
    exporter = PoolExporter(theirs, FINGERPRINT, "127.0.0.1", TOKEN, [Transport.SHM])
    readers = ReaderPool(ours, FINGERPRINT, TransferConfig(), TOKEN)
    yield Two(theirs, ours, exporter, readers)
    readers.close()
    exporter.close()
    theirs.close()
    ours.close()


def damaged_after_the_offer(two: Two) -> bytes:
    two.fill(1, 7)
    (offer,) = two.exporter.offers([(0, 1)])
    two.theirs.block_bytes(1)[SPAN // 2] ^= 1
    return two.read(offer)


def test_checksum(two: Two) -> None:
    with pytest.raises(ChecksumMismatch):
        damaged_after_the_offer(two)


def test_without_the_checksum_damaged_bytes_are_taken(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Content:
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = None  # type: ignore[assignment]

    take = ShmReader._take

    def blind(reader: ShmReader, source: Sequence[int], into: Sequence[int]) -> list[Content]:
        return [Content() for _ in take(reader, source, into)]

    monkeypatch.setattr(ShmReader, "_take", blind)
    assert damaged_after_the_offer(two) != bytes([7]) * SPAN


def reused_after_the_offer(two: Two) -> bytes:
    """The owner gives the block to another prompt."""
    two.fill(1, 7)
    (offer,) = two.exporter.offers([(0, 1)])
    two.theirs.generations[1] += 1
    two.fill(1, 8)
    return two.read(offer)


def test_generation(two: Two) -> None:
    with pytest.raises(StaleBlock):
        reused_after_the_offer(two)


def test_without_the_generation_a_reuse_is_taken_for_damage(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a healthy peer's blocks would be forgotten as suspect."""
    monkeypatch.setattr(ShmReader, "_check_generations", lambda self, source, offers: None)
    with pytest.raises(ChecksumMismatch):
        reused_after_the_offer(two)


def another_process_in_its_place(two: Two) -> bytes:
    """What was announced is gone; its pid and descriptor lead to another pool of the same form."""
    two.fill(1, 7)
    (offer,) = two.exporter.offers([(0, 1)])
    meant = two.exporter.endpoint()
    two.theirs.close()
    two.theirs = allocate_shared(BLOCKS, SPAN, Incarnation(os.urandom(16)))
    assert two.theirs.fd == meant.shm_fd, "the descriptor was to be taken over"
    two.fill(1, 7)
    two.theirs.generations[1] = offer.generation
    return two.read(offer)


def test_incarnation(two: Two) -> None:
    with pytest.raises(StaleBlock):
        another_process_in_its_place(two)


def test_without_the_incarnation_a_stranger_is_read(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfer.shm, "_check_file", lambda fd, endpoint: None)
    assert another_process_in_its_place(two) == bytes([7]) * SPAN


def test_what_a_pool_says_of_its_copies_is_what_is_used(two: Two) -> None:
    """A fast way that nobody takes is wrong in no test and slow in every cluster."""
    used: list[str] = []

    class Recording(PlainSpans):
        def sums(self, pool: Rows, blocks: Sequence[int]) -> list[int]:
            used.append("sums")
            return super().sums(pool, blocks)

        def take(
            self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
        ) -> list[int]:
            used.append("take")
            return super().take(theirs, source, ours, target)

    two.theirs.spans = two.ours.spans = Recording()
    two.fill(1, 7)
    (offer,) = two.exporter.offers([(0, 1)])
    assert two.read(offer) == bytes([7]) * SPAN
    assert used == ["sums", "take"]
