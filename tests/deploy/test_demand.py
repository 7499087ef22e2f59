"""A pool below its size for want of a node: Ray's autoscaler hears of it, and so does an operator.

Two hosts with one place for each role, and a pool of two decode workers. Nobody adds a node here
(that is a cloud's or KubeRay's part), so the test is the autoscaler: it reads the demand where the
autoscaler reads it, adds a host, and the demand is gone.
"""

import re
from collections.abc import Iterator

import pytest

from tests.deploy.hosts import Hosts
from tests.deploy.pods import can_isolate

pytestmark = [pytest.mark.deploy, pytest.mark.cluster, pytest.mark.timeout(240)]
OFFERS = {
    "head": {},
    "router": {},
    "both": {"prefill": 1, "decode": 1},
    "late": {"decode": 1},
}
SAID = "decode-1 has not joined: it starts, or no node has room for it (ray status)"
# As the autoscaler is asked: by the Ray process that holds the demand, without one of our parts.
ASK = (
    "from ray.autoscaler.v2.sdk import get_cluster_status as ask; "
    "found = ask('head:6379').resource_demands; "
    "print('demand', [(dict(b.bundle), b.count) for d in found.placement_group_demand "
    "for b in d.bundles_by_count])"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = can_isolate()
    if reason:
        pytest.skip(f"SKIPPED HOSTS IN NAMESPACES: {reason}")
    with Hosts(OFFERS, "demand") as made:
        made.join("head")
        made.await_port("head", 6379)
        made.join("both")
        made.up("pools.prefill=1", "pools.decode=2", "pools.decode_min=1", "admin.port=6001")
        made.wait(lambda: "ready after" in made.log(), 120)
        yield made


def demand(hosts: Hosts) -> str:
    done = hosts.pod("head").run(f'python -c "{ASK}"', hosts.env("head"), timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("demand ")]
    return line


def ray_status(hosts: Hosts) -> str:
    done = hosts.pod("head").run("ray status --address=head:6379", hosts.env("head"), timeout=60)
    return done.stdout + done.stderr


def status(hosts: Hosts) -> list[str]:
    """``pdserve status``, on the host of the router."""
    command = "pdserve status --once --url http://router:8000"
    done = hosts.pod("router").run(command, hosts.env("router"), timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_worker_without_a_place_is_demand_and_is_told(hosts: Hosts) -> None:
    assert hosts.ready() == {"prefill-0": "both", "decode-0": "both"}
    assert re.search(r"\{[^}]*'decode': 1.0[^}]*\}, 1\)", demand(hosts))
    hosts.wait(lambda: "'decode': 1.0" in ray_status(hosts), 30)
    assert SAID in status(hosts)


def test_a_node_that_comes_takes_the_worker_and_the_demand_is_gone(hosts: Hosts) -> None:
    hosts.join("late")
    hosts.wait(lambda: hosts.ready().get("decode-1") == "late", 90)
    assert demand(hosts) == "demand []"
    assert SAID not in status(hosts)
