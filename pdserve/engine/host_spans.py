"""Spans of pools in host memory: their checksums, and copying them out of another pool.

    PlainSpans    numpy and the xxhash library; the reference
    NativeSpans   the kernels (kernels/spans.h): in one pass, past the caches

A checksum is XXH3-64 of a whole span. That of a copied span is of the bytes that lie in the target,
whatever happened to the source meanwhile. Both release the GIL while they read and write (the
library for what is larger than 64 KiB).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

Rows = npt.NDArray[np.uint8]  # [blocks, span_bytes], contiguous
_LINE = 64
# The kernels' sum has no rules for shorter inputs (kernels/xxh3.h).
_NATIVE_MORE_THAN = 240
_TRIED_BLOCKS = 4


class HostSpans(Protocol):
    def sums(self, pool: Rows, blocks: Sequence[int]) -> list[int]:
        """Of each block; 0 <= sum < 2**64."""
        ...

    def take(
        self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
    ) -> list[int]:
        """Copies ``source[i]`` to ``target[i]``; the sums of what was copied, in that order.

        Rows of one length; no block of ours twice.
        """
        ...


def span_sum(span: memoryview) -> int:
    """0 <= sum < 2**64."""
    return xxhash.xxh3_64_intdigest(span)


class PlainSpans:
    def sums(self, pool: Rows, blocks: Sequence[int]) -> list[int]:
        return [span_sum(pool[block].data) for block in blocks]

    def take(
        self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
    ) -> list[int]:
        found = []
        for their_block, our_block in zip(source, target, strict=True):
            np.copyto(ours[our_block], theirs[their_block])
            found.append(span_sum(ours[our_block].data))
        return found


class NativeSpans:
    """By kernels that have tiles. Spans of whole lines, see ``takes``; ours begin at a line."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._sum = kernels.pdserve_sum_spans
        self._take = kernels.pdserve_take_spans
        for function, arguments in ((self._sum, 3), (self._take, 5)):
            function.restype = None
            function.argtypes = (ctypes.c_void_p,) * arguments + (ctypes.c_int64,) * 2

    @staticmethod
    def takes(span_bytes: int) -> bool:
        return span_bytes > _NATIVE_MORE_THAN and span_bytes % _LINE == 0

    def sums(self, pool: Rows, blocks: Sequence[int]) -> list[int]:
        assert self.takes(pool.shape[1])
        wanted, found = _numbers(pool, blocks), np.empty(len(blocks), dtype=np.uint64)
        self._sum(
            pool.ctypes.data, wanted.ctypes.data, found.ctypes.data, len(wanted), pool.shape[1]
        )
        return found.tolist()

    def take(
        self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
    ) -> list[int]:
        assert self.takes(ours.shape[1])
        assert theirs.shape[1] == ours.shape[1]
        assert len(source) == len(target)
        assert ours.ctypes.data % _LINE == 0
        there, here = _numbers(theirs, source), _numbers(ours, target)
        found = np.empty(len(there), dtype=np.uint64)
        self._take(
            theirs.ctypes.data,
            there.ctypes.data,
            ours.ctypes.data,
            here.ctypes.data,
            found.ctypes.data,
            len(there),
            ours.shape[1],
        )
        return found.tolist()


PLAIN_SPANS = PlainSpans()


def choose_spans(kernels: ctypes.CDLL | None, span_bytes: int) -> tuple[HostSpans, str]:
    """The fastest that serves here, and a line that says which."""
    plain = "blocks in shared memory: copied by numpy"
    if kernels is None or not kernels.pdserve_has_tiles():
        return PLAIN_SPANS, plain
    if not NativeSpans.takes(span_bytes):
        return PLAIN_SPANS, f"{plain}, as {span_bytes} bytes of a block are not whole lines"
    spans = NativeSpans(kernels)
    if not spans_right(spans, span_bytes):
        return PLAIN_SPANS, f"{plain}, the kernels' copy is WRONG"
    return spans, "blocks in shared memory: copied and summed past the caches"


def spans_right(spans: HostSpans, span_bytes: int) -> bool:
    """Whether it finds here what the plain way finds, and writes nothing else."""
    draw = np.random.default_rng(0)
    theirs = aligned_rows(_TRIED_BLOCKS, span_bytes)
    theirs[:] = draw.integers(0, 256, theirs.shape, dtype=np.uint8)
    found, expected = (aligned_rows(_TRIED_BLOCKS + 1, span_bytes) for _ in range(2))
    source, target = (2, 0, 3), (1, 3, 2)
    return (
        spans.sums(theirs, source) == PLAIN_SPANS.sums(theirs, source)
        and spans.take(theirs, source, found, target)
        == PLAIN_SPANS.take(theirs, source, expected, target)
        and np.array_equal(found, expected)
    )


def aligned_rows(count: int, span_bytes: int) -> Rows:
    """Zeros that begin at the start of a line, as a pool does."""
    memory = np.zeros(count * span_bytes + _LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % _LINE
    return memory[begin : begin + count * span_bytes].reshape(count, span_bytes)


def _numbers(pool: Rows, blocks: Sequence[int]) -> npt.NDArray[np.int64]:
    assert pool.flags.c_contiguous
    numbers = np.asarray(blocks, dtype=np.int64)
    assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < len(pool))
    return numbers
