"""Decisions of a hand-off, as pure functions: which transport, which blocks, in which pieces.

Torch-free and without I/O; the caller acts on what is returned here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kv_transfer.base import BlockOffer, Endpoint
from pdserve.errors import LayoutMismatch, TransferError
from pdserve.types import Fingerprint, Transport


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the reading process can do."""

    host_id: str
    device_uuid: str = ""  # empty: the pool is in shared memory of the CPU
    links: bool = False  # two-rank links (NCCL) can be opened
    links_on_one_device: bool = False  # ... also when both ranks share a device


@dataclass(frozen=True, slots=True)
class Choice:
    transport: Transport
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` blocks that are adjacent in the source and in the destination."""

    first: int  # position of the first one in the list of offers
    source: int
    destination: int
    count: int


def choose_transport(local: Capabilities, endpoint: Endpoint, order: Sequence[Transport]) -> Choice:
    """The first transport of ``order`` that both ends can do, and why it was taken.

    Raises TransferError, with the obstacle of each, when none can be used.
    """
    obstacles: list[str] = []
    for transport in order:
        obstacle = _obstacle(transport, local, endpoint)
        if obstacle is None:
            reason = "; ".join([_MERITS[transport], *obstacles])
            return Choice(transport, reason)
        obstacles.append(f"{transport.value} not: {obstacle}")
    raise TransferError(
        "no allowed transport connects the two pools: " + ("; ".join(obstacles) or "none allowed")
    )


_MERITS = {
    Transport.SHM: "both pools lie in this host's memory",
    Transport.CUDA_IPC: "both pools lie on the same device",
    Transport.NCCL: "both ends can open a link between their devices",
    Transport.TCP: "the peer serves its pool over TCP",
}


def _obstacle(transport: Transport, local: Capabilities, endpoint: Endpoint) -> str | None:
    if transport not in endpoint.transports:
        return "the peer does not offer it"
    if transport is Transport.SHM:
        return _shm_obstacle(local, endpoint)
    if not endpoint.tcp_address:
        return "the peer runs no transfer server"
    if transport is Transport.CUDA_IPC:
        return _cuda_ipc_obstacle(local, endpoint)
    if transport is Transport.NCCL:
        return _nccl_obstacle(local, endpoint)
    return None


def _shm_obstacle(local: Capabilities, endpoint: Endpoint) -> str | None:
    if endpoint.host_id != local.host_id:
        return "the peer's memory cannot be opened from here"
    if endpoint.shm_fd == 0 or endpoint.pid == 0:
        return "the peer's pool is not in shared memory"
    if local.device_uuid:
        return "the local pool is on a device"
    return None


def _cuda_ipc_obstacle(local: Capabilities, endpoint: Endpoint) -> str | None:
    if not local.device_uuid:
        return "the local pool is on the CPU"
    if endpoint.host_id != local.host_id:
        return "the peer is on another host"
    if endpoint.device_uuid != local.device_uuid:
        return "the peer's pool is on another device"
    return None if endpoint.cuda_ipc_handle else "the peer exports no handle"


def _nccl_obstacle(local: Capabilities, endpoint: Endpoint) -> str | None:
    if not local.links:
        return "no NCCL here"
    if bool(local.device_uuid) != bool(endpoint.device_uuid):
        return "one pool is on a device, the other on the CPU"
    shared = local.device_uuid != "" and local.device_uuid == endpoint.device_uuid
    if shared and not local.links_on_one_device:
        return "NCCL refuses two ranks on one device"
    return None


def check_pairing(endpoint: Endpoint, fingerprint: Fingerprint, span_bytes: int) -> None:
    """Raises LayoutMismatch unless the peer's blocks can be used here."""
    if endpoint.fingerprint != fingerprint:
        raise LayoutMismatch("the peer's layout fingerprint differs from ours")
    if endpoint.span_bytes != span_bytes:
        raise LayoutMismatch(
            f"the peer's blocks are {endpoint.span_bytes} bytes long, ours {span_bytes}"
        )


def wanted_blocks(prompt_blocks: int, local: Collection[int]) -> tuple[int, ...]:
    """What a grant names: the prompt's block indices that are not here yet, ascending."""
    here = set(local)
    return tuple(index for index in range(prompt_blocks) if index not in here)


def wanted_offers(offers: Sequence[BlockOffer], missing: Collection[int]) -> tuple[BlockOffer, ...]:
    """The offers of one chunk that were granted and have not been read."""
    return tuple(offer for offer in offers if offer.index in missing)


def split_reads(count: int, span_bytes: int, max_bytes: int, max_blocks: int) -> Iterator[slice]:
    """Cuts ``count`` blocks into pieces of at most ``max_bytes`` (but at least one block)."""
    step = max(1, min(max_blocks, max_bytes // max(1, span_bytes)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def runs(source: Sequence[int], destination: Sequence[int], max_blocks: int) -> Iterator[Run]:
    """Groups neighbours that are adjacent on both sides, at most ``max_blocks`` in a group."""
    first = 0
    for i in range(1, len(source) + 1):
        if (
            i < len(source)
            and i - first < max_blocks
            and source[i] == source[i - 1] + 1
            and destination[i] == destination[i - 1] + 1
        ):
            continue
        yield Run(first, source[first], destination[first], i - first)
        first = i


def check_offers(offers: Sequence[BlockOffer], into: Sequence[int], num_blocks: int) -> None:
    """Raises TransferError for an offer of a block that the peer's pool does not have."""
    assert len(offers) == len(into), "one local block for each offer"
    for offer in offers:
        if not 0 <= offer.block < num_blocks:
            raise TransferError(f"offered block {offer.block} of a pool of {num_blocks} blocks")
