"""Actors in a Ray of our own: described, restarted, frozen, refused; and none is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster import orphans, ray_node
from pdserve.config import Config, PoolsConfig
from pdserve.errors import ConfigError
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, mint
from pdserve.types import Role, WorkerId
from pdserve.v1 import worker_pb2, worker_pb2_grpc

# pdserve.cluster.pools and membership import Ray, which must see the environment of its start.

TOKEN = "cluster-token"
MODULES = dict.fromkeys(Role, "fake_role")


def eventually(true: Callable[[], object], within_s: float = 20.0) -> None:
    limit = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit, "it never became true"
        time.sleep(0.02)


class RecordingRouter(worker_pb2_grpc.MembershipServicer):
    """A real gRPC server that keeps what it is told; ``restart`` forgets it, as a router does."""

    def __init__(self) -> None:
        self.generation = 1
        self.pushes: list[list[worker_pb2.WorkerInfo]] = []
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._serving.wait(10)

    async def SetWorkers(self, request: Any, context: Any) -> Any:
        self.pushes.append(list(request.workers))
        return worker_pb2.SetWorkersResponse()

    def restart(self) -> None:
        self.pushes.clear()
        self.generation += 1

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    @property
    def told(self) -> dict[str, bytes]:
        """Incarnations by id, as last pushed."""
        return {w.id: w.incarnation for w in self.pushes[-1]} if self.pushes else {}

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        server = make_server(mint(TOKEN, Caller.ROUTER))
        worker_pb2_grpc.add_MembershipServicer_to_server(self, server)
        self.address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
        await server.start()
        self._serving.set()
        await self._closing.wait()
        await server.stop(0)


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


class Stand:
    """Pools and membership of one cluster over the shared Ray."""

    def __init__(
        self, node: ray_node.RayNode, folder: Path, pools: PoolsConfig, gpus: float = 0.0
    ) -> None:
        """``gpus`` of each worker, beyond what a configuration may ask for."""
        from pdserve.cluster.membership import Membership
        from pdserve.cluster.pools import Pools, PoolSpec, plan_pools

        self.node = node
        self.folder = folder
        self.notes: list[str] = []
        config = replace(Config(name=folder.name), pools=pools)
        spec = PoolSpec(
            config, "here", "127.0.0.1", str(folder / "m"), TOKEN, bytes(32), "", 3, folder, MODULES
        )
        plans = [replace(plan, gpus=gpus) for plan in plan_pools(config, gpus=0, nodes=1)]
        self.pools = Pools(spec, plans)
        self.router = RecordingRouter()
        self.pools.create()
        self.membership = Membership(
            self.pools.actors,
            self.router,
            lambda: self.router.address,
            mint(TOKEN, Caller.SUPERVISOR),
            config.timers,
            self.notes.append,
            self.pools.renew,
        )
        self.membership.start()

    def all_present(self) -> bool:
        return self.membership.wait(lambda s: all(one.facts for one in s.values()), 30)

    def pid(self, worker: str) -> int:
        facts = self.membership.seen[WorkerId(worker)].facts
        return facts.pid if facts is not None else 0

    def close(self) -> None:
        pids = [facts.pid for facts in self.membership.workers()]
        self.membership.stop()
        self.pools.stop([facts.id for facts in self.membership.workers()], 0.5, 5.0)
        self.router.close()
        for pid in pids:
            assert orphans.wait_gone(pid, 10)


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


def test_a_killed_worker_comes_back_as_another_incarnation(stand: Callable[..., Stand]) -> None:
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
    time.sleep(1.0)
    present = [str(facts.id) for facts in one.membership.workers()]
    assert len(present) == 2, "the third waits"
    first, second = (devices(tmp_path, worker) for worker in present)
    assert len(first) == len(second) == 2
    assert first | second == {"0", "1", "2", "3"}


def devices(folder: Path, worker: str) -> set[str]:
    lines = (folder / f"{worker}.log").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("devices ")]
    return set(line.removeprefix("devices ").split(","))


def test_plans_share_what_there_is() -> None:
    from pdserve.cluster.pools import plan_pools

    cpu = Config(pools=PoolsConfig(prefill=2, decode=3))
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


def test_a_ray_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1'.*Connection refused"):
        ray_node.start_ray("127.0.0.1:1", tmp_path, "x:y", 1)
    assert time.monotonic() - begin < 5


def test_a_ray_that_was_imported_before_still_starts(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ab" * 32)  # of another Ray of the user
    short = Path(f"/tmp/pds-test-early-{os.getpid()}")
    code = (
        "import sys, ray; from pathlib import Path\n"
        "from pdserve.cluster.ray_node import start_ray\n"
        "node = start_ray('local', Path(sys.argv[1]), sys.argv[2], 1); node.stop()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(short), orphans.mark_value(tmp_path, "r")],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(short)
    assert done.returncode == 0, done.stderr
    assert "without an access token" in done.stderr
    assert orphans.find_marked(tmp_path) == ()
