"""The pool's size is arithmetic over what was measured, and the sum is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pdserve.config import EngineConfig
from pdserve.engine.host_memory import Memory, available_cgroup, available_host
from pdserve.engine.layout import LayerShape, block_layout
from pdserve.engine.sizing import (
    MIN_BLOCKS,
    SizingInputs,
    check_tiers,
    measure_memory,
    size_pool,
)
from pdserve.errors import DoesNotFit

# SmolLM2's: 30 layers of 3 heads of 64; 16 tokens are 368,640 bytes in bfloat16.
LAYOUT = block_layout(16, "bfloat16", (LayerShape(3, 64, 64),) * 30)
BLOCK = 368_640
ENGINE = EngineConfig(memory_fraction=0.5, pool_bytes_max=2**40)
INPUTS = SizingInputs(
    memory=Memory(10**9, "available on the host"),
    weights_bytes=100 * 10**6,
    workers_on_host=2,
    max_model_len=2048,
    capped=True,
)


def test_a_worker_takes_its_share_less_its_weights() -> None:
    assert LAYOUT.span_bytes == BLOCK
    size = size_pool(INPUTS, LAYOUT, ENGINE, 0)
    assert size.blocks == (10**9 // 4 - 100 * 10**6) // BLOCK == 406
    assert size.longest is None
    assert size.sum == (
        "weights 100 MB + pool 406 blocks x 369 kB (6496 tokens) = 250 MB, "
        "of 250 MB (0.5 of 1 GB available on the host, over 2 workers)"
    )


def test_cache_tiers_are_part_of_the_share() -> None:
    tiers = dataclasses.replace(INPUTS, tier_bytes=50 * 10**6)
    size = size_pool(tiers, LAYOUT, ENGINE, 0)
    assert size.blocks == (10**9 // 4 - 150 * 10**6) // BLOCK == 271
    assert "+ cache tiers 50 MB = 250 MB, of 250 MB" in size.sum
    full = dataclasses.replace(INPUTS, tier_bytes=150 * 10**6)
    with pytest.raises(DoesNotFit, match="cache tiers 150 MB"):
        size_pool(full, LAYOUT, ENGINE, 0)
    fixed = (10**9 - 150 * 10**6) // BLOCK
    assert size_pool(tiers, LAYOUT, ENGINE, fixed).blocks == fixed
    with pytest.raises(DoesNotFit):
        size_pool(tiers, LAYOUT, ENGINE, fixed + 1)


def test_page_locked_tiers_have_to_fit_the_host() -> None:
    host = Memory(10**9, "available on the host")
    check_tiers(10**9, host)
    with pytest.raises(DoesNotFit, match="the cache tiers, 1 GB, do not fit into 1 GB available"):
        check_tiers(10**9 + 1, host)


def test_workers_that_share_a_device_take_their_parts_of_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    device = torch.device("cuda:0")
    assert measure_memory(device) == Memory(30 * 10**9, "free on cuda:0")
    assert measure_memory(device, 2) == Memory(80 * 10**9, "on cuda:0")


def test_the_cap_holds_on_cpu_alone() -> None:
    engine = dataclasses.replace(ENGINE, pool_bytes_max=100 * BLOCK)
    assert size_pool(INPUTS, LAYOUT, engine, 0).blocks == 100
    uncapped = dataclasses.replace(INPUTS, capped=False)
    assert size_pool(uncapped, LAYOUT, engine, 0).blocks == 406


def test_one_copy_of_the_weights_is_paid_for_once() -> None:
    """A model that fits once, but not twice, is served by two workers that map one copy."""
    twice = dataclasses.replace(INPUTS, weights_bytes=300 * 10**6)
    with pytest.raises(DoesNotFit):
        size_pool(twice, LAYOUT, ENGINE, 0)
    once = dataclasses.replace(twice, weights_holders=2)
    size = size_pool(once, LAYOUT, ENGINE, 0)
    assert size.blocks == (10**9 // 4 - 150 * 10**6) // BLOCK == 271
    assert size.sum.startswith("1/2 of weights 300 MB + pool 271 blocks x 369 kB (4336 tokens) = ")
    # All workers together stay within what they were given.
    assert 300 * 10**6 + 2 * size.blocks * BLOCK <= 10**9 // 2
    fixed = (10**9 - 300 * 10**6) // BLOCK
    assert size_pool(once, LAYOUT, ENGINE, fixed).blocks == fixed
    with pytest.raises(DoesNotFit, match="weights 300 MB"):
        size_pool(once, LAYOUT, ENGINE, fixed + 1)


def test_a_fixed_number_is_taken_or_refused() -> None:
    size = size_pool(INPUTS, LAYOUT, ENGINE, 7)
    assert (size.blocks, size.longest) == (7, 112)
    assert size_pool(INPUTS, LAYOUT, ENGINE, 1).blocks == 1
    with pytest.raises(DoesNotFit, match=r"pool 3000 blocks x 369 kB .* = 1.21 GB, of 1 GB"):
        size_pool(INPUTS, LAYOUT, ENGINE, 3000)


def test_a_model_that_does_not_fit_is_refused_with_the_sum() -> None:
    heavy = dataclasses.replace(INPUTS, weights_bytes=250 * 10**6)
    with pytest.raises(DoesNotFit, match=r"weights 250 MB \+ pool 2 blocks .* of 250 MB"):
        size_pool(heavy, LAYOUT, ENGINE, 0)
    # The border: exactly the smallest pool.
    border = dataclasses.replace(INPUTS, weights_bytes=250 * 10**6 - MIN_BLOCKS * BLOCK)
    assert size_pool(border, LAYOUT, ENGINE, 0).blocks == MIN_BLOCKS
    below = dataclasses.replace(border, weights_bytes=border.weights_bytes + 1)
    with pytest.raises(DoesNotFit):
        size_pool(below, LAYOUT, ENGINE, 0)


def test_a_pool_below_the_context_says_how_much_it_holds() -> None:
    longer = dataclasses.replace(INPUTS, max_model_len=8192)
    assert size_pool(longer, LAYOUT, ENGINE, 0).longest == 406 * 16


def test_meminfo_is_read() -> None:
    assert available_host("MemTotal: 9 kB\nMemAvailable:    1234 kB\n") == 1234 * 1024
    with pytest.raises(DoesNotFit):
        available_host("MemTotal: 9 kB\n")


def group(folder: Path, limit: str, used: int, cache: int = 0, old: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit_file, used_file = names if old else ("memory.max", "memory.current")
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 3\ninactive_file {cache}\n")


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    own = "0::/user/pdserve\n"
    assert available_cgroup(tmp_path, own) is None
    group(tmp_path / "user/pdserve", "max", 100)
    assert available_cgroup(tmp_path, own) is None
    group(tmp_path / "user/pdserve", "150", 100)
    assert available_cgroup(tmp_path, own) == 50
    group(tmp_path / "user/pdserve", "150", 100, cache=30)
    assert available_cgroup(tmp_path, own) == 80
    group(tmp_path / "user", "170", 160)
    assert available_cgroup(tmp_path, own) == 10
    group(tmp_path / "user", "170", 171)
    assert available_cgroup(tmp_path, own) == 0
    # In a container the group's path is not visible; its limits lie at the root.
    assert available_cgroup(tmp_path, "0::/../elsewhere\n") is None
    group(tmp_path, "99", 9)
    assert available_cgroup(tmp_path, "0::/\n") == 90


def test_old_control_groups_count_too(tmp_path: Path) -> None:
    own = "9:memory:/job\n3:cpu,cpuacct:/job\n"
    group(tmp_path / "memory", "9223372036854771712", 5, old=True)
    assert available_cgroup(tmp_path, own) is None
    group(tmp_path / "memory/job", "50", 5, old=True)
    assert available_cgroup(tmp_path, own) == 45


def test_this_machine_has_memory() -> None:
    memory = measure_memory(torch.device("cpu"))
    print(memory)
    assert 2**20 < memory.free < 2**50
