"""Every type survives the wire, and every bad value off the wire is named."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import ProtocolError
from pdserve.rpc import convert, deadlines
from pdserve.types import (
    AttemptTokens,
    BlockKey,
    CachedTokens,
    ChunkTiming,
    Fingerprint,
    FinishReason,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    Reach,
    Role,
    Sampling,
    TierBlocks,
    TierReach,
    TokenLogprob,
    TokenOut,
    TopLogprob,
    Usage,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import inference_pb2, kv_pb2, worker_pb2

# print_blob gives the line that repeats a failure.
few = settings(max_examples=60, deadline=None, print_blob=True)

u32 = st.integers(0, 2**32 - 1)
positive = st.integers(1, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=20)
seconds = st.floats(0, 1e9)
single = st.floats(width=32, allow_nan=False, allow_infinity=False)
ids16 = st.binary(min_size=16, max_size=16)
cached = st.builds(CachedTokens, u32, u32, u32)
chunks = st.builds(ChunkTiming, u32, u32, seconds, seconds, seconds, seconds)
logprobs = st.floats(max_value=0, width=32, allow_nan=False)
entries = st.builds(
    TokenLogprob,
    u32,
    logprobs,
    st.lists(st.builds(TopLogprob, u32, logprobs, positive), max_size=3).map(tuple),
)
samplings = st.builds(
    Sampling,
    max_tokens=u32,
    temperature=st.floats(0, 100, width=32),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, width=32, exclude_min=True),
    min_p=st.floats(0, 1, width=32),
    presence_penalty=single,
    frequency_penalty=single,
    repetition_penalty=st.floats(0, 100, width=32, exclude_min=True),
    logit_bias=st.dictionaries(u32, single, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    min_tokens=u32,
    stop_token_ids=st.lists(u32, max_size=4).map(tuple),
    logprobs=st.none() | u32,
    prompt_logprobs=st.none() | u32,
    seed=u64,
)
models = st.builds(
    ModelFacts,
    path=text,
    max_model_len=positive,
    vocab_size=positive,
    block_size=positive,
    dtype=text,
    numerics=st.sampled_from(Numerics),
    fingerprint=st.binary(min_size=32, max_size=32).map(Fingerprint),
)
workers = st.builds(
    WorkerFacts,
    id=st.text(min_size=1, max_size=9).map(WorkerId),
    incarnation=ids16.map(Incarnation),
    role=st.sampled_from(Role),
    pid=u32,
    node=text,
    address=st.text(min_size=1, max_size=9),
    model=models,
    blocks_total=u32,
    kv_events_address=text,
    kv_replay_address=text,
)
loads = st.builds(
    Load,
    running=u32,
    waiting=u32,
    waiting_tokens=u64,
    blocks_used=u32,
    blocks_cached=u32,
    blocks_total=u32,
    engine_steps=u64,
    work_pending=st.booleans(),
    draining=st.booleans(),
    degraded=text,
    tiers=st.builds(TierBlocks, u32, u32, u64, u64, u64),
    reach=st.builds(TierReach, st.sampled_from(Reach), st.sampled_from(Reach)),
    late_events=u64,
    late_kv_reads=u64,
    turn_wait_s=st.floats(0, 1e9),
    turns_forced=u64,
)
usages = st.builds(
    Usage,
    prompt_tokens=u32,
    completion_tokens=u32,
    cached_tokens=cached,
    prefill_worker=text,
    decode_worker=text,
    kv_bytes_transferred=u64,
    kv_transport=text,
    kv_skipped_reason=text,
    preemptions=u32,
    resumes=u32,
    chunks=st.lists(chunks, max_size=3).map(tuple),
)


@st.composite
def attempts(draw: st.DrawFn) -> tuple[AttemptTokens, int]:
    """Tokens of an attempt, and the block size that their keys are for."""
    token_ids = tuple(draw(st.lists(u32, min_size=1, max_size=40)))
    block_size = draw(st.integers(1, 8))
    full = len(token_ids) // block_size
    return (
        AttemptTokens(
            token_ids=token_ids,
            prompt_len=draw(st.integers(1, len(token_ids))),
            key_root=BlockKey(draw(ids16)),
            block_keys=tuple(
                BlockKey(key) for key in draw(st.lists(ids16, min_size=full, max_size=full))
            ),
            bypass_cache=draw(st.booleans()),
        ),
        block_size,
    )


def over_the_wire(message):
    """What the other side parses from the bytes of ``message``."""
    return type(message).FromString(message.SerializeToString())


@few
@given(samplings)
def test_sampling_round_trips(value: Sampling) -> None:
    assert convert.sampling_from_proto(over_the_wire(convert.sampling_to_proto(value))) == value


@few
@given(attempts())
def test_attempt_tokens_round_trip(given_: tuple[AttemptTokens, int]) -> None:
    value, block_size = given_
    message = over_the_wire(convert.attempt_tokens_to_proto(value))
    assert convert.attempt_tokens_from_proto(message, block_size, 2**32) == value


@few
@given(st.builds(TokenOut, u32))
def test_plain_tokens_round_trip(value: TokenOut) -> None:
    assert convert.token_out_from_proto(over_the_wire(convert.token_out_to_proto(value))) == value


@few
@given(entries)
def test_logprobs_round_trip_alone_and_beside_their_token(value: TokenLogprob) -> None:
    message = over_the_wire(convert.token_logprob_to_proto(value))
    assert convert.token_logprob_from_proto(message) == value
    token = TokenOut(value.token_id, value)
    assert convert.token_out_from_proto(over_the_wire(convert.token_out_to_proto(token))) == token


@few
@given(st.lists(entries, max_size=4))
def test_prompt_logprobs_round_trip_with_their_empty_first_entry(rest: list[TokenLogprob]) -> None:
    value = (None, *rest)
    carrier = inference_pb2.GenerateResponse(
        prompt_logprobs=convert.prompt_logprobs_to_proto(value)
    )
    parsed = over_the_wire(carrier).prompt_logprobs
    assert convert.prompt_logprobs_from_proto(parsed) == value
    assert convert.prompt_logprobs_from_proto([]) == ()


@few
@given(usages)
def test_usage_round_trips(value: Usage) -> None:
    assert convert.usage_from_proto(over_the_wire(convert.usage_to_proto(value))) == value


@few
@given(workers)
def test_worker_facts_round_trip(value: WorkerFacts) -> None:
    message = over_the_wire(convert.worker_facts_to_proto(value))
    assert convert.worker_facts_from_proto(message) == value


@few
@given(ids16.map(Incarnation), loads)
def test_heartbeats_round_trip(incarnation: Incarnation, load: Load) -> None:
    message = over_the_wire(convert.heartbeat_to_proto(incarnation, load))
    assert convert.heartbeat_from_proto(message) == (incarnation, load)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_round_trip(reason: FinishReason | None) -> None:
    assert convert.finish_reason_from_proto(convert.finish_reason_to_proto(reason)) is reason


def sampling(**changes: object) -> kv_pb2.EngineSampling:
    fields: dict[str, object] = {"max_tokens": 1, "top_p": 1.0, "repetition_penalty": 1.0}
    return kv_pb2.EngineSampling(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, math.nan) for name in ("temperature", "top_p", "min_p", "repetition_penalty")],
        *[(name, math.inf) for name in ("temperature", "presence_penalty", "frequency_penalty")],
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("top_k", -1),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {100: 1.0}),
        ("stop_token_ids", [5, 100]),
    ],
)
def test_bad_sampling_is_refused_by_name(field: str, value: object) -> None:
    convert.sampling_from_proto(sampling(), vocab_size=100)
    with pytest.raises(ProtocolError, match=field):
        convert.sampling_from_proto(sampling(**{field: value}), vocab_size=100)


def attempt(**changes: object) -> kv_pb2.AttemptTokens:
    fields: dict[str, object] = {
        "token_ids": [1, 2, 3, 4, 5],
        "prompt_len": 4,
        "key_root": bytes(16),
        "block_keys": bytes(32),
    }
    return kv_pb2.AttemptTokens(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_len", 0),
        ("prompt_len", 6),
        ("key_root", b""),
        ("key_root", bytes(17)),
        ("block_keys", bytes(31)),
        ("block_keys", bytes(16)),
        ("block_keys", bytes(48)),
        ("token_ids", [1, 2, 3, 4, 100]),
    ],
)
def test_bad_attempt_tokens_are_refused_by_name(field: str, value: object) -> None:
    convert.attempt_tokens_from_proto(attempt(), 2, 100)
    with pytest.raises(ProtocolError, match=field):
        convert.attempt_tokens_from_proto(attempt(**{field: value}), 2, 100)


def info(model: dict[str, object] | None = None, **changes: object) -> worker_pb2.WorkerInfo:
    facts = {
        "max_model_len": 8,
        "vocab_size": 8,
        "block_size": 8,
        "numerics": "exact",
        "layout_fingerprint": bytes(32),
    }
    message = worker_pb2.ModelInfo(**{**facts, **(model or {})})  # type: ignore[arg-type]
    fields: dict[str, object] = {
        "id": "w",
        "incarnation": bytes(16),
        "role": worker_pb2.WORKER_ROLE_DECODE,
        "address": "h:1",
        "model": message,
    }
    return worker_pb2.WorkerInfo(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", ""), ("incarnation", bytes(15)), ("role", 0), ("role", 9), ("address", "")],
)
def test_bad_worker_facts_are_refused_by_name(field: str, value: object) -> None:
    convert.worker_facts_from_proto(info())
    with pytest.raises(ProtocolError, match=field):
        convert.worker_facts_from_proto(info(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 0),
        ("vocab_size", 0),
        ("block_size", 0),
        ("numerics", "quick"),
        ("layout_fingerprint", bytes(31)),
    ],
)
def test_bad_model_facts_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=field):
        convert.worker_facts_from_proto(info({field: value}))


def test_other_bad_values_are_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="finish_reason"):
        convert.finish_reason_from_proto(77)
    with pytest.raises(ProtocolError, match="incarnation"):
        convert.heartbeat_from_proto(worker_pb2.Heartbeat(incarnation=b"short"))
    with pytest.raises(ProtocolError, match="compute_end"):
        convert.chunk_timing_from_proto(inference_pb2.ChunkTiming(compute_end=math.nan))
    with pytest.raises(ProtocolError, match=r"logprob\.logprob"):
        convert.token_logprob_from_proto(inference_pb2.TokenLogprob(logprob=math.nan))
    with pytest.raises(ProtocolError, match="rank"):
        convert.token_logprob_from_proto(
            inference_pb2.TokenLogprob(top=[inference_pb2.TopLogprob(token_id=1)])
        )
    with pytest.raises(ProtocolError, match="token_id"):
        convert.token_out_from_proto(
            kv_pb2.TokenOut(token_id=1, logprob=inference_pb2.TokenLogprob(token_id=2))
        )
    with pytest.raises(ProtocolError, match="entry 0"):
        convert.prompt_logprobs_from_proto([inference_pb2.TokenLogprob(token_id=2)])


def test_deadlines_travel_as_remaining_time() -> None:
    now = time.monotonic()
    assert 1900 <= deadlines.remaining_ms(now + 2) <= 2000
    assert deadlines.remaining_ms(now - 2) == 0
    assert deadlines.deadline_after(deadlines.remaining_ms(math.inf)) == math.inf
    assert deadlines.deadline_after(1500) == pytest.approx(time.monotonic() + 1.5, abs=0.2)
