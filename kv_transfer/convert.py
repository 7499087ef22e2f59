"""Endpoints and offers as protobuf messages; what comes off the wire is checked here, once.

The ``*_from_proto`` functions raise ProtocolError for a value that no worker of ours sends.
"""

from __future__ import annotations

from collections.abc import Iterable

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.session import parse_address
from pdserve.errors import ProtocolError
from pdserve.types import ID_BYTES, Fingerprint, Incarnation, Transport
from pdserve.v1 import kv_pb2

FINGERPRINT_BYTES = 32
CUDA_HANDLE_BYTES = 64
# Far beyond any pool, far below what would overflow an address.
SPAN_BYTES_MAX = 2**40
POOL_BYTES_MAX = 2**50
TEXT_MAX = 256
PID_MAX = 2**22
FD_MAX = 2**30
TRANSPORTS_MAX = 16

_TRANSPORTS = {transport.value: transport for transport in Transport}


def endpoint_to_proto(endpoint: Endpoint) -> kv_pb2.KvEndpoint:
    return kv_pb2.KvEndpoint(
        incarnation=endpoint.incarnation,
        layout_fingerprint=endpoint.fingerprint,
        num_blocks=endpoint.num_blocks,
        span_bytes=endpoint.span_bytes,
        host_id=endpoint.host_id,
        pid=endpoint.pid,
        shm_fd=endpoint.shm_fd,
        tcp_address=endpoint.tcp_address,
        device_uuid=endpoint.device_uuid,
        cuda_ipc_handle=endpoint.cuda_ipc_handle,
        cuda_ipc_offset=endpoint.cuda_ipc_offset,
        transports=[transport.value for transport in endpoint.transports],
    )


def endpoint_from_proto(message: kv_pb2.KvEndpoint) -> Endpoint:
    """Transports that we do not know are left out; a peer may be newer."""
    _require("incarnation", len(message.incarnation) == ID_BYTES)
    _require("layout_fingerprint", len(message.layout_fingerprint) == FINGERPRINT_BYTES)
    _require("num_blocks", message.num_blocks > 0)
    _require("span_bytes", 0 < message.span_bytes <= SPAN_BYTES_MAX)
    _require("span_bytes", message.num_blocks * message.span_bytes <= POOL_BYTES_MAX)
    _require("host_id", len(message.host_id) <= TEXT_MAX)
    _require("pid", message.pid <= PID_MAX)
    _require("shm_fd", message.shm_fd <= FD_MAX)
    _require("tcp_address", len(message.tcp_address) <= TEXT_MAX)
    _require("device_uuid", len(message.device_uuid) <= TEXT_MAX)
    _require("cuda_ipc_handle", len(message.cuda_ipc_handle) in {0, CUDA_HANDLE_BYTES})
    _require("cuda_ipc_offset", message.cuda_ipc_offset <= POOL_BYTES_MAX)
    _require("transports", len(message.transports) <= TRANSPORTS_MAX)
    if message.tcp_address:
        parse_address(message.tcp_address)
    return Endpoint(
        incarnation=Incarnation(message.incarnation),
        fingerprint=Fingerprint(message.layout_fingerprint),
        num_blocks=message.num_blocks,
        span_bytes=message.span_bytes,
        host_id=message.host_id,
        pid=message.pid,
        shm_fd=message.shm_fd,
        tcp_address=message.tcp_address,
        device_uuid=message.device_uuid,
        cuda_ipc_handle=message.cuda_ipc_handle,
        cuda_ipc_offset=message.cuda_ipc_offset,
        transports=tuple(_TRANSPORTS[name] for name in message.transports if name in _TRANSPORTS),
    )


def offer_to_proto(offer: BlockOffer) -> kv_pb2.BlockOffer:
    return kv_pb2.BlockOffer(
        index=offer.index,
        block=offer.block,
        generation=offer.generation,
        checksum=offer.checksum,
    )


def offer_from_proto(
    message: kv_pb2.BlockOffer, prompt_blocks: int, pool_blocks: int
) -> BlockOffer:
    """``prompt_blocks``: of the prompt; ``pool_blocks``: of the peer's endpoint."""
    _require("index", message.index < prompt_blocks)
    _require("block", message.block < pool_blocks)
    return BlockOffer(message.index, message.block, message.generation, message.checksum)


def offers_to_proto(offers: Iterable[BlockOffer]) -> kv_pb2.Offer:
    return kv_pb2.Offer(blocks=[offer_to_proto(offer) for offer in offers])


def offers_from_proto(
    message: kv_pb2.Offer, prompt_blocks: int, pool_blocks: int
) -> tuple[BlockOffer, ...]:
    """At most one offer for each block of the prompt."""
    _require("blocks", len(message.blocks) <= prompt_blocks)
    offers = tuple(offer_from_proto(offer, prompt_blocks, pool_blocks) for offer in message.blocks)
    _require("blocks", len({offer.index for offer in offers}) == len(offers))
    return offers


def _require(name: str, holds: bool) -> None:
    if not holds:
        raise ProtocolError(f"a peer sent a value of {name} outside its bounds")
