"""Workers that die, stall or misbehave under a request: it goes on elsewhere, or ends typed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from router_harness import cluster, collect, drive, idle, prefill, serving, settings, tokens, until
from scripted_worker import (
    VOCAB,
    Break,
    Fail,
    Hang,
    Raw,
    ScriptedWorker,
    Shift,
    Stranger,
    Write,
    answer,
    job,
)

from pdserve.config import PoolsConfig, TimersConfig
from pdserve.errors import (
    Cancelled,
    Draining,
    NoWorker,
    Overloaded,
    ProtocolError,
    TransferError,
    WorkerLost,
)
from pdserve.types import Load, WorkerState
from pdserve.v1 import kv_pb2, worker_pb2

PROMPT = (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "trouble",
    [
        [Write(3), Break()],
        [Write(3), Shift(1)],
        [Write(3), Shift(-1)],
        [Break()],
        [Shift(2)],
        [Write(3), Fail(WorkerLost("gone"))],
        [Write(3), Fail(Draining("going"))],
        [Write(3), Fail(Overloaded("full", retry_after_s=0.05))],
        [Write(3), Fail(Cancelled("lease"))],
        [Write(2), Stranger(), Write(1), Break()],
        [
            Raw(
                lambda start: worker_pb2.AttemptEvent(
                    attempt_id=start.attempt_id, tokens=[kv_pb2.TokenOut(token_id=VOCAB)]
                )
            )
        ],
        [
            Raw(
                lambda start: worker_pb2.AttemptEvent(
                    attempt_id=start.attempt_id,
                    tokens=[kv_pb2.TokenOut(token_id=1)] * (start.sampling.max_tokens + 1),
                )
            )
        ],
        [Raw(lambda start: worker_pb2.AttemptEvent(attempt_id=start.attempt_id, finish_reason=9))],
    ],
    ids=lambda trouble: "-".join(type(action).__name__ for action in trouble),
)
def test_trouble_on_one_worker_is_continued_on_the_other(trouble) -> None:
    async def story() -> None:
        first, second = (ScriptedWorker(f"d{i}", scripts=[list(trouble)]) for i in range(2))
        async with cluster(first, second) as made:
            deltas = await collect(made, job(prompt=PROMPT, tokens=8))
            assert tokens(deltas) == answer(PROMPT, 8)
            assert deltas[-1].usage.resumes == 2, "both had one attempt's trouble"
            assert len(first.starts) + len(second.starts) == 3
            await until(lambda: idle(made))

    drive(story)


def test_a_killed_worker_costs_one_resume() -> None:
    async def story() -> None:
        workers = [ScriptedWorker(f"d{i}", token_delay_s=0.02) for i in range(2)]
        async with cluster(*workers) as made:
            stream = made.dispatcher.generate(job(prompt=PROMPT, tokens=20))
            deltas = [await anext(stream)]
            victim = next(worker for worker in workers if worker.starts)
            other = next(worker for worker in workers if not worker.starts)
            await victim.kill()
            deltas += [delta async for delta in stream]
            assert tokens(deltas) == answer(PROMPT, 20)
            assert deltas[-1].usage.resumes == 1
            assert deltas[-1].usage.decode_worker == other.name
            assert made.registry.state(victim.facts) is WorkerState.SUSPECT
            (start,) = other.starts
            ids = list(start.tokens.token_ids)
            assert ids[5:] == answer(PROMPT, len(ids) - 5), "resumed after what was streamed"

    drive(story)


def test_a_worker_that_stands_still_is_left_after_the_bound() -> None:
    async def story() -> None:
        workers = [ScriptedWorker(f"d{i}") for i in range(2)]
        async with cluster(*workers) as made:
            for worker in workers:
                worker.scripts = [[Write(2), Hang()]]
            stream = made.dispatcher.generate(job(prompt=PROMPT, tokens=6))
            deltas = [await anext(stream)]
            victim = next(worker for worker in workers if worker.starts)
            other = next(worker for worker in workers if worker is not victim)
            other.scripts = []
            victim.beating = False
            began = time.monotonic()
            deltas += [delta async for delta in stream]
            assert tokens(deltas) == answer(PROMPT, 6)
            assert 0.3 < time.monotonic() - began < 3
            assert made.registry.state(victim.facts) is WorkerState.SUSPECT
            # It wakes: ready again, and its old attempts do not haunt anybody.
            victim.beating = True
            await until(lambda: made.registry.state(victim.facts) is WorkerState.READY)
            assert tokens(await collect(made, job("r2", PROMPT, 6))) == answer(PROMPT, 6)

    drive(story)


def test_attempts_without_progress_are_capped() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Fail(TransferError("x"))] for _ in range(9)])
        async with cluster(worker, config=settings(attempts_decode=3)) as made:
            with pytest.raises(TransferError):
                await collect(made, job())
            assert len(worker.starts) == 3

    drive(story)


def test_progress_renews_the_cap() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Fail(TransferError("x"))]] * 9)
        async with cluster(worker, config=settings(attempts_decode=2)) as made:
            deltas = await collect(made, job(prompt=PROMPT, tokens=12))
            assert tokens(deltas) == answer(PROMPT, 12)
            assert deltas[-1].usage.resumes == 9

    drive(story)


def test_the_prefill_workers_token_is_no_progress_of_the_decode_worker() -> None:
    """Else a worker that fails at its first step costs a hand-off for each token."""

    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Fail(TransferError("x"))]] * 9)
        config = settings(skip_handoff_tokens=0, attempts_decode=3)
        async with cluster(worker, prefill("p0"), config=config) as made:
            with pytest.raises(TransferError):
                await collect(made, job(prompt=PROMPT, tokens=12))
            assert [start.prefill.worker_id for start in worker.starts] == ["p0"] * 3

    drive(story)


@pytest.mark.parametrize("strict", [False, True])
def test_a_prefill_worker_that_fails_twice_is_given_up_unless_strict(strict: bool) -> None:
    async def story() -> None:
        scripts = [[Fail(TransferError("x"), suspect=f"p{i}")] for i in (0, 1)]
        worker = ScriptedWorker("d0", scripts=scripts)
        config = settings(skip_handoff_tokens=0, strict=strict, policy="least_loaded")
        async with cluster(worker, prefill("p0"), prefill("p1"), config=config) as made:
            made.dispatcher._turn = 1  # so that the first request's prefill worker is p0
            if strict:
                with pytest.raises(TransferError):
                    await collect(made, job())
                assert [start.prefill.worker_id for start in worker.starts] == ["p0", "p1"]
                return
            deltas = await collect(made, job(prompt=PROMPT, tokens=8))
            assert tokens(deltas) == answer(PROMPT, 8)
            assert deltas[-1].usage.kv_skipped_reason == "prefill_failed"
            assert [start.prefill.worker_id for start in worker.starts] == ["p0", "p1", ""]

    drive(story)


def test_a_request_leaves_a_prefill_worker_that_fell_silent() -> None:
    """Its decode worker may never hear of it: a stopped process closes no connection."""

    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Hang()]])
        first = prefill("p0")
        config = settings(skip_handoff_tokens=0, policy="least_loaded")
        async with cluster(worker, first, prefill("p1"), config=config) as made:
            made.dispatcher._turn = 1  # so that the request's prefill worker is p0
            asked = asyncio.create_task(collect(made, job(prompt=PROMPT)))
            await until(lambda: len(worker.starts) == 1)
            await first.kill()
            deltas = await asyncio.wait_for(asked, 5)
            assert tokens(deltas) == answer(PROMPT, 8)
            assert deltas[-1].usage.resumes == 1
            assert [start.prefill.worker_id for start in worker.starts] == ["p0", "p1"]

    drive(story)


def test_a_running_request_waits_for_the_only_worker_to_be_started_again() -> None:
    async def story() -> None:
        config = settings(pools=PoolsConfig(restart_workers=True))
        old = ScriptedWorker("d0", scripts=[[Write(3), Break()]])
        async with cluster(old, config=config) as made:
            stream = made.dispatcher.generate(job(prompt=PROMPT))
            deltas = [await anext(stream)]
            rest = asyncio.create_task(_rest(stream))
            await old.kill()
            made.registry.set_workers([])
            await asyncio.sleep(0.2)
            assert not rest.done()
            new = ScriptedWorker("d0")
            async with serving(new):
                await made.join(new)
                deltas += await rest
                assert tokens(deltas) == answer(PROMPT, 8)

    drive(story)


async def _rest(stream) -> list:
    return [delta async for delta in stream]


def test_a_new_request_waits_a_little_and_is_refused() -> None:
    async def story() -> None:
        timers = TimersConfig(heartbeat_s=0.05, dead_after_s=0.4)
        config = settings(pools=PoolsConfig(restart_workers=True), timers=timers)
        worker = ScriptedWorker("d0")
        async with cluster(worker, config=config) as made:
            await worker.kill()
            made.registry.set_workers([])
            began = time.monotonic()
            with pytest.raises(NoWorker):
                await collect(made, job())
            assert 0.3 < time.monotonic() - began < 2
            assert idle(made)

    drive(story)


def test_draining_workers_get_nothing_new() -> None:
    async def story() -> None:
        workers = [ScriptedWorker(f"d{i}") for i in range(2)]
        async with cluster(*workers) as made:
            workers[0].load = Load(draining=True)
            await until(lambda: made.registry.state(workers[0].facts) is WorkerState.DRAINING)
            for i in range(4):
                await collect(made, job(f"r{i}"))
            assert workers[0].starts == []

    drive(story)


def test_late_events_of_fenced_attempts_are_counted_and_dropped() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Stranger(), Write(2), Stranger()]])
        async with cluster(worker) as made:
            deltas = await collect(made, job(prompt=PROMPT))
            assert tokens(deltas) == answer(PROMPT, 8)
            assert made.dispatcher.counters.late_events == 2

    drive(story)


def test_another_incarnation_on_the_same_stream_is_not_believed() -> None:
    async def story() -> None:
        workers = [ScriptedWorker(f"d{i}", token_delay_s=0.01) for i in range(2)]
        async with cluster(*workers) as made:
            stream = made.dispatcher.generate(job(prompt=PROMPT, tokens=20))
            deltas = [await anext(stream)]
            victim = next(worker for worker in workers if worker.starts)
            # The same process dropped its state and calls itself another one now.
            victim.facts = replace(victim.facts, incarnation=b"z" * 16)
            deltas += [delta async for delta in stream]
            assert tokens(deltas) == answer(PROMPT, 20)
            assert made.dispatcher.counters.late_events >= 1

    drive(story)


def test_protocol_errors_that_never_end_are_not_retried_for_ever() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Shift(1)]] * 9)
        async with cluster(worker) as made:
            with pytest.raises(ProtocolError):
                await collect(made, job())
            assert made.dispatcher.counters.protocol_errors == 3

    drive(story)
