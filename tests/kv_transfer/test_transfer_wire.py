"""Every frame survives the wire, and no bytes whatever get past the decoder as anything else."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import wire
from pdserve.errors import LayoutMismatch, ProtocolError, StaleBlock, TransferError
from pdserve.types import Fingerprint, Incarnation

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
entries = st.lists(st.tuples(u32, u64), max_size=20)


def _split(pairs: list[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(block for block, _ in pairs), tuple(generation for _, generation in pairs)


def fixed(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


messages = st.one_of(
    st.builds(wire.Challenge, fixed(32)),
    st.builds(
        wire.Hello,
        fixed(32),
        fixed(32),
        fixed(16).map(Incarnation),
        fixed(32).map(Fingerprint),
        u32,
        u64,
    ),
    st.builds(wire.Welcome, fixed(32), u32, u64),
    st.builds(wire.Status, st.sampled_from(wire.Code), u32),
    st.builds(lambda ms, pairs: wire.Read(ms, *_split(pairs)), u32, entries),
    st.builds(lambda pairs: wire.Check(*_split(pairs)), entries),
    st.builds(wire.LinkOpen, u32),
    st.builds(wire.LinkId, fixed(128)),
    st.builds(lambda n, pairs: wire.SlotRead(n, *_split(pairs)), u64, entries),
    st.builds(wire.SlotStatus, u64, st.sampled_from(wire.Code), u32),
)


def decode(frame: bytes) -> wire.Message:
    header = wire.decode_header(frame[: wire.HEADER.size])
    payload = frame[wire.HEADER.size :]
    if len(payload) != header.length:
        raise ProtocolError("the test's frame is cut")
    return wire.decode_payload(header.kind, payload)


def survives(frame: bytes) -> bool:
    """Decoding gives a message, which comes back as it was, or ProtocolError."""
    try:
        message = decode(frame)
    except ProtocolError:
        return True
    return decode(wire.encode(message)) == message


@given(messages)
def test_a_frame_comes_back_as_it_was(message: wire.Message) -> None:
    assert decode(wire.encode(message)) == message


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_protocol_error(data: bytes) -> None:
    assert survives(data)
    assert survives(wire.MAGIC + bytes([wire.WIRE_VERSION]) + data)
    for kind in wire.Kind:
        with contextlib.suppress(ProtocolError):
            wire.decode_payload(kind, data)


@settings(max_examples=400)
@given(messages, st.data())
def test_damaged_frames_raise_nothing_but_protocol_error(
    message: wire.Message, data: st.DataObject
) -> None:
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert survives(bytes(frame))
    cut = data.draw(st.integers(0, len(frame) - 1))
    assert survives(bytes(frame[:cut]))


def test_a_header_is_refused_before_anything_is_allocated_for_it() -> None:
    for kind in wire.Kind:
        huge = wire.HEADER.pack(wire.MAGIC, wire.WIRE_VERSION, kind, 0, 2**32 - 1)
        with pytest.raises(ProtocolError):
            wire.decode_header(huge)
    longest = wire.MAX_ENTRIES * 12 + 8
    header = struct.pack("<4sBBHI", wire.MAGIC, 1, wire.Kind.SLOT_READ, 0, longest + 1)
    with pytest.raises(ProtocolError):
        wire.decode_header(header)


def test_another_version_is_told_apart() -> None:
    with pytest.raises(wire.WireVersionMismatch):
        wire.decode_header(wire.HEADER.pack(wire.MAGIC, 2, wire.Kind.READ, 0, 4))


def test_every_refusal_has_an_error() -> None:
    for code in set(wire.Code) - {wire.Code.OK}:
        assert isinstance(wire.error_of(code, 3), TransferError)
    assert type(wire.error_of(wire.Code.STALE, 0)) is StaleBlock
    assert type(wire.error_of(wire.Code.INCARNATION, 0)) is StaleBlock
    assert type(wire.error_of(wire.Code.LAYOUT, 0)) is LayoutMismatch
    assert type(wire.error_of(wire.Code.AUTH, 0)) is ProtocolError
    assert type(wire.error_of(wire.Code.BUSY, 0)) is TransferError
