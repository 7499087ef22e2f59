"""Ready means: a request has gone the whole way, with its KV moved where it has to move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from router_harness import Core, cluster, collect, drive, prefill, serving, settings, until
from scripted_worker import BLOCK, Fail, ScriptedWorker, job

from pdserve.errors import InternalError, TransferError
from pdserve.types import WorkerState
from router import selftest
from router.selftest import SelfTest


@contextlib.asynccontextmanager
async def self_testing(made: Core) -> AsyncIterator[None]:
    task = asyncio.create_task(SelfTest(made.dispatcher, made.registry).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ready(made: Core) -> bool:
    return made.dispatcher.ready()[0]


def test_not_ready_before_the_test_and_ready_after_it() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker, prefill()) as made:
            assert not ready(made)
            async with self_testing(made):
                await until(lambda: ready(made))
                (start,) = worker.starts
                assert start.prefill.worker_id == "p0", "handed over, though the prompt is short"
                assert len(start.tokens.token_ids) == 2 * BLOCK + 1
                given = made.dispatcher.borrowed_tokens
                more = start.sampling.max_tokens - given
                assert given == 2 + 3, "as many attempts may fail"
                assert more == 2, "not all may come from prefill workers: the rest needs moved KV"

    drive(story)


def test_a_failed_test_is_said_and_repeated(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "RETRY_S", 0.2)

    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Fail(TransferError("no way"))]] * 3)
        async with cluster(worker) as made, self_testing(made):
            await until(lambda: "no way" in made.dispatcher.ready()[1])
            assert not ready(made)
            await until(lambda: ready(made))

    drive(story)


def test_kv_that_does_not_move_is_not_ready_in_strict_mode(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "RETRY_S", 0.1)

    async def story(strict: bool) -> None:
        worker = ScriptedWorker("d0", moves_kv=False)
        config = settings(strict=strict)
        async with cluster(worker, prefill(), config=config) as made, self_testing(made):
            await until(lambda: len(worker.starts) >= 2)
            if strict:
                ok, why = made.dispatcher.ready()
                assert not ok
                assert "KV does not move" in why
                worker.moves_kv = True
            await until(lambda: ready(made))

    drive(lambda: story(True))
    drive(lambda: story(False))


def test_a_prefill_worker_that_joins_later_is_proven_too() -> None:
    async def story() -> None:
        worker, late = ScriptedWorker("d0"), prefill()
        async with serving(late), cluster(worker) as made, self_testing(made):
            await until(lambda: ready(made))
            await made.join(worker, late)
            await until(lambda: len(worker.starts) == 2)
            assert worker.starts[1].prefill.worker_id == "p0"
            await asyncio.sleep(0.2)
            assert len(worker.starts) == 2, "and that is enough"
            assert ready(made)

    drive(story)


def test_ready_ends_with_the_last_worker_and_returns_with_it() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made, self_testing(made):
            await until(lambda: ready(made))
            await worker.kill()
            await until(lambda: not ready(made))
            assert made.dispatcher.ready()[1] == "no live decode worker"

    drive(story)


def test_workers_that_are_gone_prove_nothing_for_their_successors() -> None:
    async def story() -> None:
        old, new = ScriptedWorker("d0"), ScriptedWorker("d0", token_delay_s=0.3)
        async with cluster(old) as made, self_testing(made):
            await until(lambda: ready(made))
            async with serving(new):
                made.registry.set_workers([new.facts])
                assert not ready(made), "at once"
                await until(lambda: made.dispatcher.servable()[0])
                assert not ready(made), "a worker that could take a request is not yet a proof"
                await until(lambda: ready(made))
                assert len(new.starts) == 1

    drive(story)


def test_a_failure_of_ours_puts_readiness_in_doubt(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "RETRY_S", 0.2)

    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made, self_testing(made):
            await until(lambda: ready(made))
            # Its engine is broken, though its heartbeats go on.
            worker.scripts = [[Fail(InternalError("wedged"))] for _ in range(4)]
            with pytest.raises(InternalError):
                await collect(made, job())
            await until(lambda: "wedged" in made.dispatcher.ready()[1])
            await until(lambda: ready(made))
            assert worker.scripts == []

    drive(story)


def test_a_doubt_that_cannot_be_tested_at_once_is_kept_until_it_can(monkeypatch) -> None:
    monkeypatch.setattr(selftest, "RETRY_S", 0.2)

    async def story() -> None:
        worker, late = ScriptedWorker("d0"), ScriptedWorker("d1", beating=False)
        async with serving(late), cluster(worker) as made, self_testing(made):
            await until(lambda: ready(made))
            # A test waits for those that start; meanwhile the other one's engine is broken.
            made.registry.set_workers([worker.facts, late.facts])
            worker.scripts = [[Fail(InternalError("wedged"))] for _ in range(4)]
            with pytest.raises(InternalError):
                await collect(made, job())
            await asyncio.sleep(0.1)
            assert made.registry.state(late.facts) is WorkerState.STARTING
            assert ready(made)
            made.registry.set_workers([worker.facts])
            await until(lambda: "wedged" in made.dispatcher.ready()[1])
            await until(lambda: ready(made))
            assert worker.scripts == []

    drive(story)
