"""The Ray that the workers of a cluster live in: one of our own, or one that is joined.

start_ray -> (a head process of our own ->) ray.init ... RayNode.stop -> ray.shutdown (-> head ends)
             head process: control plane ended -> started again (ray_head.py)
             head, or the raylet beside us, ended -> on_death (raylet.py)

Ray of our own has its own ports, folder and access token, so it neither meets nor ends another Ray
of this machine. Its processes inherit the mark of the run (see orphans.py) and die with us. A
joined Ray is left as it was.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cluster.child import Child, first_line, tail_of
from pdserve.cluster.orphans import MARK
from pdserve.cluster.raylet import RayletWatch
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
_START_TIMEOUT_S = 120.0
_SHUTDOWN_S = 10.0
_HELD_ENVIRONMENT = threading.Lock()
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
# Streams go on while the control plane is away; Ray's own processes, and we, must too. Ray would
# end them after a minute.
_PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "86400"}


@dataclass(frozen=True, slots=True)
class RayNode:
    """A connection to Ray; ``head`` is the process of a Ray that is ours alone."""

    head: Child | None
    gpus: float
    nodes: int
    mark: str  # on every process of a Ray of ours
    raylet: RayletWatch

    @property
    def owned(self) -> bool:
        return self.head is not None

    def stop(self) -> None:
        """Disconnects; a Ray of our own ends with all of its processes."""
        self.raylet.stop()
        # With a broken Ray this may never return; the head's end then ends its processes.
        leave = threading.Thread(target=_ray().shutdown, name="ray-shutdown", daemon=True)
        leave.start()
        leave.join(_SHUTDOWN_S)
        if self.head is not None:
            self.head.stop(_SHUTDOWN_S)


def start_ray(
    address: str,
    temp_dir: Path,
    mark: str,
    threads: int,
    on_death: Callable[[str], None] = lambda what: None,
    fault_tolerance: bool = True,
) -> RayNode:
    """Starts (``local``) or joins a Ray. ConfigError when it cannot be reached or started.

    ``threads`` is what workers may compute with. ``on_death`` hears which process ended without
    which nothing can be done any more, maybe of two. With ``fault_tolerance`` the control plane of
    a Ray of our own may end and is started again; how a joined one does is up to whoever runs it.
    """
    local = address == LOCAL
    access = _access() if local else {}
    with _environment({**_QUIET, **_PATIENT, **access}):
        head = None
        if local:
            env = {**access, **_own(mark, threads)}
            head, address = _start_head(temp_dir, env, on_death, fault_tolerance)
        elif address != "auto":
            check_reachable(address, "pools.ray_address")
        try:
            with _loopback_alone() if local else nullcontext():
                _connect(address)
            gpus = float(_ray().cluster_resources().get("GPU", 0.0))
            nodes = [node for node in _ray().nodes() if node["Alive"]]
            raylet = _watch_raylet(nodes, on_death)
        except BaseException:
            if head is not None:
                head.stop(0.0)
            raise
    return RayNode(head, gpus, len(nodes), mark, raylet)


def _watch_raylet(
    nodes: Iterable[Mapping[str, Any]], on_death: Callable[[str], None]
) -> RayletWatch:
    """Of this host's entry in Ray's own list."""
    here = _ray().get_runtime_context().get_node_id()
    paths = [str(node["RayletSocketName"]) for node in nodes if node["NodeID"] == here]
    if not paths:
        raise ConfigError("Ray does not count this host among its living nodes: join it again")
    try:
        return RayletWatch(paths[0], lambda: on_death("Ray's raylet on this host ended"))
    except OSError as error:
        raise ConfigError(f"Ray's raylet on this host does not answer: {error}") from error


def _own(mark: str, threads: int) -> dict[str, str]:
    """What every process of a Ray of ours finds in its environment."""
    return {
        MARK: mark,
        # Ray sets it to 1 for actors that hold no CPU, unless it is set.
        "OMP_NUM_THREADS": str(threads),
        # Ray's own choice is 15: then whatever else the host does goes first, and a token waits for
        # every message that it causes.
        "RAY_worker_niceness": "0",
        # Workers share the cores: a thread that spins while it waits stops its neighbours. Read
        # when the OpenMP library is loaded, so it has to be here before torch is.
        "OMP_WAIT_POLICY": "passive",
        # Ray then takes 127.0.0.1 for its node's address, and all of its servers bind to that.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _start_head(
    temp_dir: Path,
    env: Mapping[str, str],
    on_death: Callable[[str], None],
    fault_tolerance: bool,
) -> tuple[Child, str]:
    """The head's process and its address."""
    temp_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if fault_tolerance:
        env = {**env, **_tables(temp_dir)}
    arguments, log = temp_dir / "head.json", temp_dir / "head.log"
    given = {"init": _head_arguments(temp_dir), "fault_tolerance": fault_tolerance}
    arguments.write_text(json.dumps(given), encoding="utf-8")
    found: list[str] = []

    def ready(process: subprocess.Popen[bytes]) -> None:
        line = first_line(process, _START_TIMEOUT_S)
        if line is None:
            raise ConfigError(f"cannot start a Ray of our own: {tail_of(log) or f'see {log}'}")
        found.append(str(json.loads(line)["address"]))

    command = [sys.executable, "-m", "pdserve.cluster.ray_head", str(arguments)]
    head = Child(
        "ray",
        lambda: command,
        ready,
        env=env,
        log=log,
        piped=True,
        restarts=False,
        on_death=lambda code: on_death(f"Ray ended with code {code}"),
    )
    head.start()
    # Meanwhile, here: half a second.
    _ray()
    try:
        head.wait_ready(_START_TIMEOUT_S + 1)
    except BaseException:
        head.stop(0.0)
        raise
    return head, found[0]


