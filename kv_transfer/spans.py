"""Block spans as host bytes: views of a pool in shared memory, copies of one on a device.

A *source* yields what a server sends, a *sink* holds what a client receives. In shared memory both
show the pool itself, so nothing is copied in user space. On a device they go through a bounded
piece of host memory, and the sink writes into the pool only what it is told to commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from kv_transfer.plan import runs, split_reads
from pdserve.engine.memory import MemoryKind, PoolMemory

STAGING_BYTES = 16 * 2**20
# Bounds a piece of one sendmsg call, so that generations and deadlines are looked at in between.
_SEND_BLOCKS = 512


class SpanSource(Protocol):
    def batches(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        """The spans of ``blocks`` in order; a batch is valid until the next one is asked for."""
        ...


class SpanSink(Protocol):
    def max_blocks(self) -> int:
        """How many blocks ``buffers`` can hold at once."""
        ...

    def buffers(self, into: Sequence[int]) -> list[memoryview]:
        """One writable span for each block of ``into``."""
        ...

    def commit(self, into: Sequence[int]) -> None:
        """Called when the buffers are full and verified; afterwards the blocks hold their bytes."""
        ...


class SharedSpans:
    """Source and sink of a pool in shared memory."""

    def __init__(self, pool: PoolMemory) -> None:
        self._span = pool.span_bytes
        self._flat = pool.blocks.view(-1).numpy().data

    def batches(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        for start in range(0, len(blocks), _SEND_BLOCKS):
            part = blocks[start : start + _SEND_BLOCKS]
            yield [
                self._flat[run.source * self._span : (run.source + run.count) * self._span]
                for run in runs(part, range(len(part)), _SEND_BLOCKS)
            ]

    def max_blocks(self) -> int:
        return 2**31

    def buffers(self, into: Sequence[int]) -> list[memoryview]:
        return [self._flat[block * self._span : (block + 1) * self._span] for block in into]

    def commit(self, into: Sequence[int]) -> None:
        """The buffers are the blocks."""


class StagedSpans:
    """Source and sink of a pool on a device. Used by one thread.

    Copies run on that thread's current stream, after everything that was queued there before.
    """

    def __init__(self, pool: PoolMemory) -> None:
        self._pool = pool
        self._rows = max(1, STAGING_BYTES // pool.span_bytes)
        self._staging: torch.Tensor | None = None

    def batches(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        span = self._pool.span_bytes
        for part in split_reads(len(blocks), span, STAGING_BYTES, self._rows):
            rows = self._pool.blocks[self._index(blocks[part])].cpu()
            yield [rows.view(-1).numpy().data]

    def max_blocks(self) -> int:
        return self._rows

    def buffers(self, into: Sequence[int]) -> list[memoryview]:
        if self._staging is None:
            shape = (self._rows, self._pool.span_bytes)
            self._staging = torch.empty(shape, dtype=torch.uint8)
        return [self._staging[i].numpy().data for i in range(len(into))]

    def commit(self, into: Sequence[int]) -> None:
        assert self._staging is not None
        blocks = self._pool.blocks
        rows = self._staging[: len(into)].to(blocks.device)
        blocks.index_copy_(0, self._index(into), rows)
        if blocks.is_cuda:
            torch.cuda.current_stream(blocks.device).synchronize()

    def _index(self, blocks: Sequence[int]) -> torch.Tensor:
        table = np.asarray(blocks, dtype=np.int64)
        return torch.from_numpy(table).to(self._pool.blocks.device)


def spans_of(pool: PoolMemory) -> SharedSpans | StagedSpans:
    return SharedSpans(pool) if pool.kind is MemoryKind.SHARED else StagedSpans(pool)
