"""Who can open whose memory: an id that is equal only where /proc/<pid>/fd/<fd> can be opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kv_transfer.plan import Capabilities
from pdserve.engine.memory import PoolMemory


def host_id() -> str:
    """32 hex digits over all that the kernel compares before it lets one process open another's fd.

    The same boot of the same kernel, the same process and user namespaces (so that a pid means the
    same process), the same user and group, and the same permitted capabilities.
    """
    capabilities = [
        line
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("CapPrm:")
    ]
    parts = (
        Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        os.readlink("/proc/self/ns/pid"),
        os.readlink("/proc/self/ns/user"),
        str(os.getuid()),
        str(os.getgid()),
        *capabilities,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def local_capabilities(pool: PoolMemory, links: bool, links_on_one_device: bool) -> Capabilities:
    """What this process can do with its pool; ``links``: it can open NCCL links."""
    return Capabilities(
        host_id=host_id(),
        device_uuid=pool.device_uuid,
        links=links,
        links_on_one_device=links_on_one_device,
    )
