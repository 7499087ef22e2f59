"""Actors in a Ray of our own: described, restarted, frozen, refused; and none is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread, current_thread
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pdserve.cluster import orphans, ray_node
from pdserve.cluster.supervisor import Secrets, open_cluster
from pdserve.config import Config, PoolsConfig
from pdserve.errors import ConfigError, InternalError
from pdserve.types import Role, WorkerId
from pdserve.v1 import worker_pb2
from tests.cluster.stands import (
    RecordingRouter,
    Renewals,
    Scripted,
    Stand,
    eventually,
    facts_of,
)

# pdserve.cluster.pools and membership import Ray, which must see the environment of its start.


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_node.RayNode]:
    state = tmp_path_factory.mktemp("state")
    short = Path(f"/tmp/pds-test-{os.getpid()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find fake_role
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 4}')  # numbers alone: Ray counts them
        node = ray_node.start_ray("local", short / "ray", orphans.mark_value(state, "r"), threads=3)
    assert orphans.MARK not in os.environ
    assert node.owned
    yield node
    assert len(orphans.find_marked(state)) > 3  # Ray's own processes carry the mark
    node.stop()
    orphans.sweep(state, grace_s=5)
    assert orphans.find_marked(state) == ()
    shutil.rmtree(short)


@pytest.fixture
def stand(node: ray_node.RayNode, tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    made: list[Stand] = []

    def make(gpus: float = 0.0, **pools: Any) -> Stand:
        made.append(Stand(node, tmp_path, PoolsConfig(**pools), gpus))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_actors_are_described_to_the_router_and_stopped(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    one = stand(prefill=2, decode=1, mixed=1)
    assert one.all_present()
    ids = ["prefill-0", "prefill-1", "decode-0", "mixed-0"]
    assert [str(facts.id) for facts in one.membership.workers()] == ids
    assert list(one.router.told) == ids
    assert len({one.pid(worker) for worker in ids}) == 4
    roles = [worker.role for worker in one.router.pushes[-1]]
    assert roles == [
        worker_pb2.WORKER_ROLE_PREFILL,
        worker_pb2.WORKER_ROLE_PREFILL,
        worker_pb2.WORKER_ROLE_DECODE,
        worker_pb2.WORKER_ROLE_MIXED,
    ]
    assert orphans.mark_of(one.pid("decode-0")) == one.node.mark
    assert "started decode-0 threads 3" in (tmp_path / "decode-0.log").read_text()
    one.membership.stop()
    one.pools.stop([facts.id for facts in one.membership.workers()], 0.5, 5.0)
    assert "stopped decode-0 0.5" in (tmp_path / "decode-0.log").read_text()


def test_a_killed_worker_comes_back_as_another_incarnation(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    one = stand(prefill=1, decode=1)
    assert one.all_present()
    before = dict(one.router.told)
    os.kill(one.pid("decode-0"), signal.SIGKILL)
    eventually(lambda: "decode-0" not in one.router.told)
    assert one.router.told == {"prefill-0": before["prefill-0"]}
    eventually(lambda: "decode-0" in one.router.told)
    assert one.router.told["decode-0"] != before["decode-0"]
    assert one.router.told["prefill-0"] == before["prefill-0"]
    assert one.notes[0] == "decode-0 died"
    assert one.notes[1].startswith("decode-0 serves again")
    assert one.membership.seen[WorkerId("decode-0")].deaths == 1
    # It is told the memory that the host had when the cluster started, not what is left now.
    told = (tmp_path / "decode-0.log").read_text().splitlines()
    first, again = [line for line in told if line.startswith("memory ")]
    assert first == again != "memory None"


def test_a_frozen_worker_holds_up_nobody_and_can_be_killed(stand: Callable[..., Stand]) -> None:
    one = stand(prefill=1, decode=1)
    assert one.all_present()
    frozen, told = one.pid("decode-0"), dict(one.router.told)
    os.kill(frozen, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        assert one.router.told == told  # judging it is the router's part
        os.kill(one.pid("prefill-0"), signal.SIGKILL)
        eventually(lambda: one.router.told.get("prefill-0", told["prefill-0"]) != told["prefill-0"])
        assert one.router.told["decode-0"] == told["decode-0"]
    finally:
        assert orphans.kill_pid(frozen, one.node.mark)
    eventually(lambda: one.router.told.get("decode-0", told["decode-0"]) != told["decode-0"])


def test_a_worker_that_was_cut_off_for_a_moment_is_told_gone_to_nobody(
    stand: Callable[..., Stand],
) -> None:
    """Its connection to the owner breaks while a question waits; Ray calls it unavailable."""
    one = stand(prefill=1, decode=1)
    assert one.all_present()
    worker, told, pushed = WorkerId("decode-0"), dict(one.router.told), len(one.router.pushes)
    pid, port = one.pid("decode-0"), port_of(one, worker)
    os.kill(pid, signal.SIGSTOP)  # a question of ours now waits for its answer
    try:
        time.sleep(0.5)
        assert cut_connections_to(port) > 0
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: one.membership.seen[worker].fruitless or one.notes)
    eventually(lambda: one.membership.seen[worker].fruitless == 0)
    time.sleep(0.5)
    pushes = one.router.pushes[pushed:]
    assert pushes
    assert all({w.id: w.incarnation for w in push} == told for push in pushes), one.notes
    assert one.notes == []
    # And when it does die it is gone, though Ray says the same of it.
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: one.router.told.get("decode-0", told["decode-0"]) != told["decode-0"])
    assert one.notes[0] == "decode-0 died"


def port_of(one: Stand, worker: WorkerId) -> int:
    """Where the actor's process listens for its owner's calls, as Ray tells it."""
    from ray._private.state import actors

    return int(actors(one.pools.actors[worker]._actor_id.hex())["Address"]["Port"])


def cut_connections_to(port: int) -> int:
    """Shuts every connection of this process to that port; how many."""
    cut = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(entry))
        except OSError:
            continue  # it was that of the listing
        try:
            with socket.socket(fileno=copy) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and (
                    one.getpeername()[1] == port
                ):
                    one.shutdown(socket.SHUT_RDWR)
                    cut += 1
        except OSError:
            continue  # no socket, or not connected
    return cut


def test_a_restarted_router_is_told_everything_again(stand: Callable[..., Stand]) -> None:
    one = stand(prefill=1, decode=1)
    assert one.all_present()
    told = dict(one.router.told)
    one.router.restart()
    eventually(lambda: one.router.told == told, 5)


def test_without_restarts_a_dead_worker_stays_away(stand: Callable[..., Stand]) -> None:
    one = stand(prefill=1, decode=1, restart_workers=False)
    assert one.all_present()
    one.pools.kill(WorkerId("prefill-0"))
    eventually(lambda: list(one.router.told) == ["decode-0"])
    time.sleep(1.0)
    assert list(one.router.told) == ["decode-0"]


@pytest.mark.parametrize(
    ("trouble", "code", "message"),
    [
        ("refuse", "does_not_fit", "3 GiB wanted, 2 GiB there"),
        ("bug", "internal", "KeyError: 'not there'"),
    ],
)
def test_a_worker_that_refuses_to_start_says_why(
    stand: Callable[..., Stand], tmp_path: Path, trouble: str, code: str, message: str
) -> None:
    (tmp_path / f"m.{trouble}").touch()
    one = stand(prefill=0, decode=1)
    assert one.membership.wait(lambda seen: seen[WorkerId("decode-0")].failure is not None, 30)
    failure = one.membership.seen[WorkerId("decode-0")].failure
    assert failure is not None
    assert (failure.code, failure.message) == (code, message)
    (tmp_path / f"m.{trouble}").unlink()
    one.pools.kill(WorkerId("decode-0"))  # as the keeper does
    assert one.all_present()
    assert one.membership.seen[WorkerId("decode-0")].failure is None


def test_a_worker_that_crashes_at_start_is_noticed(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    (tmp_path / "m.crash").touch()
    one = stand(prefill=0, decode=1)
    assert one.membership.wait(lambda seen: seen[WorkerId("decode-0")].deaths > 0, 30)
    assert "about to crash" in (tmp_path / "decode-0.log").read_text()
    (tmp_path / "m.crash").unlink()
    assert one.all_present()


def test_devices_of_a_worker_are_reserved_as_one(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    """As many as it asks for, on one host, or none: four hold two workers of two."""
    one = stand(gpus=2.0, prefill=1, decode=2)
    assert one.membership.wait(lambda s: sum(e.facts is not None for e in s.values()) == 2, 30)
    present = [str(facts.id) for facts in one.membership.workers()]
    states = {worker: group_state(one, worker) for worker in one.pools.actors}
    assert sorted(states.values()) == ["CREATED", "CREATED", "PENDING"], states
    assert {worker for worker, state in states.items() if state == "CREATED"} == set(present)
    first, second = (devices(tmp_path, worker) for worker in present)
    assert len(first) == len(second) == 2
    assert first | second == {"0", "1", "2", "3"}


def group_state(one: Stand, worker: WorkerId) -> str:
    """Whether Ray found a place for it, as Ray tells it."""
    from ray.util.placement_group import placement_group_table

    return str(placement_group_table(one.pools._groups[worker])["state"])


def devices(folder: Path, worker: str) -> set[str]:
    lines = (folder / f"{worker}.log").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("devices ")]
    return set(line.removeprefix("devices ").split(","))


def test_plans_share_what_there_is(node: ray_node.RayNode) -> None:
    from pdserve.cluster.pools import plan_pools, plan_worker

    cpu = Config(pools=PoolsConfig(prefill=2, decode=3))
    assert [p.weights_holders for p in plan_pools(cpu, 8, 1)] == [5] * 5
    # The one that was there may hold a copy of its own: who comes to it pays for all of another.
    added = plan_worker(cpu, WorkerId("decode-7"), Role.DECODE, 1, node)
    assert (added.sharing, added.weights_holders) == (2, 1)
    assert [(p.gpus, p.sharing) for p in plan_pools(cpu, 8, 1)] == [(0.0, 5)] * 5
    assert [p.sharing for p in plan_pools(cpu, 0, 5)] == [1] * 5
    gpu = Config(pools=PoolsConfig(prefill=1, decode=2, gpus_per_worker=1))
    assert [(p.gpus, p.sharing) for p in plan_pools(gpu, 4, 1)] == [(1.0, 1)] * 3
    assert [(p.gpus, p.sharing) for p in plan_pools(gpu, 1, 1)] == [(0.333, 3)] * 3
    assert [(p.gpus, p.sharing) for p in plan_pools(gpu, 2, 1)] == [(0.5, 2)] * 3
    with pytest.raises(ConfigError, match="no GPU"):
        plan_pools(gpu, 0, 1)


def test_workers_beyond_the_minimum_wait_for_gpus_of_their_own() -> None:
    from pdserve.cluster.pools import minimum, plan_pools

    pools = PoolsConfig(prefill=2, decode=3, prefill_min=1, decode_min=1, gpus_per_worker=1)
    assert minimum(Config(pools=pools)) == {Role.PREFILL: 1, Role.DECODE: 1, Role.MIXED: 0}
    assert [(p.gpus, p.sharing) for p in plan_pools(Config(pools=pools), 2, 1)] == [(1.0, 1)] * 5
    assert [(p.gpus, p.sharing) for p in plan_pools(Config(pools=pools), 1, 1)] == [(0.5, 2)] * 5


def test_a_joined_ray_must_offer_the_roles(node: ray_node.RayNode) -> None:
    ray_node.check_resources({Role.PREFILL: 2, Role.DECODE: 2, Role.MIXED: 0})
    with pytest.raises(ConfigError, match="resource 'decode', 20000 wanted"):
        ray_node.check_resources({Role.PREFILL: 1, Role.DECODE: 20000})


def test_a_worker_that_goes_while_it_is_renewed_leaves_nothing(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may keep a call for ever; who removes the worker meanwhile does not wait for that."""
    import ray

    one = stand(prefill=0, decode=1)
    assert one.all_present()
    worker, kill, asked, released = WorkerId("decode-0"), ray.kill, Event(), Event()

    def slow_kill(actor: Any, *, no_restart: bool) -> None:
        if current_thread().name == "renewing":
            asked.set()
            assert released.wait(30)
        kill(actor, no_restart=no_restart)

    first = one.pools.actors[worker]
    second = one.pools.renew(worker, first)
    assert second is not None
    assert second is not first
    assert one.pools.renew(worker, first) is second, "who asks late gets who is there"
    monkeypatch.setattr(ray, "kill", slow_kill)
    made: list[Any] = []
    renewing = Thread(
        target=lambda: made.append(one.pools.renew(worker, second)), name="renewing", daemon=True
    )
    renewing.start()
    assert asked.wait(10)
    removing = Thread(target=one.pools.remove, args=(worker, False, 1.0), daemon=True)
    removing.start()
    removing.join(10)
    held = removing.is_alive()
    released.set()
    renewing.join(30)
    assert not held, "the removal waited for the renewal"
    assert made == [None]
    space = f"pdserve-{one.folder.name}"
    named = ray.util.list_named_actors
    eventually(lambda: all(actor["namespace"] != space for actor in named(all_namespaces=True)))


