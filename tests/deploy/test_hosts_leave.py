"""Hosts that are told to leave: their workers move first, and no stream is cut off.

One cluster on three hosts loses one in order, keeps the last that writes answers, and lets it go as
soon as another one is there.
"""

from collections.abc import Iterator

import pytest

from tests.deploy.host_stories import (
    FEW,
    MANY,
    SETTINGS,
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
    with running("leave", "left", "right", "late") as made:
        made.wait(lambda: len(made.ready()) == 4, 60)
        yield made


@pytest.fixture(scope="module")
def calm(hosts: Hosts) -> Calm:
    return calm_answers(hosts, FEW, MANY)


def on(hosts: Hosts, name: str) -> set[str]:
    return {worker for worker, host in hosts.ready().items() if host == name}


def test_a_host_leaves_without_cutting_off_a_stream(hosts: Hosts, calm: Calm) -> None:
    (moved,) = on(hosts, "right")
    load = ask(hosts, MANY).streaming()
    done = hosts.leave("right", within_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("has left")
    streams = check(load, calm[MANY], "as a host leaves")
    assert moved in {stream.decode for stream in streams}, "nothing ran there"
    assert sum(stream.resumes for stream in streams) == 0
    assert hosts.pod("right").pids("raylet") == []
    assert hosts.workers().keys() - hosts.ready().keys() <= {moved}, "no place for it yet"
    check(ask(hosts, FEW), calm[FEW], "without it")


def test_the_last_that_writes_answers_stays_and_serves(hosts: Hosts, calm: Calm) -> None:
    """What reads prompts goes: others do that."""
    (last,) = {worker for worker in on(hosts, "late") if worker.startswith("decode")}
    done = hosts.leave("late", within_s=10)
    assert done.returncode == 1, done.stdout
    assert "workers still run here after 10 s" in done.stderr
    assert f"{last}: on a host that leaves, and nobody else could do their work" in hosts.log()
    assert on(hosts, "late") == {last}
    check(ask(hosts, FEW), calm[FEW], "on a host that is to leave")


def test_it_goes_once_another_one_writes_answers(hosts: Hosts, calm: Calm) -> None:
    hosts.rejoin("right")
    took = hosts.wait(lambda: not hosts.pod("late").pids("raylet"), START_S)
    print(f"the second host has left {took:.1f} s after the first one returned")
    assert any(worker.startswith("decode") for worker in on(hosts, "right"))
    check(ask(hosts, FEW), calm[FEW], "with the one that came back")
    hosts.rejoin("late")
    all_serve(hosts, calm, "with all hosts back")
    moves = [line for line in hosts.log().splitlines() if "on a host that leaves, moving" in line]
    assert len(moves) == 3, moves


def test_leaving_takes_a_head_and_a_host_of_its_own(hosts: Hosts) -> None:
    env = hosts.env("left")
    for options, status, why in (
        ("--address head", 2, "--address: 'head'; expected host:port"),
        ("--address head:6379 --within 0", 2, "--within: 0; expected more than 0"),
        ("--address head:6379 --host 10.9.9.9", 2, "'10.9.9.9' is none of this Ray's living hosts"),
        ("--address left:6379", 2, "cannot join this Ray"),
        (f"--address head:6379 --host {hosts.pod('head').address}", 2, "Ray's head runs there"),
        (f"--address head:6379 --host {hosts.pod('router').address}", 2, "pdserve up"),
    ):
        done = hosts.pod("left").run(f"exec pdserve leave {options}", env)
        assert done.returncode == status, done.stderr
        assert why in done.stderr
    stranger = env | {"RAY_AUTH_TOKEN": "00" * 32}
    done = hosts.pod("left").run("exec pdserve leave --address head:6379", stranger)
    assert done.returncode == 2, done.stderr
    assert "demands its token" in done.stderr
    assert hosts.ready().keys() == {"prefill-0", "prefill-1", "decode-0", "decode-1"}


def test_an_owner_that_was_killed_leaves_no_place_taken(hosts: Hosts, calm: Calm) -> None:
    """Every place is taken, so whatever the first one held the second one would wait for."""
    before = {one["pid"] for one in hosts.workers().values()}
    hosts.pod("router").end()
    hosts.up(*SETTINGS)
    hosts.wait(lambda: len(hosts.ready()) == 4, START_S)
    assert before.isdisjoint(one["pid"] for one in hosts.workers().values())
    all_serve(hosts, calm, "under a new owner")
