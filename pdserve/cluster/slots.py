"""Waits until the nodes of a joined Ray offer room for every worker.

joined -> enough slots of each role? -no-> ask Ray's autoscaler for nodes, wait -> enough | too late

Nodes start when they start: pods beside ours, machines that a cloud still boots. Without an
autoscaler nobody hears the demand, and the wait is for nodes that somebody else adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import ray
from ray.autoscaler.sdk import request_resources

from pdserve.cluster.ray_node import RayNode, check_resources
from pdserve.types import Role

_POLL_S = 0.5


def demand(wanted: Mapping[Role, int], gpus_each: int) -> list[dict[str, float]]:
    """One bundle for each worker, as an autoscaler packs them onto nodes."""
    gpu = {"GPU": float(gpus_each)} if gpus_each else {}
    return [{role.value: 1.0, **gpu} for role, count in wanted.items() for _ in range(count)]


def lacking(wanted: Mapping[Role, int], have: Mapping[str, float]) -> dict[Role, int]:
    """How many workers of a role have no place yet."""
    short = {role: count - int(have.get(role.value, 0)) for role, count in wanted.items()}
    return {role: count for role, count in short.items() if count > 0}


def await_slots(
    node: RayNode,
    wanted: Mapping[Role, int],
    gpus_each: int,
    timeout_s: float,
    note: Callable[[str], None],
) -> RayNode:
    """The node as it is once every worker has a place. ConfigError when that takes too long."""
    limit = time.monotonic() + timeout_s
    said: dict[Role, int] = {}
    while (short := lacking(wanted, ray.cluster_resources())) and time.monotonic() < limit:
        if not said:
            request_resources(bundles=demand(wanted, gpus_each))
        if short != said:
            said = short
            places = ", ".join(f"{count} {role.value}" for role, count in short.items())
            note(f"waiting for Ray nodes with room for workers: {places}")
        time.sleep(_POLL_S)
    check_resources(wanted)
    serving = [entry for entry in ray.nodes() if entry["Alive"] and _offers_a_role(entry)]
    gpus = sum(entry["Resources"].get("GPU", 0.0) for entry in serving)
    return replace(node, gpus=float(gpus), nodes=len(serving))


def _offers_a_role(entry: Mapping[str, Mapping[str, float]]) -> bool:
    """A head, or the node that we run on, may offer nothing."""
    return any(entry["Resources"].get(role.value, 0) > 0 for role in Role)
