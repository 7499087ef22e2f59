"""Changes to the pools of a running cluster: who takes work, who comes, who goes.

    drain    SERVE -> DRAIN -> idle, or the time is up: LEAVE -> idle      (undrain: -> SERVE)
    remove   drain -> out of the plan -> its process ends
    move     drain -> its process ends -> another is asked for, with the duty that it had
             an error on the way: unmoved, to be moved again
    add      into the plan -> present, and ready for the router; else out of the plan again
    resize   the adds, and when all of them take work, the removals

The plan itself is membership's, which tells it to the router; this decides what it becomes. One
change at a time: a second one is refused. A change goes on when whoever asked for it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.cluster.first_workers import all_present, trouble_of
from pdserve.cluster.membership import Membership
from pdserve.cluster.owner_calls import OwnerCalls
from pdserve.cluster.pools import Pools, WorkerPlan
from pdserve.cluster.sizes import (
    Member,
    Members,
    PoolRules,
    check_idle,
    check_remove,
    plan_resize,
)
from pdserve.config import Config
from pdserve.errors import AdminBusy, DeadlineExceeded, PdserveError, WorkerLost, WorkerNotFound
from pdserve.types import Duty, Role, WorkerId

POLL_S = 0.05
STOP_S = 10.0
# The router hands attempts over as soon as it is told.
HAND_OVER_S = 5.0

MakePlan = Callable[[WorkerId, Role, int], WorkerPlan]


@dataclass(frozen=True, slots=True)
class Drained:
    """How a worker came to be without work."""

    worker: WorkerId
    finished: int  # attempts that ended there while it drained
    handed_over: int  # attempts that others took over when the time was up
    seconds: float


@dataclass(frozen=True, slots=True)
class Resized:
    added: tuple[WorkerId, ...] = ()
    removed: tuple[Drained, ...] = ()


class Fleet:
    """On one event loop, that of the admin service. Owns which change is under way."""

    def __init__(
        self,
        config: Config,
        pools: Pools,
        membership: Membership,
        calls: OwnerCalls,
        make_plan: MakePlan,
        states: Callable[[], Mapping[WorkerId, str]],
        note: Callable[[str], None],
    ) -> None:
        self._timers = config.timers
        self.rules = PoolRules.of(config)
        self._pools = pools
        self._membership = membership
        self._calls = calls
        self._make_plan = make_plan
        self._states = states
        self._note = note
        self.under_way = ""
        self._unmoved: dict[WorkerId, Duty] = {}  # with the duty that each is to have again
        self._replacing = asyncio.Lock()  # of one worker at a time

    def members(self) -> Members:
        """Every worker that is to exist."""
        return {
            worker: Member(Role(worker.rpartition("-")[0]), duty)
            for worker, duty in self._membership.duties.items()
        }

    def known(self, name: str) -> WorkerId:
        """WorkerNotFound names those that there are."""
        members = self.members()
        if name not in members:
            raise WorkerNotFound(
                f"worker: {name!r} is none of this cluster's: {', '.join(members)}", param="worker"
            )
        return WorkerId(name)

    async def ready(self) -> frozenset[WorkerId]:
        """Those that the router gives work to. PdserveError while it does not answer."""
        states = await asyncio.to_thread(self._states)
        return frozenset(worker for worker, state in states.items() if state == "ready")

    # ---- the changes -----------------------------------------------------------------------------

    async def drain(self, worker: WorkerId, drain_s: float | None) -> Drained:
        """Returns when nothing runs there. A worker that was drained already stays so."""
        with self._alone(f"drain {worker}"):
            check_idle(self.members(), [worker], self.rules)
            drained = await self._drain(worker, drain_s)
            self._keep_order(worker)
            return drained

    async def undrain(self, worker: WorkerId) -> bool:
        """Whether it was drained."""
        with self._alone(f"undrain {worker}"):
            before = self._membership.duties[worker]
            await self._order(worker, Duty.SERVE)
            self._keep_order(worker)
            if before is not Duty.SERVE:
                self._note(f"{worker} takes work again, as asked")
            return before is not Duty.SERVE

    async def remove(self, worker: WorkerId, drain_s: float | None) -> Resized:
        with self._alone(f"remove {worker}"):
            check_remove(self.members(), worker, self.rules)
            return Resized(removed=(await self._remove(worker, drain_s),))

    async def move(self, workers: Sequence[WorkerId]) -> tuple[Drained, ...]:
        """Off hosts that Ray puts nothing on any more. They stay in the plan, as they were.

        Whoever asks has made sure that others can do their work. Returns when Ray was asked for
        others in their place; these start when there is room. Raises the first error: a worker that
        could not be drained goes on where it is, one of ``unmoved`` is to be moved again.
        """
        with self._alone(f"move {', '.join(workers)}"):
            ends = await asyncio.gather(*map(self._move, workers), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        return tuple(end for end in ends if isinstance(end, Drained))

    @property
    def unmoved(self) -> frozenset[WorkerId]:
        """Their processes were to end, and Ray could not be asked for others."""
        return frozenset(self._unmoved)

    async def add(self, role: Role, count: int) -> Resized:
        with self._alone(f"add {role.value} {count}"):
            have = sum(member.role is role for member in self.members().values())
            return await self._resize({role: have + count}, None)

    async def resize(self, wanted: Mapping[Role, int], drain_s: float | None) -> Resized:
        """To these sizes; nothing where the pools have them."""
        named = " ".join(f"{role.value}={size}" for role, size in wanted.items())
        with self._alone(f"resize {named}"):
            return await self._resize(wanted, drain_s)

    # ---- inside ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if self.under_way:
            raise AdminBusy(f"{what}: refused while another change runs: {self.under_way}")
        self.under_way = what
        try:
            yield
        finally:
            self.under_way = ""

    async def _resize(self, wanted: Mapping[Role, int], drain_s: float | None) -> Resized:
        change = plan_resize(self.members(), wanted, self.rules)
        added = tuple(worker for worker, _ in change.add)
        try:
            for worker, role in change.add:
                await self._start(worker, role)
            if added:
                await self._await_ready(added)
        except PdserveError:
            self._note(f"{', '.join(added)}: not added after all")
            for worker in added:
                if worker in self._membership.duties:
                    await self._end(worker)
            raise
        removed = [await self._remove(worker, drain_s) for worker in change.remove]
        return Resized(added, tuple(removed))

    async def _start(self, worker: WorkerId, role: Role) -> None:
        plan = self._make_plan(worker, role, len(self.members()))
        self._note(f"adding {worker}")
        actor = await asyncio.to_thread(self._pools.add, plan)
        self._membership.add(worker, actor)

    async def _await_ready(self, workers: tuple[WorkerId, ...]) -> None:
        """Returns when the router gives them work. Raises why one does not start."""
        limit = time.monotonic() + self._timers.start_timeout_s
        while True:
            seen = {w: one for w, one in self._membership.seen.items() if w in workers}
            if (trouble := trouble_of(seen)) is not None:
                raise trouble.error()
            if all_present(seen) and await self.ready() >= set(workers):
                return
            if time.monotonic() >= limit:
                late = ", ".join(w for w in workers if seen[w].facts is None) or "the router"
                raise DeadlineExceeded(
                    f"{late}: not ready within timers.start_timeout_s = "
                    f"{self._timers.start_timeout_s:g} s; Ray may have no place for it"
                )
            await asyncio.sleep(POLL_S)

    async def _remove(self, worker: WorkerId, drain_s: float | None) -> Drained:
        drained = await self._drain(worker, drain_s)
        await self._end(worker)
        self._note(f"{worker} was removed, as asked")
        return drained

    async def _end(self, worker: WorkerId) -> None:
        present = self._is_present(worker)
        self._unmoved.pop(worker, None)
        self._membership.drop(worker)
        await asyncio.to_thread(self._pools.remove, worker, present, STOP_S)

    def _keep_order(self, worker: WorkerId) -> None:
        """What was asked of one that is to be moved again holds after that, too."""
        if worker in self._unmoved:
            self._unmoved[worker] = self._membership.duties[worker]

    async def _move(self, worker: WorkerId) -> Drained:
        duty = self._unmoved.get(worker) or self._membership.duties[worker]
        try:
            drained = await self._drain(worker, None)
        except BaseException:
            self._membership.set_duty(worker, duty)
            raise
        self._unmoved[worker] = duty
        async with self._replacing:
            present = self._is_present(worker)
            self._membership.vacate(worker)
            actor = await asyncio.to_thread(self._pools.replace, worker, present, STOP_S)
        self._membership.add(worker, actor, duty)
        del self._unmoved[worker]
        return drained

    def _is_present(self, worker: WorkerId) -> bool:
        seen = self._membership.seen.get(worker)
        return seen is not None and seen.facts is not None

    async def _drain(self, worker: WorkerId, drain_s: float | None) -> Drained:
        bound = self._timers.drain_s if drain_s is None else drain_s
        began = time.monotonic()
        await self._order(worker, Duty.DRAIN)
        first = await self._busy(worker, HAND_OVER_S)
        left = await self._wait_idle(worker, bound) if first else 0
        # Nothing that comes late runs there either; an idle worker has nothing to hand over.
        await self._order(worker, Duty.LEAVE)
        if await self._wait_idle(worker, HAND_OVER_S):
            raise WorkerLost(f"{worker}: the router did not hand over what runs there")
        seconds = time.monotonic() - began
        self._note(f"{worker} is drained: {first - left} ended there, {left} handed over")
        return Drained(worker, max(0, first - left), left, seconds)

    async def _order(self, worker: WorkerId, duty: Duty) -> None:
        """Returns when the router knows. WorkerLost when it cannot be told in time."""
        self._membership.set_duty(worker, duty)
        bound = self._timers.start_timeout_s
        if not await asyncio.to_thread(self._membership.wait, lambda seen: True, bound):
            raise WorkerLost(f"{worker}: the router could not be told within {bound:g} s")

    async def _wait_idle(self, worker: WorkerId, bound_s: float) -> int:
        """Attempts that are left there when it is idle, or the time is up."""
        limit = time.monotonic() + bound_s
        while True:
            left = await self._busy(worker, max(POLL_S, limit - time.monotonic()))
            if not left or time.monotonic() >= limit:
                return left
            await asyncio.sleep(POLL_S)

    async def _busy(self, worker: WorkerId, patience_s: float) -> int:
        """Asks again while the router is away: it may be starting anew."""
        limit = time.monotonic() + patience_s
        while True:
            try:
                return (await self._calls.in_flight()).get(worker, 0)
            except PdserveError:
                if time.monotonic() >= limit:
                    raise
            await asyncio.sleep(POLL_S)
