"""Whether a quiet cluster has given everything back: blocks, sockets, threads, shared memory.

    calm -measure-> baseline ... load, faults ... quiet -look, until all is back or time up-> said

Blocks are exact: free + cached = total on every worker, and no invariant broken. Of a process, its
open files by kind, its threads and the shared pools that it maps are compared with the most that
any process of its role had when the cluster was calm and every pair of workers had met. The threads
that read KV are a pool, which grows with load and never shrinks: of them no more than its size.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from decode_worker.reads import READ_THREADS, READING
from pdserve.v1 import worker_pb2 as pb
from tests.e2e.clusters import Running

POLL_S = 0.1
# Libraries open one now and then: a DNS or control connection, a thread of a pool that grows.
ALLOWED = {"threads": 6, "socket": 6, "pipe": 2, "anon": 4, "file": 4, "memfd": 0, "mapped": 0}

Resources = Mapping[str, int]
Baseline = Mapping[str, Resources]


@dataclass(frozen=True)
class Leftovers:
    """After a phase: how long it took until nothing was left, or what still was."""

    seconds: float
    left: tuple[str, ...]


def processes(running: Running) -> dict[str, int]:
    """Pids by name: the workers and the router."""
    named = {str(facts.id): facts.pid for facts in running.cluster.workers()}
    return {**named, "router": running.cluster.router_pid}


def resources(pid: int) -> Resources:
    found: Counter[str] = Counter()
    folder = Path(f"/proc/{pid}")
    for name in _threads(folder):
        found[READING if name == READING else "threads"] += 1
    for fd in (folder / "fd").iterdir():
        try:
            found[_kind(os.readlink(fd))] += 1
        except FileNotFoundError:
            continue
    maps = (folder / "maps").read_text().splitlines()
    found["mapped"] = len({line.split()[4] for line in maps if "memfd:" in line})
    return found


def _threads(folder: Path) -> Iterator[str]:
    for task in (folder / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield (task / "comm").read_text().strip()


def _kind(target: str) -> str:
    for name in ("socket", "pipe"):
        if target.startswith(f"{name}:"):
            return name
    if "memfd:" in target:
        return "memfd"
    return "anon" if target.startswith("anon_inode:") else "file"


def role_of(name: str) -> str:
    return name.rsplit("-", 1)[0]


def measure(running: Running) -> Baseline:
    """The most that a process of each role has now."""
    most: dict[str, Counter[str]] = {}
    for name, pid in processes(running).items():
        role = most.setdefault(role_of(name), Counter())
        most[role_of(name)] = role | Counter(resources(pid))
    prefills = sum(role_of(name) == "prefill" for name in processes(running))
    return {role: _all_met(found, prefills) for role, found in most.items()}


def _all_met(calm: Counter[str], prefills: int) -> Counter[str]:
    """Placement may not have paired everybody yet: a decode worker over shared memory keeps its own
    pool mapped and that of each live prefill worker that it met, with a descriptor each."""
    met = calm["mapped"] - 1
    if not 0 < met < prefills:
        return calm
    unmet = prefills - met
    return calm + Counter(mapped=unmet, memfd=unmet)


def look(running: Running, baseline: Baseline) -> list[str]:
    """What is left; empty when all was given back."""
    left: list[str] = []
    for facts in running.cluster.workers():
        try:
            check = running.on_worker(facts, lambda stub: stub.CheckIdle(pb.CheckIdleRequest()))
        except grpc.RpcError as error:
            left.append(f"{facts.id}: {error.code().name}")
            continue
        left += [f"{facts.id}: {violation}" for violation in check.violations]
        if not check.idle:
            left.append(f"{facts.id} is not idle")
        if check.blocks_free + check.blocks_cached != check.blocks_total:
            left.append(
                f"{facts.id}: {check.blocks_free} free + {check.blocks_cached} cached blocks "
                f"of {check.blocks_total}"
            )
    for name, pid in processes(running).items():
        now, calm = resources(pid), baseline[role_of(name)]
        if now.get(READING, 0) > READ_THREADS:
            left.append(f"{name}: {now[READING]} threads read KV, of at most {READ_THREADS}")
        left += [
            f"{name}: {kind} {now.get(kind, 0)}, calm {calm.get(kind, 0)}"
            for kind, more in ALLOWED.items()
            if now.get(kind, 0) > calm.get(kind, 0) + more
        ]
        if now.get("threads", 0) > calm.get("threads", 0) + ALLOWED["threads"]:
            named = Counter(_threads(Path(f"/proc/{pid}")))
            left.append(f"{name}: its threads are {dict(named.most_common())}")
    return left


def settle(running: Running, baseline: Baseline, within_s: float) -> Leftovers:
    """Looks until nothing is left, for one lease and 5 s at most."""
    began = time.monotonic()
    while True:
        left = look(running, baseline)
        took = time.monotonic() - began
        if not left or took > within_s:
            return Leftovers(took, tuple(left))
        time.sleep(POLL_S)
