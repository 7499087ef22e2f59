"""The router's process: told its boot by a private file, started again on the same ports.

start -> one JSON line with its addresses -> ... -> SIGTERM (drains) -> stop

A restarted router knows no workers; ``generation`` rises at each start, and membership pushes the
whole truth when it does.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.cluster.child import Child, first_line, tail_of
from pdserve.cluster.orphans import MARK
from pdserve.config import Config
from pdserve.errors import ConfigError, InternalError
from pdserve.rpc.identity import Caller, mint
from pdserve.rpc.tls import internal_tls

_START_TIMEOUT_S = 60.0
# Between two signals, or they count as one.
_APART_S = 0.3
# After a drain: last words to those who still wait, and the end of the process.
_CLOSE_S = 3.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the router listens, each ``host:port``."""

    http: str
    grpc: str
    internal: str


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """What every start of this cluster's router is told."""

    config: Config
    model_path: str
    served_name: str
    cluster_token: str
    hash_key: bytes
    boot_dir: Path
    log: Path
    mark: str


class RouterProcess:
    """Owns the process. ``addresses`` are those of its first start and never change."""

    def __init__(self, spec: RouterSpec, note: Callable[[str], None]) -> None:
        self._spec = spec
        self._note = note
        self._addresses: Addresses | None = None
        self._generation = 0
        self._drain: threading.Thread | None = None
        self._child = Child(
            "router",
            self._command,
            self._read_addresses,
            env={MARK: spec.mark},
            log=spec.log,
            piped=True,
            on_ready=self._on_ready,
            on_death=lambda code: note(f"router ended with code {code}; starting it again"),
        )

    @property
    def addresses(self) -> Addresses:
        assert self._addresses is not None, "asked before wait_ready"
        return self._addresses

    @property
    def generation(self) -> int:
        """How often the router has started; 0 before the first time."""
        return self._generation

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self) -> None:
        self._child.start()

    def wait_ready(self) -> None:
        self._child.wait_ready(_START_TIMEOUT_S + 1)

    def stop(self, drain_s: float) -> None:
        """Requests may go on for ``drain_s``; those that then run are told that they end."""
        self._child.stop(max(drain_s, _APART_S), _CLOSE_S)

    def _command(self) -> list[str]:
        spec = self._spec
        path = spec.boot_dir / "router.json"
        # By name: what all rooms share imports none of them.
        boot = importlib.import_module("router.boot")
        writer = importlib.import_module("router.boot_file")
        config, internal = spec.config, "127.0.0.1:0"
        if self._addresses is not None:
            config = _with_ports(config, self._addresses)
            internal = self._addresses.internal
        writer.write_boot(
            path,
            boot.RouterBoot(
                config=config,
                model_path=spec.model_path,
                served_name=spec.served_name,
                identity=mint(spec.cluster_token, Caller.ROUTER, tls=internal_tls(config.security)),
                hash_key=spec.hash_key,
                run_dir=str(spec.boot_dir),
                internal_address=internal,
            ),
        )
        return [sys.executable, "-m", "router", str(path)]

    def _read_addresses(self, process: subprocess.Popen[bytes]) -> None:
        line = first_line(process, _START_TIMEOUT_S)
        if line is None:
            process.kill()
            process.wait()
            said = tail_of(self._spec.log)
            raise ConfigError(f"the router did not start: {said or self._spec.log}")
        try:
            answer = json.loads(line)
            addresses = Addresses(answer["http"], answer["grpc"], answer["internal"])
        except (ValueError, KeyError, TypeError) as error:
            raise InternalError("the router's first line does not give its addresses") from error
        if self._addresses is None:
            self._addresses = addresses
        self._generation += 1
        # Whatever it prints later must not fill the pipe.
        self._drain = threading.Thread(
            target=_drop_output, args=(process,), name="router-output", daemon=True
        )
        self._drain.start()

    def _on_ready(self, again: bool) -> None:
        if again:
            self._note("router serves again")


def _with_ports(config: Config, addresses: Addresses) -> Config:
    ports = [int(text.rpartition(":")[2]) for text in (addresses.http, addresses.grpc)]
    return replace(config, router=replace(config.router, http_port=ports[0], grpc_port=ports[1]))


def _drop_output(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        while stream.read(4096):
            pass
