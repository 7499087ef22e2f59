"""Tells Ray that a host leaves, and waits until Ray's processes there have ended.

find the host among the living -> told to leave, again every few seconds -> gone | time is up

Ray puts nothing more on such a host, and ends its own processes there when nothing uses it. It
moves no actor: that is up to whoever owns the cluster (pdserve/cluster/leaving.py).
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.ray_node import check_reachable
from pdserve.errors import ConfigError, DeadlineExceeded

logger = logging.getLogger(__name__)

_POLL_S = 0.5
# A control plane that started anew has forgotten who leaves.
_TELL_AGAIN_S = 5.0
_CALL_S = 5.0
_MODULES = ("_raylet", "core.generated.gcs_pb2", "core.generated.autoscaler_pb2")


@dataclass(frozen=True, slots=True)
class _Node:
    address: str
    needed_by: str  # what ends with it; empty: workers alone


def leave(address: str, host: str, within_s: float, note: Callable[[str], None]) -> None:
    """Returns when Ray counts no living node on the host any more.

    ``address``: host:port of Ray's head. ``host``: the address that Ray knows this host by; empty:
    the one from which it reaches the head. ConfigError: no such head, no such host there, or one
    that more than workers depend on. DeadlineExceeded: workers still run here; Ray puts nothing
    more on it all the same.
    """
    limit = time.monotonic() + within_s
    host = check_reachable(address, "--address", host)
    import ray  # noqa: PLC0415  (reads the environment when it is imported)

    control_plane: _ControlPlane | None = None
    leaving: list[str] = []
    due, silent = 0.0, ""
    while True:
        try:
            control_plane = control_plane or _ControlPlane(address)
            living = control_plane.living()
            leaving = leaving or _find(living, host)
            if living.keys().isdisjoint(leaving):
                break
            silent = ""
            if time.monotonic() >= due:
                for node in leaving:
                    control_plane.drain(node, limit - time.monotonic())
                note(f"{host} is to leave")
                due = time.monotonic() + _TELL_AGAIN_S
        except ray.exceptions.AuthenticationError as error:
            raise ConfigError(f"this Ray demands its token (RAY_AUTH_MODE): {error}") from error
        except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            silent = f": the last call to Ray failed: {error}"
            logger.info("Ray's control plane does not answer: %s", error)
        if time.monotonic() >= limit:
            what = "workers still run here" if leaving else "Ray's control plane does not answer"
            raise DeadlineExceeded(f"{host}: {what} after {within_s:g} s{silent}")
        time.sleep(_POLL_S)
    note(f"{host} has left")


def _find(living: Mapping[str, _Node], host: str) -> list[str]:
    nodes = [name for name, node in living.items() if node.address == host]
    if not nodes:
        known = ", ".join(sorted({node.address for node in living.values()}))
        raise ConfigError(f"--host: {host!r} is none of this Ray's living hosts: {known}")
    for name in nodes:
        if what := living[name].needed_by:
            raise ConfigError(f"--host: {host!r} cannot leave before the cluster ends: {what}")
    return nodes


def _untyped(name: str) -> Any:
    return importlib.import_module(name)


class _ControlPlane:
    """Its client is the one behind Ray's own commands; a driver would need longer than a pod has.

    Raises what Ray raises while it does not answer.
    """

    def __init__(self, address: str) -> None:
        raylet, gcs, autoscaler = (_untyped(f"ray.{name}") for name in _MODULES)
        self._alive = gcs.GcsNodeInfo.ALIVE
        self._reason = autoscaler.DRAIN_NODE_REASON_PREEMPTION
        self._client = raylet.GcsClient(address=address)

    def living(self) -> dict[str, _Node]:
        """Living nodes by id."""
        jobs = self._client.get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=_CALL_S
        )
        drivers = {job.driver_address.node_id.hex() for job in jobs.values() if not job.is_dead}
        nodes = self._client.get_all_node_info(timeout=_CALL_S)
        found = {}
        for node, one in nodes.items():
            if one.state == self._alive:
                needed_by = "Ray's head runs there" if one.is_head_node else ""
                if node.hex() in drivers:
                    needed_by = "pdserve up, or another of Ray's drivers, runs there"
                found[node.hex()] = _Node(str(one.node_manager_address), needed_by)
        return found

    def drain(self, node: str, within_s: float) -> None:
        """Whoever kills the host does so after ``within_s``."""
        deadline_ms = int((time.time() + max(0.0, within_s)) * 1000)
        accepted, reason = self._client.drain_node(
            node, self._reason, "told to by pdserve leave", deadline_ms, timeout=_CALL_S
        )
        if not accepted:
            raise RuntimeError(f"it refuses: {reason}")