def _tables(temp_dir: Path) -> dict[str, str]:
    """Has the control plane keep its tables in files that nobody else reads (decision 6)."""
    folder = tempfile.mkdtemp(prefix="gcs-", dir=temp_dir)
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder}


def _head_arguments(temp_dir: Path) -> dict[str, Any]:
    return {
        "_temp_dir": str(temp_dir),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "resources": {role.value: _LOCAL_SLOTS for role in Role},
    }


def _connect(address: str) -> None:
    ray = _ray()
    if ray.is_initialized():
        raise InternalError("this process is already connected to a Ray; stop that node first")
    with _own_sigterm():
        try:
            ray.init(
                address=address,
                namespace="pdserve",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"cannot connect to Ray at {address}: {reason[0]}") from error


def check_reachable(address: str, param: str, own: str = "") -> str:
    """Our address as the head sees it, unless ``own`` says which; Ray itself would try for minutes.

    ConfigError of the setting ``param``.
    """
    host, _, port = address.rpartition(":")
    try:
        where = (host.strip("[]"), int(port))
        with socket.create_connection(where, _CONNECT_TIMEOUT_S) as connection:
            return own or str(connection.getsockname()[0])
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{param} = {address!r}: cannot join this Ray: {reason}", param=param
        ) from error


def _ray() -> Any:
    """Imported late: it reads the environment, and takes half a second."""
    import ray  # noqa: PLC0415

    return ray


@functools.cache
def _access() -> dict[str, str]:
    """The access token of every Ray that this process starts.

    Ray's ports run what they are sent, so they demand a token, on loopback too: every user of the
    machine reaches that. Ray decides when it is imported; imported before, it cannot be told.
    """
    if "ray" in sys.modules:
        if "RAY_AUTH_MODE" in os.environ:
            return {}  # as whoever imported it has decided
        logger.warning("Ray was imported before its start: it runs without an access token")
        # Said aloud, since a token in the user's home would make its processes demand that.
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


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
def _loopback_alone() -> Iterator[None]:
    """Keeps 127.0.0.1 what it is; Ray would take it for this machine's address in the network.

    The variable in ``_own`` says the same to processes in which Ray is not imported yet.
    """
    from ray._private import ray_constants  # noqa: PLC0415

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray installs a handler of its own, which would end us without a stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
