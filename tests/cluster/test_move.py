"""A move that fails on its way: nobody is lost, and nobody starts again with another duty."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from pdserve.cluster.fleet import Fleet
from pdserve.cluster.seen import Seen
from pdserve.config_load import load_config
from pdserve.errors import WorkerLost as NoRouter
from pdserve.types import Duty, WorkerId

FIRST, SECOND = WorkerId("decode-0"), WorkerId("decode-1")


class Plan:
    """What membership keeps, without a router to tell it to."""

    def __init__(self) -> None:
        self.duties = {FIRST: Duty.SERVE, SECOND: Duty.SERVE}
        self.actors: dict[WorkerId, str] = {FIRST: "old", SECOND: "old"}
        self.seen: Mapping[WorkerId, Seen] = {worker: Seen() for worker in self.duties}

    def set_duty(self, worker: WorkerId, duty: Duty) -> None:
        self.duties[worker] = duty

    def wait(self, done: object, timeout_s: float) -> bool:
        return True

    def vacate(self, worker: WorkerId) -> None:
        self.actors.pop(worker, None)

    def add(self, worker: WorkerId, actor: str, duty: Duty) -> None:
        self.actors[worker], self.duties[worker] = actor, duty


class Ray:
    """Gives a new actor, but for the first so many times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def replace(self, worker: WorkerId, present: bool, timeout_s: float) -> str:
        if self.failures:
            self.failures -= 1
            raise RayError("the control plane is away")
        return "new"


def fleet(plan: Plan, ray: Ray, router: Any) -> Fleet:
    given: Any = (ray, plan, SimpleNamespace(in_flight=router), None, dict, lambda text: None)
    return Fleet(load_config(None, (), {}), *given)


async def idle() -> dict[WorkerId, int]:
    return {}


def test_it_is_taken_up_again_with_the_duty_that_the_worker_had() -> None:
    async def story() -> None:
        plan = Plan()
        one = fleet(plan, Ray(failures=2), idle)
        with pytest.raises(RayError):
            await one.move([FIRST])
        assert one.unmoved == {FIRST}
        assert FIRST in one.members()
        with pytest.raises(RayError):
            await one.move([FIRST])
        await one.move([FIRST])
        assert one.unmoved == frozenset()
        assert plan.actors == {FIRST: "new", SECOND: "old"}
        assert plan.duties == {FIRST: Duty.SERVE, SECOND: Duty.SERVE}

    asyncio.run(story())


def test_one_that_fails_does_not_keep_the_others() -> None:
    async def story() -> None:
        plan = Plan()
        plan.duties[SECOND] = Duty.DRAIN
        one = fleet(plan, Ray(failures=1), idle)
        with pytest.raises(RayError):
            await one.move([FIRST, SECOND])
        (left,) = one.unmoved
        (moved,) = {FIRST, SECOND} - {left}
        assert plan.actors == {moved: "new"}
        assert not one.under_way
        await one.move([left])
        assert plan.actors == {FIRST: "new", SECOND: "new"}
        assert plan.duties == {FIRST: Duty.SERVE, SECOND: Duty.DRAIN}

    asyncio.run(story())


def test_one_that_cannot_be_drained_goes_on_as_before() -> None:
    async def away() -> dict[WorkerId, int]:
        raise NoRouter("the router does not answer")

    async def story() -> None:
        plan = Plan()
        one = fleet(plan, Ray(failures=0), away)
        with pytest.raises(NoRouter):
            await one.move([FIRST])
        assert one.unmoved == frozenset()
        assert plan.actors == {FIRST: "old", SECOND: "old"}
        assert plan.duties[FIRST] is Duty.SERVE

    asyncio.run(story())


def test_what_is_ordered_of_one_that_is_still_to_be_moved_holds() -> None:
    async def story() -> None:
        plan = Plan()
        one = fleet(plan, Ray(failures=1), idle)
        with pytest.raises(RayError):
            await one.move([FIRST])
        await one.drain(FIRST, 0.0)
        await one.move([FIRST])
        assert plan.duties[FIRST] is Duty.LEAVE
        await one.undrain(FIRST)
        assert plan.duties[FIRST] is Duty.SERVE

    asyncio.run(story())
