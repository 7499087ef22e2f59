"""The frames of a transfer connection: every message, encoded and decoded in one place.

    client                                   server
             <------------------- Challenge          fresh nonce
    Hello    ------------------->                    proof of the cluster token, whom we mean
             <------------------- Welcome | Status   proof in return | why not
    Read     ------------------->
             <------------------- Status             refused: nothing follows
             <------------------- spans              raw bytes, in the order asked for
             <------------------- Status             generations looked at again
    Check    ------------------->
             <------------------- Status
    LinkOpen ------------------->                    a two-rank link beside this connection
             <------------------- LinkId
             <------------------- SlotStatus(0)      this end of the link stands
    SlotRead ------------------->
             <------------------- SlotStatus         accepted: one slot runs over the link
             <------------------- SlotStatus         sent, generations looked at again

A frame is a header of 12 bytes (magic, version, kind, two zero bytes, payload length), then the
payload; little-endian. Each kind has its own bounds on the length, so a header is refused before
anything is allocated for it. Decoding raises ProtocolError and nothing else, whatever the bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.errors import (
    LayoutMismatch,
    ProtocolError,
    StaleBlock,
    TransferError,
)
from pdserve.types import ID_BYTES, Fingerprint, Incarnation

MAGIC = b"PDKV"
WIRE_VERSION = 1
HEADER = struct.Struct("<4sBBHI")
NONCE_BYTES = 32
LINK_ID_BYTES = 128
# Blocks that one Read, Check or SlotRead names at most.
MAX_ENTRIES = 4096

_ENTRY = np.dtype([("block", "<u4"), ("generation", "<u8")])
_HELLO = struct.Struct("<32s32s16s32sIQ")
_WELCOME = struct.Struct("<32sIQ")
_STATUS = struct.Struct("<HI")
_SLOT_STATUS = struct.Struct("<QHI")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Kind(enum.IntEnum):
    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    STATUS = 4
    READ = 5
    CHECK = 6
    LINK_OPEN = 7
    LINK_ID = 8
    SLOT_READ = 9
    SLOT_STATUS = 10


class Code(enum.IntEnum):
    OK = 0
    STALE = 1  # position: of the first block that was freed
    RANGE = 2  # position: of the first block that the pool does not have
    VERSION = 3
    AUTH = 4
    INCARNATION = 5
    LAYOUT = 6
    BUSY = 7
    BAD_FRAME = 8
    LINK = 9  # the link could not be set up, or broke


class WireVersionMismatch(ProtocolError):
    """The peer speaks another version of these frames."""


@dataclass(frozen=True, slots=True)
class Challenge:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    nonce: bytes
    proof: bytes
    incarnation: Incarnation
    fingerprint: Fingerprint
    num_blocks: int
    span_bytes: int


@dataclass(frozen=True, slots=True)
class Welcome:
    proof: bytes
    num_blocks: int
    span_bytes: int


@dataclass(frozen=True, slots=True)
class Status:
    code: Code
    position: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    remaining_ms: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Check:
    blocks: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinkOpen:
    slot_blocks: int


@dataclass(frozen=True, slots=True)
class LinkId:
    value: bytes


@dataclass(frozen=True, slots=True)
class SlotRead:
    sequence: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotStatus:
    sequence: int
    code: Code
    position: int = 0


Message = (
    Challenge | Hello | Welcome | Status | Read | Check | LinkOpen | LinkId | SlotRead | SlotStatus
)


@dataclass(frozen=True, slots=True)
class Header:
    kind: Kind
    length: int


_ENTRIES_MAX = MAX_ENTRIES * _ENTRY.itemsize
# Shortest and longest payload of each kind.
_LENGTHS: dict[Kind, tuple[int, int]] = {
    Kind.CHALLENGE: (NONCE_BYTES, NONCE_BYTES),
    Kind.HELLO: (_HELLO.size, _HELLO.size),
    Kind.WELCOME: (_WELCOME.size, _WELCOME.size),
    Kind.STATUS: (_STATUS.size, _STATUS.size),
    Kind.READ: (_U32.size, _U32.size + _ENTRIES_MAX),
    Kind.CHECK: (0, _ENTRIES_MAX),
    Kind.LINK_OPEN: (_U32.size, _U32.size),
    Kind.LINK_ID: (LINK_ID_BYTES, LINK_ID_BYTES),
    Kind.SLOT_READ: (_U64.size, _U64.size + _ENTRIES_MAX),
    Kind.SLOT_STATUS: (_SLOT_STATUS.size, _SLOT_STATUS.size),
}


def decode_header(data: bytes) -> Header:
    """Checks magic, version, kind and the kind's bounds on the length."""
    if len(data) != HEADER.size:
        raise ProtocolError(f"a frame's header is {HEADER.size} bytes, not {len(data)}")
    magic, version, raw_kind, zero, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("not a transfer frame")
    if version != WIRE_VERSION:
        raise WireVersionMismatch(f"transfer frames of version {version}, ours is {WIRE_VERSION}")
    try:
        kind = Kind(raw_kind)
    except ValueError:
        raise ProtocolError(f"unknown kind of frame {raw_kind}") from None
    low, high = _LENGTHS[kind]
    if zero != 0 or not low <= length <= high:
        raise ProtocolError(f"{kind.name} frame with {length} bytes, allowed are {low} to {high}")
    return Header(kind, length)


