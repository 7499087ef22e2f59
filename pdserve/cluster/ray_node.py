"""The Ray that the workers of a cluster live in: one of our own, or one that is joined.

start_ray -> ray.init ... RayNode.stop -> ray.shutdown

Ray of our own has its own ports, folder and access token, so it neither meets nor ends another Ray
of this machine. Its processes inherit the mark of the run (see orphans.py) and die with us. A
joined Ray is left as it was.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cluster.orphans import MARK
from pdserve.errors import ConfigError, InternalError
from pdserve.types import Role

logger = logging.getLogger(__name__)

LOCAL = "local"
# Each worker asks for one of its role's resource, which says where a role may run; on one machine
# it limits nothing.
_LOCAL_SLOTS = 10_000
# Ray carries neither tokens nor KV: its object store only has to exist.
_OBJECT_STORE_BYTES = 80 * 2**20
_CONNECT_TIMEOUT_S = 5.0
_HELD_ENVIRONMENT = threading.Lock()
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


@dataclass(frozen=True, slots=True)
class RayNode:
    """A connection to Ray; ``owned`` if the Ray is ours alone."""

    owned: bool
    gpus: float
    nodes: int
    mark: str  # on every process of a Ray of ours

    def stop(self) -> None:
        """Disconnects; a Ray of our own ends with all of its processes."""
        _ray().shutdown()


def start_ray(address: str, temp_dir: Path, mark: str, threads: int) -> RayNode:
    """Starts (``local``) or joins a Ray. ConfigError when it cannot be reached or started.

    Call from the main thread, or from one that lives as long as the node: the kernel ties Ray's
    processes to the thread that starts them. ``threads`` is what workers may compute with.
    """
    own = {
        MARK: mark,
        # Ray sets it to 1 for actors that hold no CPU, unless it is set.
        "OMP_NUM_THREADS": str(threads),
        # Streams go on while the control plane is away; Ray's own processes must too.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
        **_access(),
    }
    if address not in (LOCAL, "auto"):
        _check_reachable(address)
    with _environment({**_QUIET, **(own if address == LOCAL else {})}):
        ray = _ray()
        if ray.is_initialized():
            raise InternalError("this process is already connected to a Ray; stop that node first")
        try:
            ray.init(**_arguments(address, temp_dir))
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            what = f"join Ray at {address}" if address != LOCAL else "start a Ray of our own"
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"cannot {what}: {reason[0]}") from error
        gpus = float(ray.cluster_resources().get("GPU", 0.0))
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return RayNode(address == LOCAL, gpus, nodes, mark)


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"pools.ray_address = {address!r}: cannot join this Ray: {reason}",
            param="pools.ray_address",
        ) from error


def _ray() -> Any:
    """Imported late: it reads the environment, and takes half a second."""
    import ray  # noqa: PLC0415

    return ray


@functools.cache
def _access() -> dict[str, str]:
    """The access token of every Ray that this process starts.

    Ray's ports listen on all interfaces and run what they are sent, so they demand a token. Ray
    decides when it is imported; imported before, it can no longer be told.
    """
    if "ray" in sys.modules:
        logger.warning("Ray was imported before its start: it runs without an access token")
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _arguments(address: str, temp_dir: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "address": address,
        "namespace": "pdserve",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address == LOCAL:
        arguments |= {
            "_temp_dir": str(temp_dir),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "resources": {role.value: _LOCAL_SLOTS for role in Role},
        }
    return arguments


def check_resources(wanted: Mapping[Role, int]) -> None:
    """ConfigError when the joined Ray has too few slots for a role."""
    have = _ray().cluster_resources()
    for role, count in wanted.items():
        if have.get(role.value, 0) < count:
            raise ConfigError(
                f"the Ray cluster offers {have.get(role.value, 0):g} of resource {role.value!r}, "
                f"{count} wanted: start its nodes with --resources='{{\"{role.value}\": N}}'"
            )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for what is started meanwhile, and puts back what was there."""
    with _HELD_ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
