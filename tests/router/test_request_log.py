"""The log alone: keys are made once, usage adds up over attempts, bad events change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_worker import BLOCK, MODEL, VOCAB, facts, job

from cache_tiers.keys import KeyMaker
from pdserve.config import TimersConfig
from pdserve.errors import IllegalTransition, ProtocolError
from pdserve.types import CachedTokens, Fingerprint, FinishReason
from pdserve.v1 import inference_pb2, kv_pb2, worker_pb2
from router.api import WorkerView
from router.attempt import Attempt
from router.placement import Placement, Skip
from router.registry import Registry
from router.request_log import RequestLog

MAKER = KeyMaker(b"k" * 16)


def opened(name: str, request: RequestLog) -> None:
    registry = Registry(TimersConfig())
    view = WorkerView(facts(name), None)  # type: ignore[arg-type]
    attempt = Attempt(registry, Placement(view, None, Skip.MIXED_WORKER, 1), 0)
    request.begin(attempt)


def event(offset: int, *tokens: int, **facts: object) -> worker_pb2.AttemptEvent:
    made = worker_pb2.AttemptEvent(
        offset=offset, tokens=[kv_pb2.TokenOut(token_id=token) for token in tokens]
    )
    if facts:
        made.facts.CopyFrom(worker_pb2.AttemptFacts(**facts))
    return made


def bound(**changes: object) -> RequestLog:
    request = RequestLog(job(prompt=range(10), tokens=20, **changes))  # type: ignore[arg-type]
    request.bind(MODEL, MAKER)
    return request


def test_keys_grow_with_the_answer_and_equal_the_whole_chain() -> None:
    request = bound(generated=(11, 12))
    assert len(request.keys(MAKER, request.length)) == 3
    opened("d0", request)
    for offset in range(2, 15):
        request.accept(event(offset, 100 + offset))
    whole = (*range(10), *request.generated)
    root = MAKER.root(MODEL.fingerprint, b"")
    for length in (len(whole), 0, 3, BLOCK, len(whole) - 1):
        assert tuple(request.keys(MAKER, length)) == MAKER.chain(root, whole[:length], BLOCK)
    sent = request.attempt_tokens(MAKER)
    assert (sent.token_ids, sent.prompt_len, sent.generated) == (whole, 10, 15)


def test_another_model_makes_other_keys_as_long_as_nothing_was_written() -> None:
    request = bound()
    before = request.keys(MAKER, 10)
    request.bind(replace(MODEL, fingerprint=Fingerprint(b"o" * 32)), MAKER)
    assert not set(before) & set(request.keys(MAKER, 10))


def test_usage_adds_up_over_attempts() -> None:
    request = bound()
    opened("d0", request)
    cached = inference_pb2.CachedTokens(host=4)
    chunk = inference_pb2.ChunkTiming(first_token=4, tokens=6)
    request.accept(
        event(
            0,
            1,
            cached_tokens=cached,
            prefill_worker="p0",
            kv_bytes_transferred=10,
            kv_transport="shm",
            chunks=[chunk],
        )
    )
    request.lose("lost")
    opened("d1", request)
    request.lose("lost")  # that one said nothing
    opened("d2", request)
    request.accept(
        event(
            1,
            2,
            cached_tokens=inference_pb2.CachedTokens(device=8),
            kv_skipped_reason="little_uncached",
            preemptions=2,
        )
    )
    usage = request.usage()
    assert usage.cached_tokens == CachedTokens(host=4), "what the first attempt found"
    assert (usage.prefill_worker, usage.decode_worker) == ("", "d2")
    assert (usage.kv_bytes_transferred, usage.kv_transport) == (10, "shm")
    assert usage.kv_skipped_reason == "", "something did move"
    assert (usage.preemptions, usage.resumes, usage.completion_tokens) == (2, 2, 2)
    assert len(usage.chunks) == 1


@pytest.mark.parametrize(
    "bad",
    [
        event(2, 5),
        event(0, 5),
        event(1, VOCAB),
        event(1, *[1] * 20),
        event(1, 5, chunks=[inference_pb2.ChunkTiming(compute_end=float("nan"))]),
        worker_pb2.AttemptEvent(offset=1, tokens=[kv_pb2.TokenOut(token_id=1)], finish_reason=7),
    ],
)
def test_a_bad_event_changes_nothing(bad: worker_pb2.AttemptEvent) -> None:
    request = bound()
    opened("d0", request)
    request.accept(event(0, 1))
    before = request.usage()
    with pytest.raises(ProtocolError):
        request.accept(bad)
    assert request.generated == [1]
    assert request.usage() == before


def test_a_prompt_logprob_for_each_token_or_none() -> None:
    request = bound(sampling={"prompt_logprobs": 1})
    opened("d0", request)
    short = event(0, 1)
    short.prompt_logprobs.extend([inference_pb2.TokenLogprob()] * 3)
    with pytest.raises(ProtocolError, match="3 prompt logprobs for 10"):
        request.accept(short)


def test_stop_tokens_count_only_after_min_tokens() -> None:
    sampling = {"stop_token_ids": (9,), "min_tokens": 2}
    assert bound(generated=(5, 9), sampling=sampling).finished_by_itself() is None
    ended = bound(generated=(5, 6, 9), sampling=sampling).finished_by_itself()
    assert ended is FinishReason.STOP


def test_a_full_context_ends_the_answer() -> None:
    request = RequestLog(job(prompt=range(10), tokens=600, generated=(1,) * 502))
    request.bind(MODEL, MAKER)
    assert request.finished_by_itself() is FinishReason.LENGTH


def test_events_out_of_order_of_life_are_our_own_bugs() -> None:
    request = bound()
    with pytest.raises(IllegalTransition):
        request.accept(event(0, 1))
    with pytest.raises(IllegalTransition):
        request.lose("lost")
