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
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Memory:
    """What may still be taken; bytes. ``source`` says who set the limit."""

    free: int
    source: str


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
    group = available_cgroup(CGROUP)
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


def available_cgroup(root: Path) -> int | None:
    """Bytes left under the control group's limit (version 2 or 1); None without a limit."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (root / limit_file).read_text(encoding="ascii").strip()
            used = int((root / used_file).read_text(encoding="ascii"))
        except FileNotFoundError:
            continue
        # Version 1 writes "no limit" as a number near 2**63.
        if limit == "max" or int(limit) >= 2**60:
            return None
        return max(0, int(limit) - used)
    return None


def size_pool(
    memory: Memory,
    weights_bytes: int,
    layout: BlockLayout,
    engine: EngineConfig,
    *,
    pool_blocks: int,
    workers_on_host: int,
    max_model_len: int,
    capped: bool,
) -> PoolSize:
    """Blocks of one worker's pool.

    ``memory`` was measured before any worker of the host loaded its weights; each takes an equal
    part. ``pool_blocks``: a fixed number, 0 computes it. ``capped``: engine.pool_bytes_max holds
    (CPU workers). DoesNotFit when not even MIN_BLOCKS fit.
    """
    part = int(memory.free * engine.memory_fraction / workers_on_host)
    room = part - weights_bytes
    fitting = max(0, room) // layout.span_bytes
    if pool_blocks:
        blocks = pool_blocks
        fits = weights_bytes + blocks * layout.span_bytes <= memory.free
    else:
        blocks = fitting
        if capped:
            # Never below what one sequence needs, however small the cap.
            blocks = min(blocks, max(MIN_BLOCKS, engine.pool_bytes_max // layout.span_bytes))
        fits = blocks >= MIN_BLOCKS
    text = _sum_text(
        memory, weights_bytes, layout, blocks if fits else max(blocks, MIN_BLOCKS), part,
        workers_on_host if not pool_blocks else 0, engine.memory_fraction,
    )  # fmt: skip
    if not fits:
        raise DoesNotFit(f"the model does not fit: {text}")
    holds = blocks * layout.block_size
    return PoolSize(blocks, text, holds if holds < max_model_len else None)


def _sum_text(
    memory: Memory,
    weights_bytes: int,
    layout: BlockLayout,
    blocks: int,
    part: int,
    workers: int,
    fraction: float,
) -> str:
    """``workers`` 0: the number of blocks was given, so no share was computed."""
    need = weights_bytes + blocks * layout.span_bytes
    limit = (
        f"{_size(part)} = {fraction:g} of {_size(memory.free)} {memory.source} / {workers} workers"
        if workers
        else f"{_size(memory.free)} {memory.source}"
    )
    return (
        f"weights {_size(weights_bytes)} + pool {blocks} blocks x {_size(layout.span_bytes)} "
        f"({blocks * layout.block_size} tokens) = {_size(need)}, of {limit}"
    )


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
