"""A prefill worker as the others know it; no process stands behind it."""

from __future__ import annotations

from pdserve.types import (
    Fingerprint,
    Incarnation,
    ModelFacts,
    Numerics,
    Role,
    WorkerFacts,
    WorkerId,
)

PREFILL_FACTS = WorkerFacts(
    id=WorkerId("p0"),
    incarnation=Incarnation(b"p" * 16),
    role=Role.PREFILL,
    pid=1,
    node="here",
    address="127.0.0.1:1",
    model=ModelFacts(
        path="/model",
        max_model_len=64,
        vocab_size=100,
        block_size=4,
        dtype="float32",
        numerics=Numerics.EXACT,
        fingerprint=Fingerprint(b"f" * 32),
    ),
    blocks_total=10,
)
