"""From the wire's description of an attempt to the engine's."""

from __future__ import annotations

import time

from pdserve.engine import api
from pdserve.errors import ProtocolError
from pdserve.rpc import convert
from pdserve.types import ID_BYTES, ModelFacts
from pdserve.v1 import kv_pb2


def submit_from_wire(
    attempt_id: bytes,
    job: api.Job,
    tokens: kv_pb2.AttemptTokens,
    sampling: kv_pb2.EngineSampling,
    priority: int,
    remaining_ms: int,
    model: ModelFacts,
) -> api.Submit:
    """Raises ProtocolError for an id, token or key that cannot be."""
    if len(attempt_id) != ID_BYTES:
        raise ProtocolError(f"attempt_id has {len(attempt_id)} bytes; {ID_BYTES} are allowed")
    return api.Submit(
        seq=api.SeqId(bytes(attempt_id)),
        job=job,
        tokens=convert.attempt_tokens_from_proto(
            tokens, block_size=model.block_size, vocab_size=model.vocab_size
        ),
        sampling=convert.sampling_from_proto(sampling),
        priority=priority,
        deadline=time.monotonic() + remaining_ms / 1000,
    )
