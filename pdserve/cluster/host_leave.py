"""Tells Ray that a host leaves, and waits until Ray's processes there have ended.

find the host among the living -> told to leave, again every few seconds -> gone | time is up

Ray puts nothing more on such a host, and ends its own processes there when nothing uses it. It
moves no actor: that is up to whoever owns the cluster (pdserve/cluster/leaving.py).
"""

from __future__ import annotations

import importlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from pdserve.cluster.ray_node import check_reachable, host_and_port
from pdserve.errors import ConfigError, DeadlineExceeded

logger = logging.getLogger(__name__)

_POLL_S = 0.5
# A control plane that started anew has forgotten who leaves.
_TELL_AGAIN_S = 5.0
_CALL_S = 5.0
_MODULES = ("_raylet", "core.generated.gcs_pb2", "core.generated.autoscaler_pb2")


def leave(address: str, host: str, within_s: float, note: Callable[[str], None]) -> None:
    """Returns when none of Ray's processes runs on the host any more.

    ``address``: host:port of Ray's head. ``host``: the address that Ray knows this host by; empty:
    the one from which it reaches the head. ConfigError: no such head, or no such host there.
    DeadlineExceeded: workers still run here; Ray puts nothing more on it all the same.
    """
    limit = time.monotonic() + within_s
    check_reachable(address, "--address")
    import ray  # noqa: PLC0415  (reads the environment when it is imported)

    host = host or _own_address(address)
    control_plane: _ControlPlane | None = None
    node, due = "", 0.0
    while True:
        try:
            control_plane = control_plane or _ControlPlane(address)
            living = control_plane.living()
            node = node or _find(living, host)
            if node not in living:
                break
            if time.monotonic() >= due:
                control_plane.drain(node, limit - time.monotonic())
                note(f"{host} is to leave")
                due = time.monotonic() + _TELL_AGAIN_S
        except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            logger.info("Ray's control plane does not answer: %s", error)
        if time.monotonic() >= limit:
            what = "workers still run here" if node else "Ray's control plane does not answer"
            raise DeadlineExceeded(f"{host}: {what} after {within_s:g} s")
        time.sleep(_POLL_S)
    note(f"{host} has left")


def _find(living: dict[str, str], host: str) -> str:
    nodes = [node for node, address in living.items() if address == host]
    if not nodes:
        known = ", ".join(sorted(set(living.values())))
        raise ConfigError(f"--host: {host!r} is none of this Ray's living hosts: {known}")
    return nodes[0]


def _own_address(head: str) -> str:
    """As ``ray start`` finds it: where packets to the head come from. None is sent."""
    name, port = host_and_port(head)
    family, kind, protocol, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


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

    def living(self) -> dict[str, str]:
        """Address of each living node, by its id."""
        found = self._client.get_all_node_info(timeout=_CALL_S)
        return {
            node.hex(): str(one.node_manager_address)
            for node, one in found.items()
            if one.state == self._alive
        }

    def drain(self, node: str, within_s: float) -> None:
        """Whoever kills the host does so after ``within_s``."""
        deadline_ms = int((time.time() + max(0.0, within_s)) * 1000)
        why = "told to by pdserve leave"
        accepted, reason = self._client.drain_node(node, self._reason, why, deadline_ms)
        if not accepted:
            raise RuntimeError(f"it refuses: {reason}")
