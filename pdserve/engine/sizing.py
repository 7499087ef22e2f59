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
