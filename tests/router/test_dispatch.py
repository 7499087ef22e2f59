"""Requests among scripted workers over real sockets: whatever happens, each ends once and whole."""

from __future__ import annotations

import asyncio
import time

import pytest
from router_harness import cluster, collect, core, drive, idle, prefill, settings, tokens, until
from scripted_worker import (
    BLOCK,
    MODEL,
    Break,
    Fail,
    Hang,
    Raw,
    ScriptedWorker,
    Write,
    answer,
    job,
)

from cache_tiers.keys import KeyMaker
from pdserve.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    InternalError,
    NoWorker,
    Overloaded,
)
from pdserve.types import FinishReason
from pdserve.v1 import inference_pb2, worker_pb2
from router.api import Principal

PROMPT = (1, 2, 3, 4, 5)


def test_a_request_streams_to_its_end_and_leaves_nothing() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made:
            deltas = await collect(made, job(prompt=PROMPT, tokens=8))
            assert tokens(deltas) == answer(PROMPT, 8)
            last = deltas[-1]
            assert last.finish is FinishReason.LENGTH
            usage = last.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (5, 8)
            assert (usage.decode_worker, usage.prefill_worker) == ("d0", "")
            assert (usage.kv_skipped_reason, usage.resumes) == ("little_uncached", 0)
            assert idle(made)
            assert worker.cancelled == []

    drive(story)


def test_what_a_worker_is_sent() -> None:
    async def story() -> None:
        worker, reader = ScriptedWorker("d0"), prefill()
        async with cluster(worker, reader, config=settings(skip_handoff_tokens=0)) as made:
            one = job(prompt=PROMPT, tokens=4, salt=b"tenant", priority=-3)
            deltas = await collect(made, one)
            assert deltas[-1].usage.prefill_worker == "p0"
            assert deltas[-1].usage.kv_bytes_transferred == 100
            assert deltas[-1].usage.kv_transport == "shm"
            assert deltas[-1].usage.kv_skipped_reason == ""
            (start,) = worker.starts
            maker = KeyMaker(b"k" * 16)
            root = maker.root(MODEL.fingerprint, b"tenant")
            assert tuple(start.tokens.token_ids) == PROMPT
            assert start.tokens.key_root == root
            assert start.tokens.block_keys == b"".join(maker.chain(root, PROMPT, BLOCK))
            assert start.prefill.worker_id == "p0"
            assert start.prefill.address == reader.facts.address
            assert start.prefill.incarnation == reader.facts.incarnation
            assert start.expected_incarnation == worker.facts.incarnation
            assert start.priority == -3
            assert 15_000 < start.remaining_ms <= 20_000
            assert len(start.attempt_id) == 16

    drive(story)


def test_many_at_once_over_one_session() -> None:
    async def story() -> None:
        async with cluster(ScriptedWorker("d0", token_delay_s=0.001)) as made:
            prompts = [(i, i + 1) for i in range(40)]
            jobs = [job(f"r{i}", prompt, 12) for i, prompt in enumerate(prompts)]
            results = await asyncio.gather(*(collect(made, one) for one in jobs))
            for prompt, deltas in zip(prompts, results, strict=True):
                assert tokens(deltas) == answer(prompt, 12)
            assert idle(made)

    drive(story)


def test_resume_by_the_client_continues_with_the_next_token() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made:
            sent = tuple(answer(PROMPT, 3))
            deltas = await collect(made, job(prompt=PROMPT, tokens=8, generated=sent))
            assert deltas[0].offset == 3
            assert tokens(deltas) == answer(PROMPT, 8)[3:]
            assert deltas[-1].usage.completion_tokens == 8
            assert worker.starts[0].tokens.prompt_len == len(PROMPT)

    drive(story)


