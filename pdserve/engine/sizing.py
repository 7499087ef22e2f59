"""How many KV blocks fit: the memory at hand is measured, the rest is arithmetic that is shown.

measure_memory(device) -> Memory          before the weights are loaded
size_pool(...) -> PoolSize                pure; DoesNotFit carries the same sum
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdserve.config import EngineConfig
from pdserve.engine.host_memory import Memory, measure_host
from pdserve.engine.layout import BlockLayout
from pdserve.errors import DoesNotFit

# A sequence holds the blocks of its prompt and one to write its answer into, so a single block
# could never serve anybody.
MIN_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class SizingInputs:
    """``memory`` was measured before any worker of the host loaded its weights; each takes an
    equal part. ``tier_bytes``: of that part, for other caches. ``capped``: engine.pool_bytes_max
    holds (CPU workers). ``weights_holders``: workers that hold one copy of the weights together,
    and take an equal part of it, too."""

    memory: Memory
    weights_bytes: int
    workers_on_host: int
    max_model_len: int
    capped: bool
    tier_bytes: int = 0
    weights_holders: int = 1


@dataclass(frozen=True, slots=True)
class PoolSize:
    blocks: int
    sum: str  # how it came about, for people
    # Set when sequences of the model's full length do not fit; the longest that do.
    longest: int | None


def measure_memory(device: torch.device, workers: int = 1) -> Memory:
    """``workers`` that share a device each take a part of all of it: what is free there depends on
    which of them have started, and one that comes back would find less than it had."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, f"on {device}") if workers > 1 else Memory(free, f"free on {device}")
    return measure_host()


def check_tiers(tier_bytes: int, host: Memory) -> None:
    """DoesNotFit when the tiers of a worker on a device do not fit into ``host``, as it is now.

    Their memory is page-locked, and so taken from the start. Workers that start at the same moment
    are not added up.
    """
    if tier_bytes > host.free:
        raise DoesNotFit(
            f"the cache tiers, {_size(tier_bytes)}, do not fit into {_size(host.free)} "
            f"{host.source}"
        )


def size_pool(
    inputs: SizingInputs, layout: BlockLayout, engine: EngineConfig, pool_blocks: int
) -> PoolSize:
    """Blocks of one worker's pool. ``pool_blocks``: a fixed number, 0 computes it.

    DoesNotFit when the fixed number, or MIN_BLOCKS of a computed one, does not fit.
    """
    weights = inputs.weights_bytes
    weights_text = f"weights {_size(weights)}"
    # A fixed pool has all of the memory as its limit, and the whole copy is in there.
    if inputs.weights_holders > 1 and not pool_blocks:
        weights = -(-weights // inputs.weights_holders)
        weights_text = f"1/{inputs.weights_holders} of {weights_text}"
    beside = weights + inputs.tier_bytes
    if pool_blocks:
        blocks, limit = pool_blocks, inputs.memory.free
        share = f"{_size(limit)} {inputs.memory.source}"
    else:
        limit = int(inputs.memory.free * engine.memory_fraction / inputs.workers_on_host)
        share = (
            f"{_size(limit)} ({engine.memory_fraction:g} of {_size(inputs.memory.free)} "
            f"{inputs.memory.source}, over {inputs.workers_on_host} workers)"
        )
        blocks = max(0, limit - beside) // layout.span_bytes
        if inputs.capped:
            blocks = min(blocks, engine.pool_bytes_max // layout.span_bytes)
        # Too few are taken as the fewest, and then refused if these do not fit.
        blocks = max(blocks, MIN_BLOCKS)
    need = beside + blocks * layout.span_bytes
    tiers = f" + cache tiers {_size(inputs.tier_bytes)}" if inputs.tier_bytes else ""
    holds = blocks * layout.block_size
    text = (
        f"{weights_text} + pool {blocks} blocks x "
        f"{_size(layout.span_bytes)} ({holds} tokens){tiers} = {_size(need)}, of {share}"
    )
    if need > limit:
        raise DoesNotFit(f"the model does not fit: {text}")
    return PoolSize(blocks, text, holds if holds < inputs.max_model_len else None)


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
