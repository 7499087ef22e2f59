"""Protobuf messages <-> the types of pdserve/types.py, both ways, with every value checked.

``<x>_to_proto`` trusts its argument; ``<x>_from_proto`` trusts nothing and raises ProtocolError,
which names the field. Pure functions; what a sequence is made of is here, what a worker is made of
in convert_worker.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pdserve.errors import ProtocolError
from pdserve.rpc.convert_worker import (
    heartbeat_from_proto,
    heartbeat_to_proto,
    model_facts_from_proto,
    model_facts_to_proto,
    plan_from_proto,
    plan_to_proto,
    role_from_proto,
    role_to_proto,
    worker_facts_from_proto,
    worker_facts_to_proto,
)
from pdserve.types import (
    ID_BYTES,
    AttemptTokens,
    BlockKey,
    CachedTokens,
    ChunkTiming,
    FinishReason,
    Sampling,
    TokenLogprob,
    TokenOut,
    TopLogprob,
    Usage,
)
from pdserve.v1 import inference_pb2, kv_pb2

__all__ = [
    "attempt_tokens_from_proto",
    "attempt_tokens_to_proto",
    "cached_tokens_from_proto",
    "cached_tokens_to_proto",
    "chunk_timing_from_proto",
    "chunk_timing_to_proto",
    "finish_reason_from_proto",
    "finish_reason_to_proto",
    "heartbeat_from_proto",
    "heartbeat_to_proto",
    "model_facts_from_proto",
    "model_facts_to_proto",
    "plan_from_proto",
    "plan_to_proto",
    "prompt_logprobs_from_proto",
    "prompt_logprobs_to_proto",
    "role_from_proto",
    "role_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "token_logprob_from_proto",
    "token_logprob_to_proto",
    "token_out_from_proto",
    "token_out_to_proto",
    "usage_from_proto",
    "usage_to_proto",
    "worker_facts_from_proto",
    "worker_facts_to_proto",
]

# ---- finish reason, cached tokens, chunks -------------------------------------------------------

_FINISH_TO: Mapping[FinishReason | None, inference_pb2.FinishReason] = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM: Mapping[int, FinishReason | None] = {
    number: reason for reason, number in _FINISH_TO.items()
}


def finish_reason_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason:
    return _FINISH_TO[reason]


def finish_reason_from_proto(number: int) -> FinishReason | None:
    """None while the sequence goes on."""
    try:
        return _FINISH_FROM[number]
    except KeyError:
        raise ProtocolError(f"finish_reason: {number} is none that we know") from None


def cached_tokens_to_proto(cached: CachedTokens) -> inference_pb2.CachedTokens:
    return inference_pb2.CachedTokens(device=cached.device, host=cached.host, redis=cached.redis)


def cached_tokens_from_proto(message: inference_pb2.CachedTokens) -> CachedTokens:
    return CachedTokens(message.device, message.host, message.redis)


def chunk_timing_to_proto(chunk: ChunkTiming) -> inference_pb2.ChunkTiming:
    return inference_pb2.ChunkTiming(
        first_token=chunk.first_token,
        tokens=chunk.tokens,
        compute_start=chunk.compute_start,
        compute_end=chunk.compute_end,
        first_byte=chunk.first_byte,
        last_byte=chunk.last_byte,
    )


def chunk_timing_from_proto(message: inference_pb2.ChunkTiming) -> ChunkTiming:
    for name in ("compute_start", "compute_end", "first_byte", "last_byte"):
        _finite(getattr(message, name), f"chunks.{name}")
    return ChunkTiming(
        first_token=message.first_token,
        tokens=message.tokens,
        compute_start=message.compute_start,
        compute_end=message.compute_end,
        first_byte=message.first_byte,
        last_byte=message.last_byte,
    )


# ---- sampling -----------------------------------------------------------------------------------


def sampling_to_proto(sampling: Sampling) -> kv_pb2.EngineSampling:
    """Values are float32 on the wire; every worker of an attempt sees the same rounded ones."""
    return kv_pb2.EngineSampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        seed=sampling.seed,
    )


def sampling_from_proto(
    message: kv_pb2.EngineSampling, *, vocab_size: int | None = None
) -> Sampling:
    """Checks ranges; with ``vocab_size`` also the ids of logit_bias and stop_token_ids."""
    _in_range(message.temperature, "sampling.temperature", 0.0, math.inf)
    _in_range(message.min_p, "sampling.min_p", 0.0, 1.0)
    _in_range(message.top_p, "sampling.top_p", 0.0, 1.0, above=True)
    _in_range(message.repetition_penalty, "sampling.repetition_penalty", 0.0, math.inf, above=True)
    _finite(message.presence_penalty, "sampling.presence_penalty")
    _finite(message.frequency_penalty, "sampling.frequency_penalty")
    if message.top_k < 0:
        raise ProtocolError(f"sampling.top_k: {message.top_k} is negative")
    bias = tuple(sorted(message.logit_bias.items()))
    for token_id, value in bias:
        _finite(value, f"sampling.logit_bias[{token_id}]")
    stops = tuple(message.stop_token_ids)
    if vocab_size is not None:
        _known_ids([token_id for token_id, _ in bias], "sampling.logit_bias", vocab_size)
        _known_ids(stops, "sampling.stop_token_ids", vocab_size)
    return Sampling(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=bias,
        min_tokens=message.min_tokens,
        stop_token_ids=stops,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        seed=message.seed,
    )


# ---- tokens -------------------------------------------------------------------------------------


def attempt_tokens_to_proto(tokens: AttemptTokens) -> kv_pb2.AttemptTokens:
    return kv_pb2.AttemptTokens(
        token_ids=tokens.token_ids,
        prompt_len=tokens.prompt_len,
        key_root=tokens.key_root,
        block_keys=b"".join(tokens.block_keys),
        bypass_cache=tokens.bypass_cache,
    )


def attempt_tokens_from_proto(
    message: kv_pb2.AttemptTokens, block_size: int, vocab_size: int | None = None
) -> AttemptTokens:
    """Exactly one key for each full block; with ``vocab_size`` every token id is below it."""
    ids = tuple(message.token_ids)
    if not 1 <= message.prompt_len <= len(ids):
        raise ProtocolError(
            f"tokens.prompt_len: {message.prompt_len} is not between 1 and {len(ids)} token ids"
        )
    if len(message.key_root) != ID_BYTES:
        raise ProtocolError(f"tokens.key_root: {len(message.key_root)} bytes, not {ID_BYTES}")
    packed = message.block_keys
    if len(packed) != ID_BYTES * (len(ids) // block_size):
        raise ProtocolError(
            f"tokens.block_keys: {len(packed)} bytes for {len(ids)} tokens, {block_size} a block"
        )
    if vocab_size is not None:
        _known_ids(ids, "tokens.token_ids", vocab_size)
    return AttemptTokens(
        token_ids=ids,
        prompt_len=message.prompt_len,
        key_root=BlockKey(message.key_root),
        block_keys=tuple(
            BlockKey(packed[at : at + ID_BYTES]) for at in range(0, len(packed), ID_BYTES)
        ),
        bypass_cache=message.bypass_cache,
    )


def token_out_to_proto(token: TokenOut) -> kv_pb2.TokenOut:
    if token.logprob is None:
        return kv_pb2.TokenOut(token_id=token.token_id)
    return kv_pb2.TokenOut(token_id=token.token_id, logprob=token_logprob_to_proto(token.logprob))


def token_out_from_proto(message: kv_pb2.TokenOut) -> TokenOut:
    if not message.HasField("logprob"):
        return TokenOut(message.token_id)
    if message.logprob.token_id != message.token_id:
        raise ProtocolError(
            f"logprob.token_id: {message.logprob.token_id} beside token {message.token_id}"
        )
    return TokenOut(message.token_id, token_logprob_from_proto(message.logprob))


def token_logprob_to_proto(entry: TokenLogprob | None) -> inference_pb2.TokenLogprob:
    """None (nothing precedes the position) is the empty message."""
    if entry is None:
        return inference_pb2.TokenLogprob()
    return inference_pb2.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=[
            inference_pb2.TopLogprob(token_id=top.token_id, logprob=top.logprob, rank=top.rank)
            for top in entry.top
        ],
    )


def token_logprob_from_proto(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    """-inf is legal: a token that the model excludes."""
    _not_nan(message.logprob, "logprob.logprob")
    top = []
    for entry in message.top:
        _not_nan(entry.logprob, "logprob.top.logprob")
        if entry.rank < 1:
            raise ProtocolError(f"logprob.top.rank: {entry.rank} is not positive")
        top.append(TopLogprob(entry.token_id, entry.logprob, entry.rank))
    return TokenLogprob(message.token_id, message.logprob, tuple(top))


def prompt_logprobs_to_proto(
    entries: Iterable[TokenLogprob | None],
) -> list[inference_pb2.TokenLogprob]:
    """Only the first entry may be None: nothing precedes the prompt's first token."""
    return [token_logprob_to_proto(entry) for entry in entries]


