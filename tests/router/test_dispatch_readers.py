"""Clients that do not read, and many requests that lose their worker at once."""

from __future__ import annotations

import asyncio
import time

import pytest
from router_harness import cluster, collect, drive, idle, settings, tokens, until
from scripted_worker import Break, Hang, ScriptedWorker, Write, answer, job

from pdserve.errors import Cancelled, DeadlineExceeded, DuplicateRequest, Overloaded
from router.budget import FLOOR
from router.inbox import UNREAD_EVENTS

PROMPT = (1, 2, 3, 4, 5)


def test_an_attempt_that_nobody_reads_is_parked_and_goes_on_exactly() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        length = UNREAD_EVENTS + 150
        async with cluster(worker) as made:
            stream = made.dispatcher.generate(job(prompt=PROMPT, tokens=length))
            deltas = [await anext(stream)]
            await until(lambda: made.dispatcher.counters.parked == 1)
            await until(lambda: not worker.running)
            (request,) = made.dispatcher._book.running()
            assert len(request.inbox._items) <= UNREAD_EVENTS + 1
            deltas += [delta async for delta in stream]
            assert tokens(deltas) == answer(PROMPT, length)
            assert deltas[-1].usage.resumes == 1
            await until(lambda: idle(made))

    drive(story)


def test_the_deadline_frees_the_worker_of_a_client_that_does_not_read() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(3), Hang()]])
        async with cluster(worker) as made:
            ask = job(prompt=PROMPT, deadline=time.monotonic() + 0.4)
            stream = made.dispatcher.generate(ask)
            await anext(stream)
            await until(lambda: not worker.running, 2)
            assert time.monotonic() - ask.deadline < 1
            with pytest.raises(DeadlineExceeded):
                async for _ in stream:
                    pass
            await until(lambda: idle(made))

    drive(story)


def test_a_request_that_was_taken_over_while_it_was_parked_stays_ended() -> None:
    """The word of its end lies behind the one that it was parked."""

    async def story() -> None:
        worker, length = ScriptedWorker("d0"), UNREAD_EVENTS + 150
        async with cluster(worker) as made:
            first = made.dispatcher.generate(job("same", PROMPT, tokens=length))
            deltas = [await anext(first)]
            await until(lambda: made.dispatcher.counters.parked == 1)
            got = tuple(token.token_id for token in deltas[0].tokens)
            again = job("same", PROMPT, tokens=length, generated=got, resume=True)
            rest = await collect(made, again)
            assert tokens([*deltas, *rest]) == answer(PROMPT, length)
            attempts = len(worker.starts)
            with pytest.raises(Cancelled):
                async for _ in first:
                    pass
            assert len(worker.starts) == attempts, "it went on beside its successor"
            await until(lambda: idle(made))

    drive(story)


def test_a_duplicate_is_refused_and_a_resume_takes_over() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(3), Hang()]])
        async with cluster(worker) as made:
            first = made.dispatcher.generate(job("same", PROMPT))
            deltas = [await anext(first)]
            with pytest.raises(DuplicateRequest):
                await collect(made, job("same", PROMPT))
            got = tuple(token.token_id for token in deltas[0].tokens)
            rest = await collect(made, job("same", PROMPT, generated=got, resume=True))
            assert tokens([*deltas, *rest]) == answer(PROMPT, 8)
            with pytest.raises(Cancelled):
                async for _ in first:
                    pass
            assert made.dispatcher.counters.takeovers == 1
            await until(lambda: idle(made))

    drive(story)


def test_requests_that_lose_their_worker_together_come_back_a_few_at_a_time() -> None:
    async def story() -> None:
        count, most = 24, 0
        scripts = [[Write(2), Hang()] for _ in range(count - 1)]
        first = ScriptedWorker("d0", scripts=[*scripts, [Write(2), Break()]])
        second = ScriptedWorker("d1", token_delay_s=0.05)
        async with cluster(first) as made:
            streams = [
                asyncio.create_task(collect(made, job(f"r{i}", (i, 9, 9)))) for i in range(count)
            ]
            # All but one hang in the first worker; then its session breaks under all of them.
            second_facts = await second.start()
            made.registry.set_workers([first.facts, second_facts])
            while not all(stream.done() for stream in streams):
                reading = sum(
                    r.attempts > 1 and r.attempt is not None and len(r.generated) < 3
                    for r in made.dispatcher._book.running()
                )
                most = max(most, reading)
                await asyncio.sleep(0.002)
            for i, stream in enumerate(streams):
                assert tokens(stream.result()) == answer((i, 9, 9), 8)
            assert most <= FLOOR, "the share of 24 requests is the least that there is"
            assert made.dispatcher.counters.recoveries_delayed >= count - FLOOR - 1
            await until(lambda: idle(made))
            await second.kill()

    drive(story)


def test_places_are_counted_before_any_work_is_done() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Hang()]] * 2)
        async with cluster(worker, config=settings(max_requests=2)) as made:
            made.dispatcher.check_room(2, 0)
            streams = [made.dispatcher.generate(job(f"r{i}")) for i in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(Overloaded) as refused:
                made.dispatcher.check_room(1, 0)
            assert refused.value.retry_after_s
            await streams[0].aclose()
            made.dispatcher.check_room(1, 0)
            with pytest.raises(Overloaded):
                made.dispatcher.check_room(1, 1)  # another one is being tokenized
            await streams[1].aclose()

    drive(story)


def test_the_routers_own_request_takes_no_clients_place_and_needs_none() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Hang()]] * 3)
        async with cluster(worker, config=settings(max_requests=1)) as made:
            streams = [made.dispatcher.run(job("own-0"), force_pair=True)]
            await anext(streams[0])
            made.dispatcher.check_room(1, 0)
            streams.append(made.dispatcher.generate(job("r")))
            await anext(streams[1])
            with pytest.raises(Overloaded):
                made.dispatcher.check_room(1, 0)
            streams.append(made.dispatcher.run(job("own-1"), force_pair=True))
            await anext(streams[2])
            for stream in streams:
                await stream.aclose()
            made.dispatcher.check_room(1, 0)
            with pytest.raises(Overloaded):
                made.dispatcher.check_room(2, 0)
            assert idle(made)

    drive(story)
