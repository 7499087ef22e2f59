"""How many KV blocks fit: the memory at hand is measured, the rest is arithmetic that is shown.

measure_memory(device) -> Memory          before the weights are loaded
size_pool(...) -> PoolSize                pure; DoesNotFit carries the same sum
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.config import EngineConfig
from pdserve.engine.layout import BlockLayout
from pdserve.errors import DoesNotFit

# A sequence holds the blocks of its prompt and one to write its answer into, so a single block
# could never serve anybody.
MIN_BLOCKS = 2
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
class SizingInputs:
    """``memory`` was measured before any worker of the host loaded its weights; each takes an
    equal part. ``capped``: engine.pool_bytes_max holds (CPU workers)."""

    memory: Memory
    weights_bytes: int
    workers_on_host: int
    max_model_len: int
    capped: bool


@dataclass(frozen=True, slots=True)
class PoolSize:
    blocks: int
    sum: str  # how it came about, for people
    # Set when sequences of the model's full length do not fit; the longest that do.
    longest: int | None


def measure_memory(device: torch.device) -> Memory:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Memory(free, f"free on {device}")
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


def size_pool(
    inputs: SizingInputs, layout: BlockLayout, engine: EngineConfig, pool_blocks: int
) -> PoolSize:
    """Blocks of one worker's pool. ``pool_blocks``: a fixed number, 0 computes it.

    DoesNotFit when the fixed number, or MIN_BLOCKS of a computed one, does not fit.
    """
    if pool_blocks:
        blocks, limit = pool_blocks, inputs.memory.free
        share = f"{_size(limit)} {inputs.memory.source}"
    else:
        limit = int(inputs.memory.free * engine.memory_fraction / inputs.workers_on_host)
        share = (
            f"{_size(limit)} ({engine.memory_fraction:g} of {_size(inputs.memory.free)} "
            f"{inputs.memory.source}, over {inputs.workers_on_host} workers)"
        )
        blocks = max(0, limit - inputs.weights_bytes) // layout.span_bytes
        if inputs.capped:
            blocks = min(blocks, engine.pool_bytes_max // layout.span_bytes)
        # Too few are taken as the fewest, and then refused if these do not fit.
        blocks = max(blocks, MIN_BLOCKS)
    need = inputs.weights_bytes + blocks * layout.span_bytes
    holds = blocks * layout.block_size
    text = (
        f"weights {_size(inputs.weights_bytes)} + pool {blocks} blocks x "
        f"{_size(layout.span_bytes)} ({holds} tokens) = {_size(need)}, of {share}"
    )
    if need > limit:
        raise DoesNotFit(f"the model does not fit: {text}")
    return PoolSize(blocks, text, holds if holds < inputs.max_model_len else None)


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
