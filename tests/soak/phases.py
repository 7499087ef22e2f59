"""The phases of a soak: which load, which faults, and what each of them has to hold.

    load and faults side by side -> all outcomes in -> cluster whole again -> quiet -> leftovers

A phase never stops at the first failure: all of them are in its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import grpc
from redis.exceptions import RedisError

from tests.e2e.clusters import Running
from tests.soak import leftovers
from tests.soak.cases import Answers, Case
from tests.soak.chaos import Chaos, Fault, Script, strikes
from tests.soak.leftovers import Baseline, Leftovers
from tests.soak.load import Load
from tests.soak.streams import Fronts, Outcome

# Beyond the time that it takes to notice that a worker is gone.
GAP_S = 8.0
FAULTS_LEAST = 2
MORE_S = 60.0  # to reach them
QUIET_S = 5.0
COUNTER = re.compile(r"^pdserve:router_(\w+)_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    name: str
    load: str
    began: float
    seconds: float
    outcomes: tuple[Outcome, ...]
    faults: tuple[Fault, ...]
    counters: Mapping[str, int]
    leftovers: Leftovers
    broken: tuple[str, ...]

    @property
    def endings(self) -> Counter[str]:
        return Counter(outcome.ending.split(":")[0] for outcome in self.outcomes)


@dataclass
class Soak:
    """Owns a cluster's phases. Made and used inside one event loop."""

    running: Running
    fronts: Fronts
    cases: list[Case]
    answers: Answers
    baseline: Baseline
    seed: int
    results: list[Result] = field(default_factory=list)

    async def steady(self, streams: int, total: int) -> Result:
        load = self._load("steady")
        return await self._phase(
            "steady",
            f"{total} requests, {streams} streams",
            lambda: load.steady(streams, lambda begun: begun >= total),
        )

    async def crowd(self, streams: int) -> Result:
        load = self._load("crowd")
        return await self._phase(
            "crowd",
            f"{streams} requests at once",
            lambda: load.steady(streams, lambda begun: begun >= streams),
        )

    async def kills(self, streams: int, seconds: float) -> Result:
        return await self._timed("kills", streams, seconds, Chaos.kills)

    async def hangs(self, streams: int, seconds: float, hang_s: float, every: float) -> Result:
        detection = self.running.cluster.config.timers.dead_after_s
        return await self._timed(
            "hangs", streams, seconds, lambda chaos: chaos.hangs(hang_s, every), detection
        )

    async def aborts(self, total: int, burst: int) -> Result:
        load = self._load("aborts")
        return await self._phase(
            "aborts",
            f"{total} requests in bursts of {burst}, half of them cancelled",
            lambda: load.storm(total, burst),
        )

    async def rolling(self, streams: int) -> Result:
        load, chaos = self._load("rolling"), self._chaos("rolling")
        return await self._phase(
            "rolling",
            f"{streams} streams while each worker is drained and replaced",
            lambda: load.steady(streams, lambda begun: chaos.over.is_set()),
            (chaos, Chaos.rolling),
        )

    def _load(self, name: str) -> Load:
        return Load(self.fronts, self.cases, self.answers, f"{self.seed}-{name}")

    def _chaos(self, name: str) -> Chaos:
        return Chaos(self.running, f"{self.seed}-{name}")

    async def _timed(
        self, name: str, streams: int, seconds: float, script: Script, detection_s: float = 0.0
    ) -> Result:
        """Goes on, within bounds, until it has struck twice: replacing a worker takes its time."""
        load, chaos = self._load(name), self._chaos(name)
        end = time.monotonic() + seconds

        def enough(begun: int) -> bool:
            late = time.monotonic() - end
            return late > (0.0 if strikes(chaos.faults) >= FAULTS_LEAST else MORE_S)

        return await self._phase(
            name,
            f"{streams} streams for {seconds:g} s",
            lambda: load.steady(streams, enough),
            (chaos, script),
            gap_s=GAP_S + detection_s,
        )

    async def _phase(
        self,
        name: str,
        described: str,
        run: Callable[[], Awaitable[list[Outcome]]],
        chaos: tuple[Chaos, Script] | None = None,
        gap_s: float = 0.0,
    ) -> Result:
        before, began = self._counters(), time.monotonic()
        broken: list[str] = []
        faults: list[Fault] = []
        if chaos is None:
            outcomes = await run()
        else:
            outcomes = await self._besides(run, *chaos, broken)
            faults = chaos[0].faults
        took = time.monotonic() - began
        left = await self._quiet(broken)
        broken += [f"{o.case.name}: {o.wrong}" for o in outcomes if o.wrong]
        broken += [f"after {left.seconds:.0f} s of quiet: {what}" for what in left.left]
        # A stream that waits for its first token on a worker that hangs is as silent as any.
        gap = max((max(o.first_s, o.gap_s) for o in outcomes), default=0.0)
        if gap_s and gap > gap_s:
            broken.append(f"a gap of {gap:.1f} s; {gap_s:g} s are allowed")
        counted = {key: value - before.get(key, 0) for key, value in self._counters().items()}
        result = Result(
            name, described, began, took, tuple(outcomes), tuple(faults), counted, left,
            tuple(broken),
        )  # fmt: skip
        self.results.append(result)
        return result

    async def _besides(
        self,
        run: Callable[[], Awaitable[list[Outcome]]],
        chaos: Chaos,
        script: Script,
        broken: list[str],
    ) -> list[Outcome]:
        """Both at once; the faults end with the load, or the load with its script."""
        trouble = asyncio.ensure_future(script(chaos))
        # A script that failed must end the load that waits for its end.
        trouble.add_done_callback(lambda _: chaos.over.set())
        outcomes = await run()
        chaos.over.set()
        try:
            await trouble
        except (AssertionError, OSError, RedisError, grpc.RpcError) as error:
            broken.append(f"the faults ended early: {type(error).__name__}: {error}")
        return outcomes

    async def _quiet(self, broken: list[str]) -> Leftovers:
        """Every worker back, then one lease and a little more of quiet."""
        await asyncio.to_thread(self.running.resume_stopped)
        try:
            await asyncio.to_thread(self.running.wait_whole)
        except AssertionError:
            states = {w["id"]: w["state"] for w in self.running.workers()}
            broken.append(f"not all workers came back: {states}")
        lease = self.running.cluster.config.transfer.lease_s
        return await asyncio.to_thread(
            leftovers.settle, self.running, self.baseline, lease + QUIET_S
        )

    def _counters(self) -> dict[str, int]:
        with contextlib.closing(
            urllib.request.urlopen(self.running.http + "/metrics", timeout=30)
        ) as answer:
            text = answer.read().decode()
        return {name: int(float(value)) for name, value in COUNTER.findall(text)}
