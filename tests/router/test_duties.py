"""What the owner of the cluster wants of a worker: no new work, no work at all, and back again."""

from __future__ import annotations

import asyncio

import pytest
from router_harness import cluster, collect, drive, idle, tokens, until
from scripted_worker import Hang, ScriptedWorker, Write, answer, facts, job

from pdserve.config import TimersConfig
from pdserve.errors import ProtocolError
from pdserve.rpc import convert
from pdserve.types import Duty, Load, Role, WorkerId, WorkerState
from pdserve.v1 import worker_pb2
from router.registry import Registry

PROMPT = (1, 2, 3, 4, 5)


def test_a_duty_is_followed_at_once_and_outlives_the_incarnation() -> None:
    registry = Registry(TimersConfig())
    worker, reborn = facts("d0"), facts("d0")
    drained = {worker.id: Duty.DRAIN}
    registry.set_workers([worker], {worker.id: Duty.SERVE})
    registry.heard(worker, Load())
    assert registry.state(worker) is WorkerState.READY
    registry.set_workers([worker], drained)
    assert registry.state(worker) is WorkerState.DRAINING
    registry.heard(worker, Load())
    assert registry.state(worker) is WorkerState.DRAINING, "its own word changes nothing"
    registry.set_workers([reborn], drained)
    registry.heard(reborn, Load())
    assert registry.state(reborn) is WorkerState.DRAINING, "not for a moment ready"
    registry.set_workers([reborn], {worker.id: Duty.SERVE})
    assert registry.state(reborn) is WorkerState.READY
    registry.heard(reborn, Load(draining=True))
    registry.set_workers([reborn], drained)
    registry.set_workers([reborn], {worker.id: Duty.SERVE})
    assert registry.state(reborn) is WorkerState.DRAINING, "the worker itself still drains"


def test_who_is_in_neither_list_is_forgotten_and_who_died_is_not() -> None:
    registry = Registry(TimersConfig())
    one, other = facts("d0"), facts("d1")
    plan = {one.id: Duty.SERVE, other.id: Duty.SERVE}
    registry.set_workers([one, other], plan)
    registry.set_workers([one], plan)
    states = {view.facts.id: view.state for view in registry.snapshot()}
    assert states == {"d0": WorkerState.STARTING, "d1": WorkerState.DEAD}
    registry.set_workers([one], {one.id: Duty.SERVE})
    assert [view.facts.id for view in registry.snapshot()] == ["d0"]
    registry.set_workers([])
    assert [view.state for view in registry.snapshot()] == [WorkerState.DEAD], "nothing is said"


def test_streams_of_a_worker_that_drains_end_there_and_new_ones_go_elsewhere() -> None:
    async def story() -> None:
        first, second = ScriptedWorker("d0", token_delay_s=0.02), ScriptedWorker("d1")
        async with cluster(first) as made:
            stream = asyncio.create_task(collect(made, job("a", PROMPT)))
            await until(lambda: bool(first.running))
            await second.start()
            both = [first.facts, second.facts]
            plan = {first.facts.id: Duty.DRAIN, second.facts.id: Duty.SERVE}
            made.registry.set_workers(both, plan)
            assert made.registry.in_flight()[first.facts.id] == 1
            await until(lambda: made.registry.state(second.facts) is WorkerState.READY)
            assert tokens(await collect(made, job("b", PROMPT))) == answer(PROMPT, 8)
            assert tokens(deltas := await stream) == answer(PROMPT, 8)
            assert deltas[-1].usage.resumes == 0
            assert (len(first.starts), len(second.starts)) == (1, 1)
            await until(lambda: idle(made))
            await second.kill()

    drive(story)


def test_what_still_runs_where_nothing_is_to_run_goes_on_exactly_elsewhere() -> None:
    async def story() -> None:
        first = ScriptedWorker("d0", scripts=[[Write(3), Hang()]])
        second = ScriptedWorker("d1")
        async with cluster(first) as made:
            stream = asyncio.create_task(collect(made, job("a", PROMPT)))
            await until(lambda: bool(first.running))
            await second.start()
            both = [first.facts, second.facts]
            leave = {first.facts.id: Duty.LEAVE, second.facts.id: Duty.SERVE}
            made.registry.set_workers(both, leave)
            deltas = await stream
            assert tokens(deltas) == answer(PROMPT, 8)
            assert deltas[-1].usage.resumes == 1
            assert made.registry.in_flight()[first.facts.id] == 0
            # And back: it takes work again.
            made.registry.set_workers(both, {f.id: Duty.SERVE for f in both})
            made.registry.set_workers([first.facts], {first.facts.id: Duty.SERVE})
            assert tokens(await collect(made, job("b", PROMPT))) == answer(PROMPT, 8)
            assert len(first.starts) == 2
            await until(lambda: idle(made))
            await second.kill()

    drive(story)


def test_a_plan_off_the_wire_is_checked() -> None:
    plan = {WorkerId("a"): Duty.DRAIN, WorkerId("b"): Duty.LEAVE, WorkerId("c"): Duty.SERVE}
    assert convert.plan_from_proto(convert.plan_to_proto(plan)) == plan
    for wrong in (
        [worker_pb2.PlannedWorker(id="a")],
        [worker_pb2.PlannedWorker(duty=worker_pb2.WORKER_DUTY_SERVE)],
        [*convert.plan_to_proto(plan), *convert.plan_to_proto(plan)],
        [worker_pb2.PlannedWorker(id="a", duty=99)],  # type: ignore[arg-type]
    ):
        with pytest.raises(ProtocolError):
            convert.plan_from_proto(wrong)
    assert convert.role_from_proto(convert.role_to_proto(Role.MIXED), "role") is Role.MIXED
    with pytest.raises(ProtocolError):
        convert.role_from_proto(0, "role")