@pytest.mark.parametrize(
    ("generated", "sampling", "finish"),
    [
        ((7, 8, 9), {}, FinishReason.LENGTH),
        ((7, 50), {"stop_token_ids": (50,)}, FinishReason.STOP),
    ],
)
def test_an_answer_that_is_over_already_asks_nobody(generated, sampling, finish) -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0")
        async with cluster(worker) as made:
            (delta,) = await collect(made, job(tokens=3, generated=generated, sampling=sampling))
            assert (delta.tokens, delta.finish) == ((), finish)
            assert delta.offset == len(generated)
            assert worker.starts == []
            assert idle(made)

    drive(story)


def test_errors_that_nobody_can_mend_reach_the_client_as_they_are() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Fail(InternalError("broken"))]])
        async with cluster(worker) as made:
            with pytest.raises(InternalError, match="broken"):
                await collect(made, job())
            assert len(worker.starts) == 1
            assert idle(made)

    drive(story)


def test_the_deadline_ends_a_request_and_its_attempt() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(2), Hang()]])
        async with cluster(worker) as made:
            with pytest.raises(DeadlineExceeded):
                await collect(made, job(deadline=time.monotonic() + 0.3))
            await until(lambda: len(worker.cancelled) == 1)
            assert idle(made)
            with pytest.raises(DeadlineExceeded):
                await collect(made, job(deadline=time.monotonic() - 1))
            assert len(worker.starts) == 1

    drive(story)


def test_a_client_that_goes_away_cancels_its_attempt() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(2), Hang()]])
        async with cluster(worker) as made:
            stream = made.dispatcher.generate(job())
            await anext(stream)
            await stream.aclose()
            assert idle(made)
            await until(lambda: len(worker.cancelled) == 1)
            assert worker.cancelled == [worker.starts[0].attempt_id]

    drive(story)


def test_duplicates_are_refused_and_resumes_take_over() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(3), Hang()]])
        async with cluster(worker) as made:
            first = made.dispatcher.generate(job(prompt=PROMPT))
            got = list((await anext(first)).tokens)
            stranger = Principal("other", b"other")
            with pytest.raises(DuplicateRequest):
                await collect(made, job(prompt=PROMPT))
            with pytest.raises(DuplicateRequest):
                await collect(made, job(prompt=PROMPT, resume=True, principal=stranger))
            with pytest.raises(DuplicateRequest):  # knows the id, not what was asked
                await collect(made, job(prompt=(*PROMPT, 9), resume=True))
            sent = tuple(token.token_id for token in got)
            second = made.dispatcher.generate(job(prompt=PROMPT, resume=True, generated=sent))
            deltas = [await anext(second)]
            await until(lambda: len(worker.cancelled) == 1)
            with pytest.raises(Cancelled):
                async for _ in first:
                    pass
            # The old one's end has not freed the new one's id.
            with pytest.raises(DuplicateRequest):
                await collect(made, job(prompt=PROMPT))
            deltas += [delta async for delta in second]
            assert list(sent) + tokens(deltas) == answer(PROMPT, 8)
            assert tokens(await collect(made, job(prompt=PROMPT))) == answer(PROMPT, 8)

    drive(story)


def test_an_id_is_free_with_the_last_delta() -> None:
    async def story() -> None:
        async with cluster(ScriptedWorker("d0")) as made:
            stream = made.dispatcher.generate(job(prompt=PROMPT, tokens=1))
            assert (await anext(stream)).finish is not None
            assert tokens(await collect(made, job(prompt=PROMPT))) == answer(PROMPT, 8)
            await stream.aclose()

    drive(story)