def prompt_logprobs_from_proto(
    messages: Sequence[inference_pb2.TokenLogprob],
) -> tuple[TokenLogprob | None, ...]:
    if not messages:
        return ()
    if messages[0].ByteSize() != 0:
        raise ProtocolError("prompt_logprobs: entry 0 is not empty")
    return (None, *(token_logprob_from_proto(message) for message in messages[1:]))


# ---- usage --------------------------------------------------------------------------------------


def usage_to_proto(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=cached_tokens_to_proto(usage.cached_tokens),
        prefill_worker=usage.prefill_worker,
        decode_worker=usage.decode_worker,
        kv_bytes_transferred=usage.kv_bytes_transferred,
        kv_transport=usage.kv_transport,
        kv_skipped_reason=usage.kv_skipped_reason,
        preemptions=usage.preemptions,
        resumes=usage.resumes,
        chunks=[chunk_timing_to_proto(chunk) for chunk in usage.chunks],
    )


def usage_from_proto(message: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=cached_tokens_from_proto(message.cached_tokens),
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        kv_bytes_transferred=message.kv_bytes_transferred,
        kv_transport=message.kv_transport,
        kv_skipped_reason=message.kv_skipped_reason,
        preemptions=message.preemptions,
        resumes=message.resumes,
        chunks=tuple(chunk_timing_from_proto(chunk) for chunk in message.chunks),
    )


# ---- checks -------------------------------------------------------------------------------------


def _finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ProtocolError(f"{name}: {value} is not finite")


def _not_nan(value: float, name: str) -> None:
    if math.isnan(value) or value == math.inf:
        raise ProtocolError(f"{name}: {value} is no log-probability")


def _in_range(value: float, name: str, low: float, high: float, *, above: bool = False) -> None:
    """``above``: the lower bound itself is excluded."""
    _finite(value, name)
    if not low <= value <= high or (above and value == low):
        raise ProtocolError(f"{name}: {value} is not in {'(' if above else '['}{low}, {high}]")


def _known_ids(ids: Sequence[int], name: str, vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise ProtocolError(f"{name}: id {max(ids)} is outside a vocabulary of {vocab_size}")
