"""Our KV events read like vLLM's to a client that knows only vLLM, and bad bytes are refused."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from cache_tiers.kv_replay import ReplayLog
from cache_tiers.kv_wire import END_SEQ, KvEvent, decode_batch, decode_seq, encode_batch, encode_seq
from cache_tiers.prefix_index import PrefixIndex
from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.errors import ProtocolError
from pdserve.types import BlockKey, WorkerId

K = [BlockKey(bytes([i]) * 16) for i in range(20)]
EVENTS: list[KvEvent] = [
    Stored((K[0], K[1]), None, (1, 2, 3, 4), 2),
    Stored((K[2],), K[1], (5, 2**32 - 1), 2),
    Removed((K[1], K[0])),
    Cleared(),
]


# The schema as a client of vLLM 0.32 has it, written down independently of ours.
class TheirBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class TheirEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(TheirEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(TheirEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(TheirEvent):
    pass


class TheirKvBatch(TheirBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def test_a_vllm_client_reads_our_batches() -> None:
    batch = msgspec.msgpack.decode(encode_batch(EVENTS, 12.5), type=TheirKvBatch)
    assert (batch.ts, batch.data_parallel_rank) == (12.5, 0)
    first, second, removed, cleared = batch.events
    assert first == BlockStored([K[0], K[1]], None, [1, 2, 3, 4], 2, None, "GPU", None)
    assert second == BlockStored([K[2]], K[1], [5, 2**32 - 1], 2, None, "GPU", None)
    assert removed == BlockRemoved([K[1], K[0]], "GPU")
    assert isinstance(cleared, AllBlocksCleared)


def test_the_bytes_are_the_protocols() -> None:
    plain = msgspec.msgpack.decode(encode_batch([EVENTS[1], Cleared()], 1.0))
    assert plain == [
        1.0,
        [
            {
                "type": "BlockStored",
                "block_hashes": [K[2]],
                "parent_block_hash": K[1],
                "token_ids": [5, 2**32 - 1],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]
    assert END_SEQ == b"\xff" * 8
    assert encode_seq(258) == b"\0\0\0\0\0\0\1\2"
    assert decode_seq(encode_seq(258)) == 258


def test_round_trip_and_unknown_fields_of_later_versions() -> None:
    assert decode_batch(encode_batch(EVENTS, 1.0)) == EVENTS
    later = BlockStored([K[0]], None, [1, 2], 2, None, "GPU", None, session_id="s")
    data = msgspec.msgpack.encode(TheirKvBatch(1.0, [later], 3))
    assert decode_batch(data) == [Stored((K[0],), None, (1, 2), 2)]


def test_what_is_not_a_batch_is_refused() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def event(**changes: object) -> bytes:
        fields: dict[str, object] = {
            "type": "BlockStored",
            "block_hashes": [K[0]],
            "parent_block_hash": None,
            "token_ids": [1, 2],
            "block_size": 2,
        }
        return msgspec.msgpack.encode([1.0, [{**fields, **changes}]])

    assert decode_batch(event())
    bad = [
        b"",
        event(block_hashes=[b"short"]),
        event(block_hashes=[17]),
        event(token_ids=[-1, 2]),
        event(token_ids=[1, 2**32]),
        event(token_ids=[1]),
        event(block_size=0),
        event(parent_block_hash=b"x"),
        event(type="Other"),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode({"ts": 1.0, "events": []}),
        encode_batch(EVENTS, 1.0)[:-1],
        encode_batch(EVENTS, 1.0) + b"\0",
        b"\xdd\xff\xff\xff\xff",  # an array of 4 billion
        b"\x91" * 100_000,
    ]
    for data in bad:
        with pytest.raises(ProtocolError):
            decode_batch(data)
    good = encode_batch(EVENTS, 1.0)
    for _ in range(3000):
        at = draw.randrange(len(good))
        mangled = good[:at] + draw.randbytes(draw.randrange(1, 4)) + good[at + draw.randrange(4) :]
        try:
            decode_batch(mangled)
        except ProtocolError:
            continue


def test_a_replay_from_anywhere_rebuilds_the_same_state() -> None:
    """Random histories; whatever was folded, base and kept batches give the true final state."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    worker = WorkerId("w")
    for batches_max, bytes_max in ((1000, 1 << 20), (5, 1 << 20), (0, 1 << 20), (1000, 900)):
        log = ReplayLog(batches_max, bytes_max)
        truth = PrefixIndex()
        views: list[set[BlockKey]] = []  # the true state before each batch
        for seq in range(60):
            views.append({k for k in K if truth.longest(worker, [k])})
            first = draw.randrange(len(K) - 3)
            run = tuple(K[first : first + draw.randrange(1, 4)])
            parent = K[first - 1] if first else None
            tokens = tuple(range(2 * len(run)))
            events: list[KvEvent] = [
                Stored(run, parent, tokens, 2),
                *([Removed((draw.choice(K),))] if draw.randrange(2) else []),
                *([Cleared()] if draw.randrange(15) == 0 else []),
            ]
            log.append(seq, events, encode_batch(events, 0.0))
            for event in events:
                truth.apply(worker, event)
        for start in (0, 1, 30, 57, 59, 60):
            index = PrefixIndex()
            if start < 60:
                index.stored(worker, list(views[start]))
            else:
                index.stored(worker, [k for k in K if truth.longest(worker, [k])])
            expected = start
            for seq, payload in log.since(start, 0.0):
                decoded = decode_batch(payload)
                assert seq == expected or (seq > expected and decoded[0] == Cleared())
                expected = seq + 1
                for event in decoded:
                    index.apply(worker, event)
            assert expected == 60
            for k in K:
                assert index.longest(worker, [k]) == truth.longest(worker, [k])


def test_the_base_keeps_parents_and_tokens() -> None:
    log = ReplayLog(0, 1 << 20)
    log.append(0, [Stored((K[0], K[1]), None, (1, 2, 3, 4), 2)], b"")
    log.append(1, [Stored((K[2],), K[1], (5, 6), 2), Stored((K[5],), K[0], (7, 8), 2)], b"")
    ((seq, payload),) = log.since(0, 0.0)
    assert seq == 1
    assert decode_batch(payload) == [
        Cleared(),
        Stored((K[0], K[1], K[2]), None, (1, 2, 3, 4, 5, 6), 2),
        Stored((K[5],), K[0], (7, 8), 2),
    ]
    assert log.base_keys == 4
    assert list(log.since(2, 0.0)) == []
