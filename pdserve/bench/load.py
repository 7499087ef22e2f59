"""Offers a workload to a server: each request goes out when it is due.

With a cap on concurrency a request that is due may wait for its turn; the wait counts as its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from pdserve.bench.caller import Target, call
from pdserve.bench.prompts import TokenRange, token_ids
from pdserve.bench.samples import Run, Sample
from pdserve.bench.workload import Request

# Time between building the prompts and the first request.
_LEAD_S = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """``concurrency``: most requests in flight; None sets no limit."""

    requests: tuple[Request, ...]
    ids: TokenRange
    seed: int
    repeats: int
    warmup: int = 0
    concurrency: int | None = None


async def run_all(
    session: aiohttp.ClientSession,
    target: Target,
    plan: Plan,
    done: Callable[[int, Run], None],
) -> list[Run]:
    """Warm-up requests one after the other, then each repeat, told to ``done`` as it ends."""
    for index, request in enumerate(plan.requests[: plan.warmup]):
        # Tokens of a repeat that is not run: no measured prompt is warm from here.
        prompt = token_ids(request, index, plan.ids, plan.seed, plan.repeats)
        await call(session, target, request, prompt, time.perf_counter())
    runs = []
    for repeat in range(plan.repeats):
        prompts = [
            token_ids(request, index, plan.ids, plan.seed, repeat)
            for index, request in enumerate(plan.requests)
        ]
        run = await _run(session, target, plan.requests, prompts, plan.concurrency)
        done(repeat, run)
        runs.append(run)
    return runs


async def _run(
    session: aiohttp.ClientSession,
    target: Target,
    requests: Sequence[Request],
    prompts: Sequence[list[int]],
    concurrency: int | None,
) -> Run:
    turns = contextlib.nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    start = time.perf_counter() + _LEAD_S

    async def one(request: Request, prompt: list[int]) -> Sample:
        due = start + request.due_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with turns:
            return await call(session, target, request, prompt, due)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(request, prompt))
            for request, prompt in zip(requests, prompts, strict=True)
        ]
    return Run(tuple(task.result() for task in tasks), time.perf_counter() - start)
