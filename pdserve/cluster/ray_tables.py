"""What Ray's control plane knows: its nodes, and which process is an actor's.

Calls to it block while it is away, so one thread makes them, and nobody waits for long: the answer
is then None, which says nothing of who lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray._private.state import actors
from ray._private.state import state as control_plane
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from pdserve.types import WorkerId

T = TypeVar("T")

TIMEOUT_S = 2.0


def process_of(actor: Any) -> int:
    """Pid of the process that is counted as this actor's; 0: it has none now. May block.

    Of Ray's public calls only those of its dashboard tell this.
    """
    entry = actors(actor._actor_id.hex())
    return int(entry["Pid"]) if entry.get("State") == "ALIVE" else 0


def leaving(places: Mapping[WorkerId, PlacementGroup]) -> frozenset[WorkerId]:
    """Workers that have their place on a node that is to end once nothing uses it. May block.

    ``pdserve leave`` tells a node so, an autoscaler or a cloud's notice of a preemption as well. Of
    Ray's public calls none says it.
    """
    draining = control_plane.get_draining_nodes()
    if not draining:
        return frozenset()
    table = ray.util.placement_group_table()
    nodes = {
        worker: table.get(group.id.hex(), {}).get("bundles_to_node_id", {}).values()
        for worker, group in places.items()
    }
    return frozenset(worker for worker, on in nodes.items() if any(node in draining for node in on))


class RayTables:
    """Owns the thread. Used in one event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "ray-control")
        self._nodes: asyncio.Future[Sequence[Mapping[str, Any]]] | None = None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def nodes(self) -> Sequence[Mapping[str, Any]] | None:
        """All who ask while a call is under way get its answer."""
        if self._nodes is None or self._nodes.done():
            self._nodes = self._call(ray.nodes)
        return await _soon(asyncio.shield(self._nodes))

    async def leaving(
        self, places: Mapping[WorkerId, PlacementGroup]
    ) -> frozenset[WorkerId] | None:
        return await _soon(self._call(lambda: leaving(places)))

    async def process_of(self, actor: Any) -> int | None:
        return await _soon(self._call(lambda: process_of(actor)))

    def _call(self, asked: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, asked)


async def _soon(call: asyncio.Future[T]) -> T | None:
    try:
        return await asyncio.wait_for(call, TIMEOUT_S)
    except (TimeoutError, RayError, RuntimeError, ConnectionError):
        return None
