"""One moment of a cluster, read from the ``now`` of its router's ``/live.json``."""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.cluster import router_view
from pdserve.cluster.router_view import Access
from pdserve.errors import WorkerLost


class Seconds(msgspec.Struct, frozen=True):
    """None where there was nothing to measure."""

    p50: float | None
    p95: float | None


class Rates(msgspec.Struct, frozen=True):
    """Per second over the last minute; ``in_flight`` is a count."""

    in_flight: int
    finished: float
    failed: float
    rejected: float
    generated: float  # tokens
    computed: float  # prompt tokens that no cache had
    device: float  # prompt tokens found in that tier
    host: float
    redis: float
    kv_bytes: float
    first_token: Seconds
    inter_token: Seconds


class Blocks(msgspec.Struct, frozen=True):
    """KV blocks on the device."""

    used: int
    cached: int
    total: int


class Pool(msgspec.Struct, frozen=True):
    role: str
    workers: int
    ready: int
    running: int
    waiting: int
    blocks: Blocks


class Tiers(msgspec.Struct, frozen=True):
    """KV blocks below the device."""

    host: int
    host_total: int
    redis_written: int


class Worker(msgspec.Struct, frozen=True):
    id: str
    state: str
    role: str
    pid: int
    node: str
    running: int
    waiting: int
    blocks: Blocks
    tiers: Tiers
    degraded: str


class Now(msgspec.Struct, frozen=True):
    version: str
    model: str
    numerics: str
    ready: bool
    reason: str  # empty while ready
    missing: tuple[str, ...]  # planned workers that have never joined
    shortfalls: tuple[str, ...]  # what the cluster was asked for and does not do
    headline: Rates
    pools: tuple[Pool, ...]
    workers: tuple[Worker, ...]


def not_there(worker: str) -> str:
    """What a missing worker means."""
    return f"{worker} has not joined: it starts, or no node has room for it (ray status)"


def read(data: dict[str, Any], url: str) -> Now:
    """WorkerLost when it is not what this version's router tells."""
    try:
        return msgspec.convert(data, Now)
    except msgspec.ValidationError as error:
        raise WorkerLost(f"GET {url}/live.json: {error}") from error


def fetch(access: Access) -> Now:
    """WorkerLost when the router does not answer as it should."""
    return read(router_view.live(access), access.url)
