"""Whether a port can be bound, and who has it if not."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from pdserve.errors import ConfigError

_LISTEN = "0A"


def check_free(host: str, port: int, key: str) -> None:
    """ConfigError, naming the owner where it can be found, unless ``host:port`` can be bound."""
    if port == 0:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(
            f"router.host = {host!r}: {error.strerror}", param="router.host"
        ) from error
    family, kind, proto, _, address = found[0]
    with socket.socket(family, kind, proto) as probe:
        # As servers do: a connection that lingers from the last run is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            who = _owner_text(port)
            raise ConfigError(
                f"{key} = {port}: cannot listen on {host}:{port}: {error.strerror}{who}", param=key
            ) from error


def _owner_text(port: int) -> str:
    pid = owner_of(port)
    if pid is None:
        return ""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    return f" by process {pid} ({os.fsdecode(command).strip()[:60]})"


def owner_of(port: int) -> int | None:
    """The pid that listens on the port, if this user may know it."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for entry in os.listdir("/proc"):
        if entry.isdigit() and inodes & _sockets_of(int(entry)):
            return int(entry)
    return None


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _sockets_of(pid: int) -> set[str]:
    found = set()
    # Processes end while we look, and those of other users are not ours to see.
    with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found
