"""Copying and summing spans by the kernels: the same bytes and sums as numpy and xxhash give."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import xxhash

from pdserve.engine.host_spans import (
    PLAIN_SPANS,
    HostSpans,
    NativeSpans,
    PlainSpans,
    Rows,
    aligned_rows,
    choose_spans,
    spans_right,
)
from tests.engine.model_world import HERE, kernel

# Some that end within a piece that is fetched, at one, and right behind one.
SIZES = (256, 320, 1024, 1088, 16_384, 16_448, 32_768, 49_216, 368_640)


@pytest.fixture(params=["plain", HERE, "AVX2"])
def spans(request: pytest.FixtureRequest) -> HostSpans:
    if request.param == "plain":
        return PLAIN_SPANS
    kernels = kernel(request.param)
    if not kernels.pdserve_has_tiles():
        pytest.skip("no kernels that copy on this processor")
    return NativeSpans(kernels)


def test_it_finds_and_copies_what_a_loop_does_and_touches_nothing_beside(spans: HostSpans) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for size in (*SIZES, *(64 * rng.integers(4, 2000, 12)).tolist()):
        theirs, ours = aligned_rows(5, size), aligned_rows(6, size)
        theirs[:] = rng.integers(0, 256, theirs.shape, dtype=np.uint8)
        ours[:] = rng.integers(0, 256, ours.shape, dtype=np.uint8)
        expected = ours.copy()
        count = int(rng.integers(1, 6))
        source = rng.integers(0, 5, count).tolist()
        target = rng.permutation(6)[:count].tolist()
        for there, here in zip(source, target, strict=True):
            expected[here] = theirs[there]
        sums = [xxhash.xxh3_64_intdigest(theirs[block].tobytes()) for block in source]
        assert spans.sums(theirs, source) == sums
        assert spans.take(theirs, source, ours, target) == sums
        np.testing.assert_array_equal(ours, expected)
        assert spans.take(theirs, [], ours, []) == spans.sums(theirs, []) == []


def test_a_copy_s_sum_is_of_what_was_copied_whoever_writes_meanwhile(spans: HostSpans) -> None:
    """Else a block that was given away half way could be taken for the one that was offered."""
    theirs, ours = aligned_rows(1, 368_640), aligned_rows(1, 368_640)
    over = threading.Event()
    others = np.random.default_rng(1).integers(0, 256, (2, 368_640), dtype=np.uint8)
    theirs[0] = others[0]

    def write() -> None:
        while not over.is_set():
            for other in others:
                ctypes.memmove(theirs.ctypes.data, other.ctypes.data, other.nbytes)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        torn: set[int] = set()
        for _ in range(20_000):
            (found,) = spans.take(theirs, [0], ours, [0])
            assert found == xxhash.xxh3_64_intdigest(ours[0].data)
            if not any(np.array_equal(ours[0], other) for other in others):
                torn.add(found)
            if len(torn) == 100:
                break
        assert torn, "nothing was written while it was copied"
    finally:
        over.set()
        writer.join()


def rows_before_a_wall(count: int, span: int) -> Rows:
    """They end where memory begins that ends the process when it is touched."""
    size = count * span
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(begin + whole, mmap.PAGESIZE, 0) == 0
    return np.frombuffer(memory, np.uint8, size, whole - size).reshape(count, span)


@pytest.mark.parametrize("span", [256, 1088, 16_448])
def test_nothing_behind_a_pool_is_touched(spans: HostSpans, span: int) -> None:
    theirs, ours = rows_before_a_wall(3, span), rows_before_a_wall(3, span)
    theirs[:] = np.random.default_rng(2).integers(0, 256, theirs.shape, dtype=np.uint8)
    assert spans.take(theirs, [2], ours, [2]) == spans.sums(theirs, [2])
    np.testing.assert_array_equal(ours[2], theirs[2])
    assert not ours[:2].any()


def test_one_changed_bit_changes_the_sum(spans: HostSpans) -> None:
    rows = aligned_rows(1, 4096)
    before = spans.sums(rows, [0])
    for byte in range(0, 4096, 37):
        rows[0, byte] ^= 1 << byte % 8
        assert spans.sums(rows, [0]) != before
        rows[0, byte] = 0
    assert spans.sums(rows, [0]) == before


@pytest.mark.parametrize("size", [0, 64, 192, 240, 250, 1000, 1090])
def test_what_the_kernels_do_not_take_is_told(size: int) -> None:
    assert not NativeSpans.takes(size)
    assert NativeSpans.takes(256)


def test_what_serves_is_chosen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_spans(None, 1536) == (PLAIN_SPANS, "blocks in shared memory: copied by numpy")
    kernels = kernel()
    if not kernels.pdserve_has_tiles():
        pytest.skip("no kernels that copy on this processor")
    spans, note = choose_spans(kernels, 1536)
    assert isinstance(spans, NativeSpans)
    assert "past the caches" in note
    spans, note = choose_spans(kernels, 1000)
    assert spans is PLAIN_SPANS
    assert "1000 bytes" in note
    monkeypatch.setattr(NativeSpans, "sums", lambda self, pool, blocks: [0] * len(blocks))
    spans, note = choose_spans(kernels, 1536)
    assert spans is PLAIN_SPANS
    assert "WRONG" in note


def test_spans_that_do_wrong_are_found_out(spans: HostSpans) -> None:
    class Idle(PlainSpans):
        def take(
            self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
        ) -> list[int]:
            return self.sums(theirs, source)

    class Elsewhere(PlainSpans):
        def take(
            self, theirs: Rows, source: Sequence[int], ours: Rows, target: Sequence[int]
        ) -> list[int]:
            ours[0, -1] ^= 1
            return super().take(theirs, source, ours, target)

    class Miscounts(PlainSpans):
        def sums(self, pool: Rows, blocks: Sequence[int]) -> list[int]:
            return [value ^ 1 for value in super().sums(pool, blocks)]

    assert spans_right(spans, 1536)
    assert not any(spans_right(wrong, 1536) for wrong in (Idle(), Elsewhere(), Miscounts()))
