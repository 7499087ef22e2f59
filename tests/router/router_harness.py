"""A router core without fronts, among scripted workers, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from scripted_worker import TOKEN, ScriptedWorker

from cache_tiers.keys import KeyMaker
from pdserve.config import CacheConfig, Config, PoolsConfig, RouterConfig, TimersConfig
from pdserve.rpc.identity import Caller, mint
from pdserve.types import Role, WorkerState
from router.api import Delta, Job
from router.counters import Counters
from router.dispatch import RequestDispatcher
from router.kv_view import KvView
from router.links import Links
from router.registry import Registry

T = TypeVar("T")


def settings(**router: Any) -> Config:
    """Fast timers; no worker is started again unless a test says so."""
    timers = router.pop("timers", TimersConfig(heartbeat_s=0.05, dead_after_s=0.5))
    pools = router.pop("pools", PoolsConfig(restart_workers=False))
    return Config(
        router=RouterConfig(**router),
        timers=timers,
        pools=pools,
        cache=CacheConfig(kv_events=False),
    )


@dataclass
class Core:
    config: Config
    registry: Registry
    links: Links
    view: KvView
    dispatcher: RequestDispatcher

    async def join(self, *workers: ScriptedWorker) -> None:
        """These are the cluster's workers; returns when all of them are ready."""
        self.registry.set_workers([worker.facts for worker in workers])
        await until(
            lambda: all(
                self.registry.state(worker.facts) is WorkerState.READY for worker in workers
            )
        )


@contextlib.asynccontextmanager
async def core(config: Config | None = None) -> AsyncIterator[Core]:
    config = config or settings()
    counters = Counters()
    registry = Registry(config.timers)
    links = Links(registry, mint(TOKEN, Caller.ROUTER), config.timers, counters)
    view = KvView(registry, config.cache)
    dispatcher = RequestDispatcher(config, registry, links, view, KeyMaker(b"k" * 16), counters)

    async def tick() -> None:
        while True:
            await asyncio.sleep(config.timers.heartbeat_s)
            registry.tick()

    ticker = asyncio.create_task(tick())
    try:
        yield Core(config, registry, links, view, dispatcher)
    finally:
        ticker.cancel()
        await view.close()
        await links.close()


@contextlib.asynccontextmanager
async def serving(*workers: ScriptedWorker) -> AsyncIterator[None]:
    """They listen; afterwards none does, whatever happened."""
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
        yield


@contextlib.asynccontextmanager
async def cluster(*workers: ScriptedWorker, config: Config | None = None) -> AsyncIterator[Core]:
    async with serving(*workers), core(config) as made:
        await made.join(*workers)
        yield made


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (anything may be waited for)
            await asyncio.sleep(0.01)


def drive(test: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a test's coroutine, bounded."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await test()

    return asyncio.run(bounded())


async def collect(made: Core, job: Job) -> list[Delta]:
    return [delta async for delta in made.dispatcher.generate(job)]


def tokens(deltas: Sequence[Delta]) -> list[int]:
    """All tokens; checks on the way that offsets have no gap or repeat, and one ending."""
    got: list[int] = []
    start = deltas[0].offset
    for delta in deltas:
        assert delta.offset == start + len(got)
        got.extend(token.token_id for token in delta.tokens)
    assert [delta.finish is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return got


def idle(made: Core) -> bool:
    """Nothing runs, and no worker is charged for anything."""
    views = made.registry.snapshot()
    return not made.dispatcher._book.running() and all(
        view.in_flight == 0 and view.pending_tokens == 0 for view in views
    )


def prefill(name: str = "p0") -> ScriptedWorker:
    return ScriptedWorker(name, Role.PREFILL)