def places_of(one: Stand) -> list[str]:
    """Names of the placement groups that hold or wait for a place for this cluster's workers."""
    import ray

    space = f"pdserve-{one.folder.name}/"
    found = ray.util.placement_group_table().values()
    names = [str(each["name"]) for each in found if each["state"] != "REMOVED"]
    return [name for name in names if name.startswith(space)]


def test_a_replacement_that_fails_is_made_up_for(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    one = stand(prefill=0, decode=1)
    assert one.all_present()
    worker = WorkerId("decode-0")
    first = one.pools.actors[worker]

    def fail(*_given: object) -> Any:
        raise RuntimeError("the control plane is away")

    with monkeypatch.context() as patch:
        patch.setattr(one.pools, "_actor", fail)
        with pytest.raises(RuntimeError, match="control plane"):
            one.pools.replace(worker, True, 5.0)
    assert one.pools.renew(worker, first) is None, "it was ended on purpose"
    made = one.pools.replace(worker, False, 5.0)
    assert made is one.pools.actors[worker]
    facts = ray.get(made.describe.remote(), timeout=30)
    assert facts.id == worker
    eventually(lambda: len(places_of(one)) == 1)
    one.pools.stop([worker], 0.0, 5.0)
    eventually(lambda: places_of(one) == [])
    with pytest.raises(InternalError, match="being stopped"):
        one.pools.replace(worker, False, 5.0)


def test_what_a_killed_owner_left_is_ended_and_its_places_are_free(
    stand: Callable[..., Stand],
) -> None:
    one = stand(prefill=1, decode=1)
    assert one.all_present()
    before = set(places_of(one))
    assert len(before) == 2
    two = stand(prefill=1, decode=0)
    assert two.all_present()
    eventually(lambda: len(places_of(two)) == 1)


@pytest.fixture
def renewals(node: ray_node.RayNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renewals]:
    made = Renewals(monkeypatch)
    yield made
    made.close()


def test_after_the_heads_return_only_the_dead_are_replaced_and_errors_end_nothing(
    renewals: Renewals,
) -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    renewals.actor.answer = ActorUnavailableError("connection reset", None)
    asked = renewals.actor.asked
    eventually(lambda: renewals.actor.asked >= asked + 3)
    assert renewals.renewals == 0, "it was cut off, and may well live"
    assert renewals.pid() == 1, "nor is it gone"
    renewals.actor.answer = facts_of(renewals.worker, 1)
    assert renewals.present()
    assert renewals.notes == []

    def refuse(worker: WorkerId, actor: Any) -> Any:
        raise ValueError("the name is taken")

    renewals.renew = refuse
    renewals.actor.answer = ActorDiedError()
    eventually(lambda: renewals.renewals >= 2)
    # One that stays unavailable does not come back by itself.
    renewals.actor.answer = ActorUnavailableError("connection refused", None)
    renewals.renew = lambda worker, actor: Scripted(facts_of(worker, 2))
    eventually(lambda: renewals.pid() == 2)


def test_a_renewal_that_takes_for_ever_holds_up_nothing(
    renewals: Renewals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ActorDiedError

    from pdserve.cluster import membership

    monkeypatch.setattr(membership, "RENEW_TIMEOUT_S", 4.0)
    released, made = Event(), Scripted(facts_of(renewals.worker, 2))

    def hang(worker: WorkerId, actor: Any) -> Any:
        assert released.wait(60)
        return made

    renewals.renew = hang
    renewals.actor.answer = ActorDiedError()
    asked = renewals.actor.asked
    try:
        eventually(lambda: renewals.actor.asked >= asked + 2)  # given up once
        assert "Ray's control plane is away" not in renewals.notes
    finally:
        released.set()
    eventually(lambda: renewals.pid() == 2)


def test_the_end_of_membership_ends_the_start_and_the_cluster(
    node: ray_node.RayNode, tmp_path: Path
) -> None:
    """Nobody would be replaced any more; here the router refuses what it is told."""
    router = RecordingRouter()
    cluster = open_cluster(Config(name="ended", state_dir=str(tmp_path / "state")))
    cluster._pools = cast(Any, SimpleNamespace(actors={}, renew=None))
    cluster._router = cast(
        Any, SimpleNamespace(generation=1, addresses=SimpleNamespace(internal=router.address))
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="the router refuses the cluster's credential"):
        cluster._start_membership(Secrets("another-token", bytes(32)))
    assert time.monotonic() - began < 10, "it went on to wait"
    assert cluster.broken.wait(5)
    assert "refuses the cluster's credential" in cluster.broken_by
    assert cluster._membership is not None
    cluster._membership.stop()
    cluster.run.close()
    router.close()
