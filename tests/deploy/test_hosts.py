"""Three hosts and a fourth that joins: prefill on one, decode on another, KV over the link.

One cluster goes, in this order, through a route that swallows everything, a host that joins under
load, and a link that is down for a while.
"""

import time
from collections.abc import Iterator

import pytest

from tests.deploy.host_stories import (
    FEW,
    MANY,
    SOME,
    START_S,
    Calm,
    all_serve,
    ask,
    calm_answers,
    check,
    running,
)
from tests.deploy.hosts import Hosts

pytestmark = [pytest.mark.deploy, pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with running("hosts", "left", "right") as made:
        yield made


@pytest.fixture(scope="module")
def calm(hosts: Hosts) -> Calm:
    return calm_answers(hosts, FEW, SOME, MANY)


def test_kv_crosses_the_link(hosts: Hosts, calm: Calm) -> None:
    assert hosts.ready() == {"prefill-0": "left", "decode-0": "right"}, "the minimum suffices"
    for stream in check(ask(hosts, FEW), calm[FEW], "calm"):
        assert (stream.prefill, stream.decode) == ("prefill-0", "decode-0")
        assert stream.transport == "tcp"
        assert stream.moved > 0


def test_a_route_that_swallows_everything_costs_time_alone(hosts: Hosts, calm: Calm) -> None:
    hosts.route("right", "add blackhole", "left")
    hosts.route("left", "add blackhole", "right")
    streams = check(ask(hosts, FEW), calm[FEW], "no route")
    assert all(stream.moved == 0 for stream in streams)
    streams = check(ask(hosts, FEW), calm[FEW], "still no route")
    hosts.route("right", "del blackhole", "left")
    hosts.route("left", "del blackhole", "right")
    hosts.check_idle(["left", "right"])

    def moves() -> bool:
        found = ask(hosts, FEW).answers()
        assert [stream.tokens for stream in found] == calm[FEW]
        return all(stream.moved > 0 for stream in found)

    print(f"KV moves again {hosts.wait(moves, 30):.1f} s after the route is back")
    assert hosts.ready() == {"prefill-0": "left", "decode-0": "right"}


def test_a_host_that_joins_under_load_gets_work(hosts: Hosts, calm: Calm) -> None:
    hosts.join("late")
    began, load = time.monotonic(), ask(hosts, SOME)
    while len(hosts.ready()) < 4:
        check(load, calm[SOME], "while it joins")
        assert time.monotonic() - began < START_S, hosts.workers()
        load = ask(hosts, SOME)
    print(f"both workers of the new host serve {time.monotonic() - began:.1f} s after its start")
    check(load, calm[SOME], "as it serves")
    late = {worker for worker, host in hosts.ready().items() if host == "late"}
    assert late == {"prefill-1", "decode-1"}
    streams = check(ask(hosts, FEW), calm[FEW], "with it")
    assert {"prefill-0", "prefill-1"} == {stream.prefill for stream in streams}
    assert {"decode-0", "decode-1"} == {stream.decode for stream in streams}


def test_a_link_that_is_down_for_a_while_loses_no_worker(hosts: Hosts, calm: Calm) -> None:
    """Longer than the router waits for a worker, shorter than Ray waits for a host."""
    before = {worker: one["pid"] for worker, one in hosts.workers().items()}
    load = ask(hosts, MANY).streaming()
    hosts.link("right", "down")
    took = hosts.wait(lambda: "decode-0" not in hosts.ready(), 5)
    print(f"found out after {took:.1f} s")
    streams = check(load, calm[MANY], "while its link was down")
    assert {stream.decode for stream in streams} == {"decode-1"}
    assert sum(stream.resumes for stream in streams) > 0, "nothing was cut off"
    hosts.link("right", "up")
    all_serve(hosts, calm, "after a short cut")
    assert before == {worker: one["pid"] for worker, one in hosts.workers().items()}
