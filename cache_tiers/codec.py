"""The form of a block's value outside a worker: a fixed header, then the raw span.

Little-endian, 104 bytes of header:

    0    8   magic "PDSKVBLK"
    8    4   schema version (u32)
    12  32   layout fingerprint
    44  16   block key
    60  16   incarnation of the writer
    76   8   length of the payload (u64)
    84   8   xxh3-64 of the payload (u64)
    92   8   xxh3-64 of bytes 0..92 (u64), so that no field of the header can be damaged unseen
    100  4   zero
    104      the payload: one whole span

A reader knows beforehand what it wants (``Expected``); whatever differs raises BadValue, which says
what was wrong, before a byte of the payload is used. The functions are pure and copy no payload:
the header is written beside the span, and the span is received where it belongs.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import xxhash

from pdserve.errors import TierError
from pdserve.types import ID_BYTES, BlockKey, Fingerprint, Incarnation

MAGIC = b"PDSKVBLK"
VERSION = 1
FINGERPRINT_BYTES = 32

_FIELDS = struct.Struct(f"<8sI{FINGERPRINT_BYTES}s{ID_BYTES}s{ID_BYTES}sQQ")
_SEAL = struct.Struct("<QI")
HEADER_BYTES = _FIELDS.size + _SEAL.size

Buffer = bytes | bytearray | memoryview


class Fault(enum.Enum):
    """What was wrong with a value."""

    SHORT = "shorter than a header"
    MAGIC = "not a block"
    VERSION = "another schema version"
    HEADER = "damaged header"
    FINGERPRINT = "another fingerprint"
    KEY = "another block's value"
    LENGTH = "another length"
    REVOKED = "written by a revoked incarnation"
    PAYLOAD = "damaged payload"


class BadValue(TierError):
    """A stored value that must not be used; ``fault`` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"stored block refused: {fault.value}")
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Header:
    writer: Incarnation
    payload_bytes: int
    checksum: int  # xxh3-64 of the payload


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reader accepts. ``revoked``: incarnations whose values read as a miss."""

    fingerprint: Fingerprint
    span_bytes: int
    revoked: frozenset[Incarnation] = frozenset()


def checksum(payload: Buffer) -> int:
    return int(xxhash.xxh3_64_intdigest(payload))


def encode_header(
    fingerprint: Fingerprint, key: BlockKey, writer: Incarnation, payload: Buffer
) -> bytes:
    """The header that goes before ``payload`` (contiguous bytes of one span)."""
    size = memoryview(payload).nbytes
    fields = _FIELDS.pack(MAGIC, VERSION, fingerprint, key, writer, size, checksum(payload))
    return fields + _SEAL.pack(checksum(fields), 0)


def decode_header(data: Buffer, expected: Expected, key: BlockKey) -> Header:
    """Checks the first HEADER_BYTES of a value. Raises BadValue and nothing else.

    The schema version is looked at before the seal: another version may seal itself differently.
    """
    if len(data) < HEADER_BYTES:
        raise BadValue(Fault.SHORT)
    magic, version, fingerprint, stored_key, writer, size, payload_sum = _FIELDS.unpack_from(data)
    seal, zero = _SEAL.unpack_from(data, _FIELDS.size)
    if magic != MAGIC:
        raise BadValue(Fault.MAGIC)
    if version != VERSION:
        raise BadValue(Fault.VERSION)
    if zero != 0 or seal != checksum(bytes(data[: _FIELDS.size])):
        raise BadValue(Fault.HEADER)
    if fingerprint != expected.fingerprint:
        raise BadValue(Fault.FINGERPRINT)
    if stored_key != key:
        raise BadValue(Fault.KEY)
    if size != expected.span_bytes:
        raise BadValue(Fault.LENGTH)
    if writer in expected.revoked:
        raise BadValue(Fault.REVOKED)
    return Header(Incarnation(writer), size, payload_sum)


def check_payload(header: Header, payload: Buffer) -> None:
    """Raises BadValue unless ``payload`` is what the header's writer wrote."""
    if memoryview(payload).nbytes != header.payload_bytes:
        raise BadValue(Fault.LENGTH)
    if checksum(payload) != header.checksum:
        raise BadValue(Fault.PAYLOAD)


def decode(value: Buffer, expected: Expected, key: BlockKey) -> tuple[Header, memoryview]:
    """Header and payload of a whole value; the payload is a view, not a copy."""
    header = decode_header(value, expected, key)
    payload = memoryview(value)[HEADER_BYTES:]
    check_payload(header, payload)
    return header, payload
