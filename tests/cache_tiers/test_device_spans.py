"""Copies between a pool on a device and host memory are those of a pool in host memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_tiers import device_spans
from cache_tiers.device_spans import DevicePool
from cache_tiers.host import HostTier
from cache_tiers.spans import HostPool, PoolSpans
from pdserve.pages import Bytes, arena
from pdserve.types import BlockKey, Incarnation

SPAN, BLOCKS, ROWS = 4_808, 40, 16

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_bytes(rows: int) -> Bytes:
    return np.random.default_rng().integers(0, 256, (rows, SPAN), dtype=np.uint8)


class Both:
    """The same blocks in host memory and on a device, and host memory that both know."""

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
        self.host = random_bytes(BLOCKS)
        self.device = torch.from_numpy(self.host.copy()).to(device)
        self.pools: tuple[PoolSpans, PoolSpans] = (
            HostPool(lambda block: self.host[block].data),
            DevicePool(self.device),
        )
        self.rows = [arena(ROWS, SPAN) for _ in self.pools]
        self.release = [
            pool.adopt(rows, True) for pool, rows in zip(self.pools, self.rows, strict=True)
        ]

    def check(self) -> None:
        assert (self.device.cpu().numpy() == self.host).all()
        assert (self.rows[0] == self.rows[1]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_spans_are_read_and_written_as_in_host_memory(device: str) -> None:
    both = Both(device)
    draw = np.random.default_rng()
    for _ in range(30):
        blocks = [int(block) for block in draw.choice(BLOCKS, 12, replace=False)]
        begin, end = sorted(int(at) for at in draw.integers(0, 13, 2))
        chosen = [i for i in range(end - begin) if draw.random() < 0.7]
        rows = draw.choice(ROWS, len(chosen), replace=False)
        read = bool(draw.random() < 0.5)
        for pool, memory in zip(both.pools, both.rows, strict=True):
            spans = pool.of(blocks).part(begin, end)
            assert len(spans) == end - begin
            pairs = {i: memory[row] for i, row in zip(chosen, rows, strict=True)}
            if read:
                spans.read(pairs)
            else:
                spans.write(pairs)
        both.check()
        both.rows[0][:] = random_bytes(ROWS)
        both.rows[1][:] = both.rows[0]
    for release in both.release:
        release()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_received_lies_in_the_blocks_afterwards(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_spans, "STAGING_BYTES", 5 * SPAN + 1)
    both = Both(device)
    assert both.pools[1].of(range(BLOCKS)).room == 5, "no more page-locked memory than that"
    assert both.pools[1].of(range(3)).room == 3
    for blocks in ([7, 3, 9, 30, 0], [3], []):
        values = random_bytes(len(blocks))
        for pool in both.pools:
            with pool.of(blocks).received() as received:
                assert len(received.views) == len(blocks)
                for view, value in zip(received.views, values, strict=True):
                    view[:] = value.tobytes()
                received.found = len(blocks)
        both.check()
    before = both.device.clone()
    with both.pools[1].of([1, 2, 3]).received() as received:
        for view in received.views:
            view[:] = b"g" * SPAN
        received.found = 1
    assert (both.device[1] == ord("g")).all()
    assert torch.equal(both.device[2:], before[2:]), "what was not found is not copied"


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_tier_gives_a_device_what_it_kept_of_it(device: str) -> None:
    both = Both(device)
    pool = both.pools[1]
    tier = HostTier(8 * SPAN, SPAN, Incarnation(b"w" * 16), pool.adopt)
    keys = [BlockKey(bytes([i]) * 16) for i in range(8)]
    tier.keep(keys, pool.of(range(8)))
    wanted = both.device[:8].clone()
    both.device.zero_()
    if both.device.is_cuda:
        torch.cuda.synchronize()  # as the engine does before it tells of a block
    assert tier.fill(keys, pool.of(range(20, 28))) == 8
    assert torch.equal(both.device[20:28], wanted)
    assert not both.device[:20].any()
    tier.close()
    tier.close()


@pytest.mark.gpu
def test_memory_that_cannot_be_page_locked_is_used_as_it_is() -> None:
    both = Both("cuda")
    again = both.pools[1].adopt(both.rows[1], True)  # it is locked already
    both.device.add_(0)  # nobody is blamed for the refusal
    torch.cuda.synchronize()
    again()
    both.check()


def test_the_front_of_a_long_prefix_stays_when_it_comes_in_pieces() -> None:
    """Pieces that are read one after the other from Redis must not drive each other out."""
    values = random_bytes(12)
    pool = HostPool(lambda block: values[block].data)
    tier = HostTier(6 * SPAN, SPAN, Incarnation(b"w" * 16))
    others = [BlockKey(bytes([99, i]) * 8) for i in range(5)]
    tier.keep(others, pool.of(range(5)))
    keys = [BlockKey(bytes([i]) * 16) for i in range(12)]
    for at in range(0, 12, 4):
        tier.keep(keys[at : at + 4], pool.of(range(at, at + 4)), before=keys[:at])
    assert tier.contains(keys) == [True] * 6 + [False] * 6
    assert not any(tier.contains(others))


def test_a_copy_that_fails_costs_the_host_tier_no_room() -> None:
    def broken(block: int) -> memoryview:
        if block == 2:
            return memoryview(bytearray(SPAN - 1))
        return memoryview(bytearray(SPAN))

    tier = HostTier(4 * SPAN, SPAN, Incarnation(b"w" * 16))
    keys = [BlockKey(bytes([i]) * 16) for i in range(4)]
    for _ in range(3):
        with pytest.raises(ValueError, match="broadcast"):
            tier.keep(keys, HostPool(broken).of(range(4)))
    assert tier.count == 0
    tier.keep(keys, HostPool(lambda block: memoryview(bytearray(SPAN))).of(range(4)))
    assert tier.count == 4
