"""KV events on the wire: the schema and framing that vLLM's subscribers read.

Published (PUB):     [topic, sequence number (8 bytes, big-endian), payload]
Replay request:      [empty, first wanted number (8 bytes, big-endian)]
Replayed batch:      [empty, topic, number, payload], one message each, in order
End of a replay:     [empty, empty, -1 (8 bytes, two's complement), empty]

A payload is msgpack: an array [time, events, data-parallel rank] of maps whose ``type`` is
BlockStored, BlockRemoved or AllBlocksCleared. Names are the protocol's, hence not ours. Block
hashes are our 16-byte keys as msgpack bytes. Decoding is typed, and believes no length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.errors import ProtocolError
from pdserve.types import ID_BYTES, BlockKey

MEDIUM = "GPU"  # the protocol's word for the device pool, whatever the device is
TOPIC = "kv-events"
SEQ_BYTES = 8
END_SEQ = (-1).to_bytes(SEQ_BYTES, "big", signed=True)
MESSAGE_BYTES_MAX = 64 << 20

KvEvent = Stored | Removed | Cleared


class _Event(msgspec.Struct, omit_defaults=True, gc=False, tag=True, frozen=True):
    """Encoded as a map; fields without a default are always there."""


class BlockStored(_Event, frozen=True):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int] | tuple[int, ...]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(_Event, frozen=True):
    block_hashes: list[bytes]
    medium: str | None


class AllBlocksCleared(_Event, frozen=True):
    pass


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, frozen=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


# What is taken in: our own key length, and token ids that a u32 holds.
_Key = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class _StoredIn(msgspec.Struct, tag="BlockStored", frozen=True):
    block_hashes: tuple[_Key, ...]
    parent_block_hash: _Key | None
    token_ids: tuple[_Token, ...]
    block_size: _Size


class _RemovedIn(msgspec.Struct, tag="BlockRemoved", frozen=True):
    block_hashes: tuple[_Key, ...]


class _ClearedIn(msgspec.Struct, tag="AllBlocksCleared", frozen=True):
    pass


class _BatchIn(msgspec.Struct, array_like=True, frozen=True):
    ts: float
    events: list[_StoredIn | _RemovedIn | _ClearedIn]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_BatchIn)


def encode_batch(events: Sequence[KvEvent], now: float) -> bytes:
    """``now``: seconds since 1970."""
    return _ENCODER.encode(EventBatch(now, [_outward(event) for event in events], 0))


def decode_batch(payload: bytes | memoryview) -> list[KvEvent]:
    """Raises ProtocolError for anything that is not a batch of events about 16-byte keys."""
    try:
        batch = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a batch of KV events: {type(error).__name__}") from error
    return [_inward(event) for event in batch.events]


def encode_seq(seq: int) -> bytes:
    return seq.to_bytes(SEQ_BYTES, "big")


def decode_seq(frame: bytes) -> int:
    """A sequence number; ProtocolError for anything else."""
    if len(frame) != SEQ_BYTES:
        raise ProtocolError("a sequence number has 8 bytes")
    return int.from_bytes(frame, "big")


def _outward(event: KvEvent) -> BlockStored | BlockRemoved | AllBlocksCleared:
    if isinstance(event, Stored):
        return BlockStored(
            block_hashes=list(event.keys),
            parent_block_hash=event.parent,
            token_ids=event.token_ids,
            block_size=event.block_size,
            lora_id=None,
            medium=MEDIUM,
            lora_name=None,
        )
    if isinstance(event, Removed):
        return BlockRemoved(block_hashes=list(event.keys), medium=MEDIUM)
    return AllBlocksCleared()


def _inward(event: Any) -> KvEvent:
    if isinstance(event, _StoredIn):
        keys = tuple(BlockKey(key) for key in event.block_hashes)
        if len(event.token_ids) != len(keys) * event.block_size:
            raise ProtocolError("stored blocks do not match their tokens")
        parent = None if event.parent_block_hash is None else BlockKey(event.parent_block_hash)
        return Stored(keys, parent, event.token_ids, event.block_size)
    if isinstance(event, _RemovedIn):
        return Removed(tuple(BlockKey(key) for key in event.block_hashes))
    return Cleared()
