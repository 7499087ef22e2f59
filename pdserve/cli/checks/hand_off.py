"""Real KV blocks between two real processes, by every transport that the configuration allows.

What it runs is ``python -m kv_transfer.trial``; the shared package imports none of the rooms.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pdserve.cli.checks.check import Check
from pdserve.config import Config
from pdserve.types import Transport

_TIMEOUT_S = 120.0
_HOST_ONLY = (Transport.SHM.value, Transport.TCP.value)


def hand_offs(config: Config) -> Iterator[Check]:
    """One line for each transport, and one for NCCL where GPUs are used."""
    on_gpus = config.pools.gpus_per_worker > 0
    names = [one for one in config.transfer.transports if on_gpus or one in _HOST_ONLY]
    if not names:
        text = f"transfer.transports = {list(config.transfer.transports)} moves nothing on a CPU"
        yield Check("hand-off", False, text, remedy="allow shm or tcp")
        return
    found, problem = _try(names, "cuda" if on_gpus else "cpu")
    if found is None:
        yield Check("hand-off", False, problem, remedy="see packages and shared memory above")
        return
    if on_gpus:
        yield _nccl(int(found["nccl"]), "nccl" in names)
    moved = any(one["outcome"] == "moved" for one in found["moves"])
    for one in found["moves"]:
        yield _check(one, moved)


def _try(names: list[str], device: str) -> tuple[dict[str, Any] | None, str]:
    options = ["--transports", ",".join(names), "--device", device]
    command = [sys.executable, "-m", "kv_transfer.trial", *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"two processes moved nothing in {_TIMEOUT_S:g} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return None, f"two processes could not be tried: {last}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found, ""


def _check(one: dict[str, Any], some_moved: bool) -> Check:
    name, outcome = f"KV by {one['transport']}", one["outcome"]
    if outcome == "moved":
        return Check(name, True, one["text"])
    # What another transport does instead is no fault of the machine.
    fatal = outcome == "failed" or not some_moved
    advice = f"take {one['transport']} out of transfer.transports, or repair what is named"
    return Check(name, False, one["text"], fatal=fatal, remedy=advice)


def _nccl(version: int, wanted: bool) -> Check:
    if not version:
        advice = "pip install '.[gpu]' in the checkout"
        return Check("nccl", not wanted, "no NCCL library is here", fatal=False, remedy=advice)
    return Check("nccl", True, f"NCCL {version // 10000}.{version // 100 % 100}.{version % 100}")