def decode_payload(kind: Kind, payload: bytes) -> Message:
    low, high = _LENGTHS[kind]
    if not low <= len(payload) <= high:
        raise ProtocolError(f"{kind.name} frame with {len(payload)} bytes")
    return _DECODERS[kind](payload)


def encode(message: Message) -> bytes:
    kind, payload = _parts(message)
    return HEADER.pack(MAGIC, WIRE_VERSION, kind, 0, len(payload)) + payload


def error_of(code: Code, position: int) -> TransferError:
    """The error that a peer's status means to the reader."""
    if code is Code.STALE:
        return StaleBlock(f"the peer freed the block at position {position} of the read")
    if code is Code.INCARNATION:
        return StaleBlock("the peer is not the incarnation that offered the blocks")
    if code is Code.LAYOUT:
        return LayoutMismatch("the peer's pool does not hold our kind of block")
    if code in {Code.BUSY, Code.LINK}:
        return TransferError(f"the peer cannot serve the transfer now: {code.name}")
    return ProtocolError(f"the peer refused the transfer: {code.name} at position {position}")


def _entries(blocks: Sequence[int], generations: Sequence[int]) -> bytes:
    assert len(blocks) == len(generations) <= MAX_ENTRIES
    table = np.empty(len(blocks), dtype=_ENTRY)
    table["block"] = blocks
    table["generation"] = generations
    return table.tobytes()


def _decode_entries(payload: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(payload) % _ENTRY.itemsize:
        raise ProtocolError(f"a list of blocks with {len(payload)} bytes")
    table = np.frombuffer(payload, dtype=_ENTRY)
    return tuple(table["block"].tolist()), tuple(table["generation"].tolist())


def _parts(message: Message) -> tuple[Kind, bytes]:  # one line per kind
    match message:
        case Challenge(nonce):
            return Kind.CHALLENGE, nonce
        case Hello(nonce, proof, incarnation, fingerprint, num_blocks, span_bytes):
            packed = _HELLO.pack(nonce, proof, incarnation, fingerprint, num_blocks, span_bytes)
            return Kind.HELLO, packed
        case Welcome(proof, num_blocks, span_bytes):
            return Kind.WELCOME, _WELCOME.pack(proof, num_blocks, span_bytes)
        case Status(code, position):
            return Kind.STATUS, _STATUS.pack(code, position)
        case Read(remaining_ms, blocks, generations):
            return Kind.READ, _U32.pack(remaining_ms) + _entries(blocks, generations)
        case Check(blocks, generations):
            return Kind.CHECK, _entries(blocks, generations)
        case LinkOpen(slot_blocks):
            return Kind.LINK_OPEN, _U32.pack(slot_blocks)
        case LinkId(value):
            assert len(value) == LINK_ID_BYTES
            return Kind.LINK_ID, value
        case SlotRead(sequence, blocks, generations):
            return Kind.SLOT_READ, _U64.pack(sequence) + _entries(blocks, generations)
        case SlotStatus(sequence, code, position):
            return Kind.SLOT_STATUS, _SLOT_STATUS.pack(sequence, code, position)


def _code(value: int) -> Code:
    try:
        return Code(value)
    except ValueError:
        raise ProtocolError(f"unknown status {value}") from None


def _decode_hello(payload: bytes) -> Hello:
    nonce, proof, incarnation, fingerprint, num_blocks, span_bytes = _HELLO.unpack(payload)
    assert len(incarnation) == ID_BYTES
    return Hello(
        nonce, proof, Incarnation(incarnation), Fingerprint(fingerprint), num_blocks, span_bytes
    )


def _decode_status(payload: bytes) -> Status:
    code, position = _STATUS.unpack(payload)
    return Status(_code(code), position)


def _decode_slot_status(payload: bytes) -> SlotStatus:
    sequence, code, position = _SLOT_STATUS.unpack(payload)
    return SlotStatus(sequence, _code(code), position)


def _decode_read(payload: bytes) -> Read:
    return Read(_U32.unpack_from(payload)[0], *_decode_entries(payload[_U32.size :]))


def _decode_slot_read(payload: bytes) -> SlotRead:
    return SlotRead(_U64.unpack_from(payload)[0], *_decode_entries(payload[_U64.size :]))


_DECODERS: dict[Kind, Callable[[bytes], Message]] = {
    Kind.CHALLENGE: Challenge,
    Kind.HELLO: _decode_hello,
    Kind.WELCOME: lambda payload: Welcome(*_WELCOME.unpack(payload)),
    Kind.STATUS: _decode_status,
    Kind.READ: _decode_read,
    Kind.CHECK: lambda payload: Check(*_decode_entries(payload)),
    Kind.LINK_OPEN: lambda payload: LinkOpen(_U32.unpack(payload)[0]),
    Kind.LINK_ID: LinkId,
    Kind.SLOT_READ: _decode_slot_read,
    Kind.SLOT_STATUS: _decode_slot_status,
}
