"""The cluster view: who is ready, suspect, draining or gone, on a clock that the test moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_worker import MODEL, facts

from pdserve.config import TimersConfig
from pdserve.types import Duty, Fingerprint, Incarnation, Load, Role, WorkerId, WorkerState
from router.registry import Registry

TIMERS = TimersConfig(heartbeat_s=1, dead_after_s=5, stuck_after_s=30, start_timeout_s=300)


class Scene:
    """A registry, its clock, and how often listeners were called."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls = 0
        self.registry = Registry(TIMERS, lambda: self.now)
        self.registry.listen(self._called)

    def _called(self) -> None:
        self.calls += 1

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + TIMERS.heartbeat_s)
            self.registry.tick()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_worker_is_ready_with_its_first_heartbeat(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    assert scene.registry.state(worker) is WorkerState.STARTING
    scene.registry.heard(worker, Load(running=3))
    (view,) = scene.registry.snapshot()
    assert (view.state, view.load.running) == (WorkerState.READY, 3)
    assert scene.calls == 2
    scene.registry.heard(worker, Load(running=4))
    assert scene.registry.snapshot()[0].load.running == 4
    assert scene.calls == 2, "a plain heartbeat concerns no listener"


def test_silence_is_suspect_and_a_heartbeat_heals(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load())
    scene.pass_time(TIMERS.dead_after_s)
    assert scene.registry.state(worker) is WorkerState.READY
    scene.pass_time(1)
    assert scene.registry.state(worker) is WorkerState.SUSPECT
    scene.registry.heard(worker, Load())
    assert scene.registry.state(worker) is WorkerState.READY


def test_a_router_that_stood_still_itself_blames_nobody(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load())
    scene.now += 60
    scene.registry.tick()
    assert scene.registry.state(worker) is WorkerState.READY
    scene.pass_time(TIMERS.dead_after_s + 2)
    assert scene.registry.state(worker) is WorkerState.SUSPECT


def test_a_broken_connection_is_suspect_at_once(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load())
    calls = scene.calls
    scene.registry.unreachable(worker, "connection refused")
    assert scene.registry.state(worker) is WorkerState.SUSPECT
    assert scene.calls == calls + 1


def test_work_without_steps_is_suspect_although_heartbeats_come(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    stuck = Load(work_pending=True, engine_steps=7)
    for _ in range(29):
        scene.registry.heard(worker, stuck)
        scene.pass_time(1)
    assert scene.registry.state(worker) is WorkerState.READY
    for _ in range(3):
        scene.registry.heard(worker, stuck)
        scene.pass_time(1)
    assert scene.registry.state(worker) is WorkerState.SUSPECT
    scene.registry.heard(worker, replace(stuck, engine_steps=8))
    assert scene.registry.state(worker) is WorkerState.READY


def test_idle_workers_make_no_steps_and_are_not_suspect(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    for _ in range(100):
        scene.registry.heard(worker, Load(engine_steps=7))
        scene.pass_time(1)
    assert scene.registry.state(worker) is WorkerState.READY


def test_who_is_planned_and_never_came_is_missing() -> None:
    registry = Registry(TimersConfig())
    here, late = facts("a"), facts("b")
    plan = {WorkerId("a"): Duty.SERVE, WorkerId("b"): Duty.SERVE}
    registry.set_workers([here], plan)
    assert registry.missing() == ("b",)
    registry.set_workers([here, late], plan)
    assert registry.missing() == ()
    registry.set_workers([here], plan)
    assert registry.missing() == (), "it was there: its state tells what became of it"
    registry.set_workers([here], {WorkerId("a"): Duty.SERVE})
    assert registry.missing() == ()


def test_draining_and_back(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load(draining=True))
    assert scene.registry.state(worker) is WorkerState.DRAINING
    scene.registry.unreachable(worker, "lost")
    assert scene.registry.state(worker) is WorkerState.SUSPECT
    scene.registry.heard(worker, Load(draining=True))
    assert scene.registry.state(worker) is WorkerState.DRAINING
    scene.registry.heard(worker, Load())
    assert scene.registry.state(worker) is WorkerState.READY


def test_absent_workers_are_dead_for_good(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load())
    scene.registry.set_workers([])
    assert scene.registry.live() == ()
    scene.registry.heard(worker, Load())
    scene.registry.set_workers([worker])
    assert scene.registry.state(worker) is WorkerState.DEAD, "this incarnation was revoked"
    scene.pass_time(TIMERS.start_timeout_s + 2)
    assert scene.registry.snapshot() == ()


def test_a_planned_worker_that_stays_away_is_shown_and_waited_for_by_nobody(scene: Scene) -> None:
    worker, other = facts("d0"), facts("d1")
    plan = {worker.id: Duty.SERVE, other.id: Duty.SERVE}
    scene.registry.set_workers([worker, other], plan)
    scene.registry.set_workers([other], plan)
    scene.pass_time(TIMERS.start_timeout_s + 2)
    assert [view.facts for view in scene.registry.snapshot()] == [other]
    first, second = scene.registry.everyone()
    assert (first.facts, first.state) == (worker, WorkerState.DEAD)
    assert second.facts == other
    back = replace(worker, incarnation=Incarnation(b"n" * 16))
    scene.registry.set_workers([back, other], plan)
    assert [view.facts for view in scene.registry.everyone()] == [back, other]
    # Taken out of the plan, it is missed no more.
    scene.registry.set_workers([other], plan)
    scene.pass_time(TIMERS.start_timeout_s + 2)
    assert len(scene.registry.everyone()) == 2
    scene.registry.set_workers([other], {other.id: Duty.SERVE})
    assert [view.facts for view in scene.registry.everyone()] == [other]


def test_a_new_incarnation_replaces_the_old_one(scene: Scene) -> None:
    old = facts("d0")
    new = replace(old, incarnation=Incarnation(b"n" * 16))
    scene.registry.set_workers([old])
    scene.registry.heard(old, Load())
    scene.registry.attempt_started(old.incarnation)
    scene.registry.set_workers([new])
    (view,) = scene.registry.snapshot()
    assert (view.facts, view.state, view.in_flight) == (new, WorkerState.STARTING, 0)
    scene.registry.heard(old, Load())
    scene.registry.unreachable(old, "late")
    scene.registry.attempt_ended(old.incarnation)
    (view,) = scene.registry.snapshot()
    assert (view.state, view.in_flight) == (WorkerState.STARTING, 0)


def test_the_same_list_again_changes_nothing(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.heard(worker, Load())
    calls, before = scene.calls, scene.registry.snapshot()
    scene.registry.set_workers([worker])
    assert scene.calls == calls
    assert scene.registry.snapshot() is before


def test_charges(scene: Scene) -> None:
    worker = facts("d0")
    scene.registry.set_workers([worker])
    scene.registry.attempt_started(worker.incarnation)
    scene.registry.reading_started(worker.incarnation, 70)
    (view,) = scene.registry.snapshot()
    assert (view.in_flight, view.pending_tokens) == (1, 70)
    scene.registry.reading_ended(worker.incarnation, 70)
    scene.registry.attempt_ended(worker.incarnation)
    (view,) = scene.registry.snapshot()
    assert (view.in_flight, view.pending_tokens) == (0, 0)


def test_the_model_is_what_most_decoding_workers_serve(scene: Scene) -> None:
    other = replace(MODEL, fingerprint=Fingerprint(b"o" * 32))
    assert scene.registry.model() is None
    scene.registry.set_workers([facts("p0", Role.PREFILL, model=other), facts("d0")])
    assert scene.registry.model() == MODEL
    scene.registry.set_workers([facts("d0"), facts("d1", model=other)])
    assert scene.registry.model() == MODEL, "a tie changes nothing"
    scene.registry.set_workers([facts("d1", model=other), facts("m0", Role.MIXED, model=other)])
    assert scene.registry.model() == other
    scene.registry.set_workers([])
    assert scene.registry.model() == other, "remembered while nobody lives"
