"""How much memory a host has for its workers, and which part of it is one worker's. No torch.

measure_host() -> Memory     once, when the cluster starts; a worker that starts again beside others
                             would find less, and come back smaller than it was
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import DoesNotFit

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True)
class Memory:
    """What may still be taken; bytes. ``source`` says who set the limit."""

    free: int
    source: str


@dataclass(frozen=True, slots=True)
class HostShare:
    """What a worker may take of its host."""

    workers: int = 1  # that share it, each an equal part
    memory: Memory | None = None  # None: measured when the worker starts
    tier_bytes: int = 0  # of its part, for the cache tiers below the pool
    weights_holders: int = 1  # who pay for one copy of the weights together, where they map it


def measure_host() -> Memory:
    host = available_host(MEMINFO.read_text(encoding="ascii"))
    group = available_cgroup(CGROUP, OWN_CGROUP.read_text(encoding="utf-8"))
    if group is not None and group < host:
        return Memory(group, "left in the control group")
    return Memory(host, "available on the host")


def available_host(meminfo: str) -> int:
    """MemAvailable of /proc/meminfo's text; bytes."""
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise DoesNotFit("/proc/meminfo does not say how much memory is available")


def available_cgroup(root: Path, own: str) -> int | None:
    """Bytes left under the control groups' limits; None without a limit.

    ``root``: where the groups are mounted. ``own``: the text of /proc/self/cgroup.
    """
    left = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "memory"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # The group's own path is only visible from the namespace that it was made in; the limits
        # of all groups above it hold as well.
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            room = _room(base.joinpath(*parts[:depth]), limit_file, used_file)
            if room is not None:
                left.append(room)
    return min(left) if left else None


def _room(group: Path, limit_file: str, used_file: str) -> int | None:
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        used = int((group / used_file).read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    # Version 1 writes "no limit" as a number near 2**63.
    if limit == "max" or int(limit) >= NO_LIMIT:
        return None
    # Counted as used, but given back as soon as anybody wants it.
    cache = next((line for line in stat.splitlines() if line.startswith("inactive_file ")), "_ 0")
    return max(0, int(limit) - max(0, used - int(cache.split()[1])))
