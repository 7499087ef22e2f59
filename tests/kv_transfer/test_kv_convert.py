"""Endpoints and offers cross the wire unchanged; values out of bounds do not get in."""

from __future__ import annotations

import os

import pytest

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.convert import (
    endpoint_from_proto,
    endpoint_to_proto,
    offers_from_proto,
    offers_to_proto,
)
from kv_transfer.session import format_address, parse_address
from pdserve.errors import ProtocolError
from pdserve.types import Fingerprint, Incarnation, Transport
from pdserve.v1 import kv_pb2

ENDPOINT = Endpoint(
    incarnation=Incarnation(os.urandom(16)),
    fingerprint=Fingerprint(os.urandom(32)),
    num_blocks=100,
    span_bytes=368640,
    host_id="0123abcd",
    pid=4711,
    shm_fd=9,
    tcp_address="[::1]:4000",
    device_uuid="",
    cuda_ipc_handle=b"",
    cuda_ipc_offset=0,
    transports=(Transport.SHM, Transport.TCP),
)


def test_an_endpoint_comes_back_as_it_was() -> None:
    wire = endpoint_to_proto(ENDPOINT).SerializeToString()
    assert endpoint_from_proto(kv_pb2.KvEndpoint.FromString(wire)) == ENDPOINT


def test_a_transport_of_a_newer_peer_is_left_out() -> None:
    message = endpoint_to_proto(ENDPOINT)
    message.transports.append("carrier_pigeon")
    assert endpoint_from_proto(message) == ENDPOINT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("incarnation", b""),
        ("incarnation", bytes(15)),
        ("layout_fingerprint", bytes(33)),
        ("num_blocks", 0),
        ("span_bytes", 0),
        ("span_bytes", 2**63),
        ("host_id", "x" * 257),
        ("pid", 2**31),
        ("shm_fd", 2**31),
        ("tcp_address", "nowhere"),
        ("tcp_address", "host:0"),
        ("tcp_address", "host:65536"),
        ("tcp_address", "host:" + "9" * 200),
        ("tcp_address", ":80"),
        ("tcp_address", "x" * 300 + ":80"),
        ("device_uuid", "x" * 257),
        ("cuda_ipc_handle", bytes(63)),
        ("cuda_ipc_offset", 2**63),
        ("transports", ["tcp"] * 17),
    ],
)
def test_a_value_out_of_bounds_is_refused(field: str, value: object) -> None:
    message = endpoint_to_proto(ENDPOINT)
    if isinstance(value, list):
        message.transports.extend(value)
    else:
        setattr(message, field, value)
    with pytest.raises(ProtocolError):
        endpoint_from_proto(message)


def test_offers_come_back_as_they_were() -> None:
    offers = tuple(BlockOffer(i, 99 - i, 2**64 - 1 - i, 2**63 + i) for i in range(5))
    wire = offers_to_proto(offers).SerializeToString()
    assert offers_from_proto(kv_pb2.Offer.FromString(wire), 5, 100) == offers


@pytest.mark.parametrize(
    "offers",
    [
        [BlockOffer(5, 0, 0, 0)],
        [BlockOffer(0, 100, 0, 0)],
        [BlockOffer(1, 0, 0, 0), BlockOffer(1, 2, 0, 0)],
        [BlockOffer(i % 5, 0, 0, 0) for i in range(6)],
    ],
)
def test_offers_out_of_bounds_are_refused(offers: list[BlockOffer]) -> None:
    with pytest.raises(ProtocolError):
        offers_from_proto(offers_to_proto(offers), 5, 100)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "worker-3.kv"])
def test_addresses_of_both_families(host: str) -> None:
    assert parse_address(format_address(host, 4000)) == (host, 4000)
