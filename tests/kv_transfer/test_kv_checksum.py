"""Both checksums against plain references, and what each must notice."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch
import xxhash

from kv_transfer.checksum import LANES64, XXH3, SpanChecksum, checksum_for

U64 = 2**64 - 1


def splitmix(i: int) -> int:
    z = ((i + 1) * 0x9E3779B97F4A7C15) & U64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
    return z ^ (z >> 31)


def plain_lanes64(data: bytes) -> int:
    data += bytes(-len(data) % 4)
    total = 0
    for i in range(0, len(data), 4):
        lane = int.from_bytes(data[i : i + 4], "little", signed=True)
        total += lane * (splitmix(i // 4) | 1)
    return total & U64


def plain_xxh3(data: bytes) -> int:
    hasher = xxhash.xxh3_64()
    for i in range(0, len(data), 7):
        hasher.update(data[i : i + 7])
    return int.from_bytes(hasher.digest(), "big")


@pytest.mark.parametrize(("checksum", "plain"), [(XXH3, plain_xxh3), (LANES64, plain_lanes64)])
@pytest.mark.parametrize("size", [1, 3, 4, 64, 1022, 4096])
def test_rows_and_spans_agree_with_the_plain_sum(
    checksum: SpanChecksum, plain: object, size: int
) -> None:
    rng = random.Random(size)
    rows = [rng.randbytes(size) for _ in range(5)]
    table = torch.tensor([list(row) for row in rows], dtype=torch.uint8)
    want = [plain(row) for row in rows]  # type: ignore[operator]
    assert checksum.of_rows(table) == want
    assert [checksum.of_span(memoryview(row)) for row in rows] == want
    assert checksum.of_rows(table[:0]) == []
    # Rows that are not adjacent in memory, as a gather may give them.
    assert checksum.of_rows(table[::2]) == want[::2]


@pytest.mark.parametrize("checksum", [XXH3, LANES64], ids=lambda c: c.name)
def test_flips_and_exchanges_are_noticed(checksum: SpanChecksum) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    span = rng.integers(0, 256, 512, dtype=np.uint8)
    seen = {checksum.of_span(span.data)}
    for bit in range(8 * 512):
        changed = span.copy()
        changed[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum.of_span(changed.data))
    assert len(seen) == 1 + 8 * 512
    lanes = span.view(np.uint32)
    # Two lanes that differ in their top bit alone: equal weights modulo two would not tell them.
    lanes[3], lanes[90] = 0x00000001, 0x80000001
    before = checksum.of_span(span.data)
    lanes[3], lanes[90] = lanes[90], lanes[3]
    assert checksum.of_span(span.data) != before


def test_which_checksum_follows_from_the_offering_pool() -> None:
    assert checksum_for("") is XXH3
    assert checksum_for("GPU-1") is LANES64


def test_hashing_a_span_lets_other_threads_run() -> None:
    """The engine's thread must not stand still while a big block is hashed."""
    data = memoryview(bytearray(256 * 2**20))
    # A busy machine may have no core for the other thread just then, but not each time.
    assert any(another_thread_runs_beside(data) for _ in range(20))


def another_thread_runs_beside(data: memoryview) -> bool:
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.02)
    began = time.perf_counter()
    XXH3.of_span(data)
    ended = time.perf_counter()
    stop.set()
    thread.join()
    inside = [at for at in ticks if began < at < ended]
    print(f"{len(inside)} ticks in {1000 * (ended - began):.1f} ms")
    # Had the GIL been held, the other thread could have run only at the edges; two delays there
    # would have to fall together to look like this.
    shares = [(at - began) / (ended - began) for at in inside]
    return any(0.2 < at < 0.4 for at in shares) and any(0.6 < at < 0.8 for at in shares)