def test_too_many_requests_are_told_when_to_come_back() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Hang()]] * 2)
        async with cluster(worker, config=settings(max_requests=2)) as made:
            streams = [made.dispatcher.generate(job(f"r{i}")) for i in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(Overloaded) as caught:
                await collect(made, job("r3"))
            assert caught.value.retry_after_s
            await streams[0].aclose()
            assert tokens(await collect(made, job("r3", PROMPT))) == answer(PROMPT, 8)
            await streams[1].aclose()

    drive(story)


def test_no_worker_at_all() -> None:
    async def story() -> None:
        async with core() as made:
            began = time.monotonic()
            with pytest.raises(NoWorker):
                await collect(made, job())
            assert time.monotonic() - began < 0.2

    drive(story)


def test_strict_mode_without_a_prefill_worker() -> None:
    async def story() -> None:
        config = settings(strict=True, skip_handoff_tokens=2)
        async with cluster(ScriptedWorker("d0"), config=config) as made:
            with pytest.raises(NoWorker):
                await collect(made, job())
            assert made.dispatcher.servable() == (
                False,
                "strict mode needs a prefill worker: no_prefill_worker",
            )

    drive(story)


def test_a_prompt_beyond_every_pool_is_refused_at_once() -> None:
    async def story() -> None:
        async with cluster(ScriptedWorker("d0", blocks=4)) as made:
            with pytest.raises(ContextTooLong):
                await collect(made, job(prompt=range(1, 17)))
            assert tokens(await collect(made, job(prompt=range(1, 16), tokens=1)))

    drive(story)


def test_the_second_turn_goes_where_the_first_was_answered() -> None:
    async def story() -> None:
        workers = [ScriptedWorker(f"d{i}") for i in range(3)]
        config = settings(policy="prefix")
        async with cluster(*workers, prefill(), config=config) as made:
            prompt = tuple(range(100, 200))
            deltas = await collect(made, job("one", prompt, 41))
            home = deltas[-1].usage.decode_worker
            follow_up = prompt + tuple(tokens(deltas)) + (1, 2, 3)
            for i in range(4):
                again = await collect(made, job(f"two{i}", follow_up, 4))
                assert again[-1].usage.decode_worker == home
                assert again[-1].usage.kv_skipped_reason == "little_uncached"
            # Another tenant's keys are others.
            foreign = await collect(made, job("three", follow_up, 4, salt=b"other"))
            assert foreign[-1].usage.prefill_worker == "p0"

    drive(story)


def test_prompt_logprobs_bypass_caches_and_come_once() -> None:
    async def story() -> None:
        prompt = tuple(range(1, 10))

        def first_event(start: worker_pb2.StartAttempt) -> worker_pb2.AttemptEvent:
            entries = [inference_pb2.TokenLogprob()]
            entries += [
                inference_pb2.TokenLogprob(token_id=token, logprob=-1.0) for token in prompt[1:]
            ]
            return worker_pb2.AttemptEvent(
                attempt_id=start.attempt_id, offset=0, prompt_logprobs=entries
            )

        worker = ScriptedWorker("d0", scripts=[[Raw(first_event), Write(2), Break()]])
        async with cluster(worker) as made:
            wish = {"prompt_logprobs": 0}
            deltas = await collect(made, job(prompt=prompt, sampling=wish))
            assert tokens(deltas) == answer(prompt, 8)
            sent = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs]
            assert len(sent) == 1
            assert sent[0][0] is None
            assert [entry.token_id for entry in sent[0][1:]] == list(prompt[1:])
            first, second = worker.starts
            assert first.tokens.bypass_cache
            assert first.sampling.HasField("prompt_logprobs")
            assert not second.tokens.bypass_cache
            assert not second.sampling.HasField("prompt_logprobs")

    drive(story)


def test_draining_the_router_ends_what_does_not_end_itself() -> None:
    async def story() -> None:
        worker = ScriptedWorker("d0", scripts=[[Write(1), Hang()]])
        async with cluster(worker) as made:
            stuck = asyncio.create_task(collect(made, job("stuck")))
            await until(lambda: len(worker.starts) == 1)
            made.dispatcher.stop_accepting()
            with pytest.raises(Draining):
                await collect(made, job("late"))
            assert made.dispatcher.ready() == (False, "the router is stopping")
            assert await made.dispatcher.drained(0.2)
            with pytest.raises(Draining):
                await stuck

    drive(story)
