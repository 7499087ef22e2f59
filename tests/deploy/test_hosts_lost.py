"""Hosts that are lost: cut off for long, without their raylet, and the head itself.

Streams end as on the sound cluster, and whoever comes back serves again. What Ray ends on a host it
does not start again: that is its supervisor's part, which the stories play.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.host_stories import (
    FEW,
    MANY,
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
# Ray gives a host up after eight seconds of silence.
GIVEN_UP_S = 12.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with running("lost", "left", "right", "late") as made:
        made.wait(lambda: len(made.ready()) == 4, 60)
        yield made


@pytest.fixture(scope="module")
def calm(hosts: Hosts) -> Calm:
    return calm_answers(hosts, FEW, MANY)


def decode_on(hosts: Hosts, name: str) -> str:
    (found,) = [w for w, host in hosts.ready().items() if host == name and w.startswith("decode")]
    return found


def test_a_worker_that_dies_after_the_loss_of_the_head_comes_back(hosts: Hosts, calm: Calm) -> None:
    load = ask(hosts, MANY).streaming()
    hosts.pod("head").end()
    check(load, calm[MANY], "without a head")
    hosts.join_head("tables")
    check(ask(hosts, FEW), calm[FEW], "with a new head")
    victim = decode_on(hosts, "late")
    pid = hosts.workers()[victim]["pid"]
    hosts.pod("late").kill(pid)
    took = hosts.wait(lambda: hosts.workers()[victim]["pid"] != pid, START_S)
    print(f"{victim} is there again {took:.1f} s later")
    all_serve(hosts, calm, "after the head's return")


def test_a_host_that_loses_its_raylet_loses_its_workers_alone(hosts: Hosts, calm: Calm) -> None:
    victim = decode_on(hosts, "right")
    load = ask(hosts, MANY).streaming()
    hosts.kill_raylet("right")
    streams = check(load, calm[MANY], "as it lost its raylet")
    assert sum(stream.resumes for stream in streams) > 0, "its workers lived on"
    assert hosts.workers().keys() - hosts.ready().keys() == {victim}, "the pool is short of it"
    check(ask(hosts, FEW), calm[FEW], "without it")
    hosts.rejoin("right")
    all_serve(hosts, calm, "after the raylet's end")


def test_a_host_that_was_given_up_serves_again_when_it_returns(hosts: Hosts, calm: Calm) -> None:
    """Ray ends what it gave up; the host's own supervisor starts it again."""
    victim = decode_on(hosts, "right")
    pid = hosts.workers()[victim]["pid"]
    load = ask(hosts, MANY).streaming()
    hosts.link("right", "down")
    check(load, calm[MANY], "while it is cut off")
    time.sleep(GIVEN_UP_S)
    check(ask(hosts, FEW), calm[FEW], "without it")
    hosts.link("right", "up")
    took = hosts.wait(lambda: not hosts.pod("right").pids("raylet"), 30)
    print(f"its raylet ended {took:.1f} s after the link was back")
    hosts.rejoin("right")
    all_serve(hosts, calm, "after a long cut")
    assert hosts.workers()[victim]["pid"] != pid


def test_the_raylet_beside_the_router_takes_it_along_after_its_streams(
    hosts: Hosts, calm: Calm
) -> None:
    load = ask(hosts, MANY).streaming()
    hosts.kill_raylet("router")
    check(load, calm[MANY], "as the router's host lost its raylet")
    assert hosts.end(60) == 1
    last = hosts.log().rstrip().splitlines()[-1]
    assert "Ray's raylet on this host ended, and the cluster with it" in last
    kept = [pid for host in ("left", "right", "late") for pid in hosts.pod(host).pids()]
    assert not [pid for pid in kept if "WorkerActor" in title(pid)], "workers were left behind"


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except FileNotFoundError:
        return ""
