"""Three hosts and a fourth that joins: prefill on one, decode on another, KV over the link.

One cluster is started once and goes, in this order, through a route that swallows everything and a
host that joins under load. Its streams must be those of the fault-free cluster each time, in
bounded time, and every worker sound afterwards.
"""

import time
from collections.abc import Iterator

import pytest

from tests.deploy.hosts import Asked, Hosts, Stream
from tests.deploy.pods import can_isolate

pytestmark = [pytest.mark.deploy, pytest.mark.cluster, pytest.mark.timeout(300)]
SEED = "41"
TOKENS = 24
LONG = 300
# Detection (two seconds of silence, or a read's deadline of three), and the time to recompute.
GAP_S = 8.0
ENDED_S = 25.0
TIMERS = (
    "timers.heartbeat_s=0.3",
    "timers.dead_after_s=2",
    "timers.stuck_after_s=5",
    "timers.kill_after_s=10",
    "transfer.lease_s=3",
    "transfer.deadline_s=3",
    "transfer.setup_timeout_s=3",
)
OFFERS = {
    "head": {},
    "router": {},
    "left": {"prefill": 1},
    "right": {"decode": 1},
    "late": {"prefill": 1, "decode": 1},
    "tables": {},
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = can_isolate()
    if reason:
        pytest.skip(f"SKIPPED HOSTS IN NAMESPACES: {reason}")
    with Hosts(OFFERS, "hosts") as made:
        made.keep_tables("tables")
        made.join_head("tables")
        for host in ("left", "right"):
            made.join(host)
        pools = ("pools.prefill=2", "pools.decode=2", "pools.prefill_min=1", "pools.decode_min=1")
        made.up(*TIMERS, *pools)
        made.wait(lambda: "ready after" in made.log(), 120)
        yield made


@pytest.fixture(scope="module")
def calm(hosts: Hosts) -> dict[int, list[list[int]]]:
    """The fault-free tokens, by length; the first answers also show where they were made."""
    return {
        tokens: [stream.tokens for stream in hosts.ask(SEED, tokens=tokens).answers()]
        for tokens in (TOKENS, LONG)
    }


def show(what: str, streams: list[Stream]) -> None:
    print(
        f"{what}: longest {max(s.took_s for s in streams)} s, gap {max(s.gap_s for s in streams)} s"
        f", resumes {[s.resumes for s in streams]}, bytes {[s.moved for s in streams]}"
        f", pairs {[(s.prefill, s.decode) for s in streams]}"
    )


def check(asked: Asked, want: list[list[int]], what: str) -> list[Stream]:
    streams = asked.answers()
    show(what, streams)
    assert [stream.tokens for stream in streams] == want
    assert max(stream.gap_s for stream in streams) < GAP_S
    assert max(stream.took_s for stream in streams) < ENDED_S
    return streams


def test_kv_crosses_the_link(hosts: Hosts, calm: dict[int, list[list[int]]]) -> None:
    assert hosts.ready() == {"prefill-0": "left", "decode-0": "right"}, "the minimum suffices"
    for stream in check(hosts.ask(SEED, tokens=TOKENS), calm[TOKENS], "calm"):
        assert (stream.prefill, stream.decode) == ("prefill-0", "decode-0")
        assert stream.transport == "tcp"
        assert stream.moved > 0


def test_a_route_that_swallows_everything_costs_time_alone(
    hosts: Hosts, calm: dict[int, list[list[int]]]
) -> None:
    hosts.route("right", "add blackhole", "left")
    hosts.route("left", "add blackhole", "right")
    streams = check(hosts.ask(SEED, tokens=TOKENS), calm[TOKENS], "no route")
    assert all(stream.moved == 0 for stream in streams)
    streams = check(hosts.ask(SEED, tokens=TOKENS), calm[TOKENS], "still no route")
    hosts.route("right", "del blackhole", "left")
    hosts.route("left", "del blackhole", "right")
    hosts.check_idle(["left", "right"])

    def moves() -> bool:
        found = hosts.ask(SEED, tokens=TOKENS).answers()
        assert [stream.tokens for stream in found] == calm[TOKENS]
        return all(stream.moved > 0 for stream in found)

    print(f"KV moves again {hosts.wait(moves, 30):.1f} s after the route is back")
    assert hosts.ready() == {"prefill-0": "left", "decode-0": "right"}


def test_a_host_that_joins_under_load_gets_work(
    hosts: Hosts, calm: dict[int, list[list[int]]]
) -> None:
    hosts.join("late")
    began, load = time.monotonic(), hosts.ask(SEED, tokens=LONG)
    while len(hosts.ready()) < 4:
        check(load, calm[LONG], "while it joins")
        assert time.monotonic() - began < 60, hosts.workers()
        load = hosts.ask(SEED, tokens=LONG)
    print(f"both workers of the new host serve {time.monotonic() - began:.1f} s after its start")
    check(load, calm[LONG], "as it serves")
    late = {worker for worker, host in hosts.ready().items() if host == "late"}
    assert late == {"prefill-1", "decode-1"}
    streams = check(hosts.ask(SEED, tokens=TOKENS), calm[TOKENS], "with it")
    assert {"prefill-0", "prefill-1"} == {stream.prefill for stream in streams}
    assert {"decode-0", "decode-1"} == {stream.decode for stream in streams}
