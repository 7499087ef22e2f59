"""The decisions of a hand-off, as tables and against plain loops."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.plan import (
    Capabilities,
    check_pairing,
    choose_transport,
    runs,
    split_reads,
    wanted_blocks,
    wanted_offers,
)
from pdserve.errors import LayoutMismatch, TransferError
from pdserve.types import Fingerprint, Incarnation, Transport

SHM, TCP, IPC, NCCL = Transport.SHM, Transport.TCP, Transport.CUDA_IPC, Transport.NCCL
BEST_FIRST = (IPC, NCCL, SHM, TCP)


def endpoint(**changes: object) -> Endpoint:
    values: dict[str, object] = {
        "incarnation": Incarnation(bytes(16)),
        "fingerprint": Fingerprint(bytes(32)),
        "num_blocks": 8,
        "span_bytes": 64,
        "host_id": "here",
        "pid": 7,
        "shm_fd": 5,
        "tcp_address": "127.0.0.1:9",
        "device_uuid": "",
        "cuda_ipc_handle": b"",
        "cuda_ipc_offset": 0,
        "transports": (SHM, TCP),
    }
    return Endpoint(**{**values, **changes})  # type: ignore[arg-type]


def gpu(**changes: object) -> Endpoint:
    values: dict[str, object] = {
        "device_uuid": "A",
        "shm_fd": 0,
        "cuda_ipc_handle": bytes(64),
        "transports": (IPC, NCCL, TCP),
    }
    return endpoint(**{**values, **changes})


CPU = Capabilities("here")
GPU_A = Capabilities("here", "A", links=True)
GPU_B = Capabilities("here", "B", links=True)


@pytest.mark.parametrize(
    ("local", "peer", "order", "chosen"),
    [
        (CPU, endpoint(), BEST_FIRST, SHM),
        (CPU, endpoint(), (TCP, SHM), TCP),
        (CPU, endpoint(host_id="there"), BEST_FIRST, TCP),
        (CPU, endpoint(shm_fd=0), BEST_FIRST, TCP),
        (CPU, endpoint(transports=(TCP,)), BEST_FIRST, TCP),
        (CPU, gpu(), BEST_FIRST, TCP),
        (GPU_A, gpu(), BEST_FIRST, IPC),
        (GPU_A, gpu(), (NCCL, IPC), IPC),
        (GPU_B, gpu(), BEST_FIRST, NCCL),
        (GPU_A, gpu(host_id="there"), BEST_FIRST, TCP),
        (Capabilities("here", "A", links=True, links_on_one_device=True), gpu(), (NCCL,), NCCL),
        (Capabilities("here", "B"), gpu(), BEST_FIRST, TCP),
        (GPU_A, gpu(cuda_ipc_handle=b""), BEST_FIRST, TCP),
        (GPU_A, endpoint(), BEST_FIRST, TCP),
    ],
)
def test_the_best_transport_that_both_ends_can(
    local: Capabilities, peer: Endpoint, order: tuple[Transport, ...], chosen: Transport
) -> None:
    choice = choose_transport(local, peer, order)
    assert choice.transport is chosen
    # Every better one is named with what stood in its way.
    for better in order[: order.index(chosen)]:
        assert f"{better.value} not: " in choice.reason


@pytest.mark.parametrize(
    ("peer", "order"),
    [
        (endpoint(host_id="there"), (SHM,)),
        (endpoint(transports=(SHM,), host_id="there"), BEST_FIRST),
        (endpoint(tcp_address="", host_id="there"), BEST_FIRST),
        (endpoint(), ()),
    ],
)
def test_no_way_between_two_pools_says_why(peer: Endpoint, order: tuple[Transport, ...]) -> None:
    with pytest.raises(TransferError):
        choose_transport(CPU, peer, order)


def test_pools_of_different_kinds_are_never_paired() -> None:
    check_pairing(endpoint(), Fingerprint(bytes(32)), 64)
    with pytest.raises(LayoutMismatch):
        check_pairing(endpoint(), Fingerprint(b"\1" * 32), 64)
    with pytest.raises(LayoutMismatch):
        check_pairing(endpoint(), Fingerprint(bytes(32)), 65)


@given(st.integers(0, 50), st.sets(st.integers(0, 60)))
def test_a_grant_names_what_is_not_here(prompt: int, local: set[int]) -> None:
    wanted = wanted_blocks(prompt, local)
    assert list(wanted) == sorted(wanted)
    assert set(wanted) | (local & set(range(prompt))) == set(range(prompt))
    assert not set(wanted) & local


def test_of_a_chunk_only_the_granted_blocks_are_read() -> None:
    offers = [BlockOffer(index, index + 10, 0, 0) for index in range(4)]
    assert [offer.index for offer in wanted_offers(offers, {1, 3, 9})] == [1, 3]


@given(st.integers(0, 200), st.integers(1, 100), st.integers(1, 500), st.integers(1, 20))
def test_pieces_of_a_read_cover_it_once_within_their_bounds(
    count: int, span: int, max_bytes: int, max_blocks: int
) -> None:
    pieces = list(split_reads(count, span, max_bytes, max_blocks))
    assert [i for piece in pieces for i in range(count)[piece]] == list(range(count))
    for piece in pieces:
        size = piece.stop - piece.start
        assert 1 <= size <= max_blocks
        assert size == 1 or size * span <= max_bytes


def test_runs_cover_every_block_once_and_only_join_neighbours() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        count = rng.randrange(0, 12)
        source = rng.sample(range(16), count)
        destination = rng.sample(range(16), count)
        if rng.random() < 0.5:
            source.sort()
            destination.sort()
        longest = rng.randrange(1, 6)
        found = list(runs(source, destination, longest))
        pairs = [(run.source + i, run.destination + i) for run in found for i in range(run.count)]
        assert pairs == list(zip(source, destination, strict=True))
        assert all(1 <= run.count <= longest for run in found)
        assert [run.first for run in found] == [
            sum(run.count for run in found[:i]) for i in range(len(found))
        ]
    assert len(list(runs(range(8), range(3, 11), 8))) == 1
