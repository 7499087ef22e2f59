"""Which processes listen where, read from /proc: the kernel's own list, not what we believe."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
# UDP has no listening state: a bound socket without a peer is in this one.
_UNCONNECTED = "07"


@dataclass(frozen=True)
class Listener:
    pid: int
    protocol: str
    address: str
    port: int
    command: str

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return address.ipv4_mapped.is_loopback
        return address.is_loopback


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Every TCP or UDP socket of these processes that strangers could send to."""
    found: list[Listener] = []
    for pid in pids:
        inodes = _socket_inodes(pid)
        command = _command(pid)[:200]
        for protocol in ("tcp", "tcp6", "udp", "udp6"):
            for inode, (address, port) in _bound(pid, protocol).items():
                if inode in inodes:
                    found.append(Listener(pid, protocol, address, port, command))
    return found


def commands(pids: Iterable[int]) -> dict[int, str]:
    """Their command lines; empty for those that have ended."""
    return {pid: _command(pid) for pid in pids}


def with_mark(*marks: str) -> list[int]:
    """Processes that were started with one of these values of PDSERVE_RUN."""
    wanted = {f"PDSERVE_RUN={mark}".encode() for mark in marks}
    return [pid for pid in _pids() if wanted & set(_read(pid, "environ").split(b"\0"))]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return b""


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _socket_inodes(pid: int) -> set[str]:
    found: set[str] = set()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, PermissionError):
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            found.add(match[1])
    return found


def _bound(pid: int, protocol: str) -> dict[str, tuple[str, int]]:
    """inode -> address and port, in the process's own network namespace."""
    state = _LISTEN if protocol.startswith("tcp") else _UNCONNECTED
    rows = [line.split() for line in _read(pid, f"net/{protocol}").decode().splitlines()[1:]]
    return {row[9]: _address(row[1]) for row in rows if row[3] == state}


def _address(text: str) -> tuple[str, int]:
    """The kernel writes each 32-bit word of an address in the machine's own byte order."""
    raw, port = text.split(":")
    words = bytes.fromhex(raw)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return str(ipaddress.ip_address(packed)), int(port, 16)
