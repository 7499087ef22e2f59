"""What stories of a cluster on several hosts have in common: offers, timers, loads and their check.

Every load is a fixed set of prompts, whose answers on the sound cluster are kept; whatever happens
to a host, the same load must be answered with the same tokens, in bounded time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.deploy.hosts import Asked, Hosts, Stream
from tests.deploy.pods import can_isolate

SEED = "41"
# Streams at once, and the tokens of each.
Load = tuple[int, int]
Calm = dict[Load, list[list[int]]]
FEW: Load = (6, 24)
SOME: Load = (2, 300)
# Seconds of work for two decode workers.
MANY: Load = (32, 380)
# Detection (two seconds of silence, or a read's deadline of three), and the time to recompute.
GAP_S = 8.0
ENDED_S = 25.0
# A worker's start, with all others at work on the same two cores.
START_S = 90.0
SETTINGS = (
    "timers.heartbeat_s=0.3",
    "timers.dead_after_s=2",
    "timers.stuck_after_s=5",
    "timers.kill_after_s=10",
    "transfer.lease_s=3",
    "transfer.deadline_s=3",
    "transfer.setup_timeout_s=3",
    "pools.prefill=2",
    "pools.decode=2",
    "pools.prefill_min=1",
    "pools.decode_min=1",
)
OFFERS = {
    "head": {},
    "router": {},
    "left": {"prefill": 1},
    "right": {"decode": 1},
    "late": {"prefill": 1, "decode": 1},
    "tables": {},
}


@contextmanager
def running(name: str, *serving: str) -> Iterator[Hosts]:
    """A cluster that has said that it is ready; these hosts offer room from the start."""
    reason = can_isolate()
    if reason:
        pytest.skip(f"SKIPPED HOSTS IN NAMESPACES: {reason}")
    with Hosts(OFFERS, name) as made:
        made.keep_tables("tables")
        made.join_head("tables")
        for host in serving:
            made.join(host)
        made.up(*SETTINGS)
        made.wait(lambda: "ready after" in made.log(), 120)
        yield made


def calm_answers(hosts: Hosts, *loads: Load) -> Calm:
    """The fault-free tokens."""
    return {load: [stream.tokens for stream in ask(hosts, load).answers()] for load in loads}


def ask(hosts: Hosts, load: Load) -> Asked:
    count, tokens = load
    return hosts.ask(SEED, count, tokens)


def show(what: str, streams: list[Stream]) -> None:
    print(
        f"{what}: longest {max(s.took_s for s in streams)} s, gap {max(s.gap_s for s in streams)} s"
        f", resumes {sum(s.resumes for s in streams)}, bytes {sum(s.moved for s in streams)}"
        f", pairs {dict(Counter((s.prefill, s.decode) for s in streams))}"
    )


def check(asked: Asked, want: list[list[int]], what: str) -> list[Stream]:
    streams = asked.answers()
    show(what, streams)
    assert [stream.tokens for stream in streams] == want
    assert max(stream.gap_s for stream in streams) < GAP_S
    assert max(stream.took_s for stream in streams) < ENDED_S
    return streams


def all_serve(hosts: Hosts, calm: Calm, what: str) -> None:
    """All four workers come back, take work, and are sound."""
    took = hosts.wait(lambda: len(hosts.ready()) == 4, START_S)
    print(f"{what}: all four serve {took:.1f} s later")
    streams = check(ask(hosts, FEW), calm[FEW], what)
    assert {stream.decode for stream in streams} == {"decode-0", "decode-1"}
    hosts.check_idle(["left", "right", "late"])
