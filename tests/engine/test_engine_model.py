"""The whole engine on a real (small, random) model: a crowd in a tiny pool, one oracle."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from engine_world import KEYS, ROOT
from model_world import family_model, generate

from pdserve.config import EngineConfig
from pdserve.engine.api import Event, Job, SeqId, Submit, Tokens
from pdserve.engine.engine import Engine
from pdserve.engine.layout import block_layout
from pdserve.engine.pool_view import pool_view
from pdserve.engine.runner import ModelRunner
from pdserve.types import AttemptTokens, Sampling

COUNT = 12
SIZE = 8


@pytest.mark.parametrize("num_blocks", [12, 64])
def test_a_crowd_writes_what_each_would_write_alone(num_blocks: int) -> None:
    """With 12 blocks sequences are preempted and read again; with 64 nobody is."""
    loaded = family_model("llama")
    layout = block_layout(SIZE, loaded.dtype, loaded.shapes)
    pool = pool_view(torch.zeros((num_blocks, layout.span_bytes), dtype=torch.uint8), layout)
    pool.blocks.fill_(float("nan"))
    runner = ModelRunner(loaded, pool, None)
    events: list[Event] = []
    engine = Engine(
        runner=runner,
        block_size=SIZE,
        num_blocks=num_blocks,
        generations=np.zeros(num_blocks, dtype=np.uint64),
        config=EngineConfig(step_tokens=24, prefill_chunk=16),
        hasher=KEYS.child,
        has_tiers=False,
        sink=events.extend,
        max_model_len=256,
    )
    rng = random.Random(4)
    shared = [rng.randrange(1, 60) for _ in range(20)]
    prompts = [shared + [rng.randrange(1, 60) for _ in range(n)] for n in (1, 4, 12, 13)]
    prompts += [[5], [rng.randrange(1, 60) for _ in range(33)], prompts[2]]
    for number, tokens in enumerate(prompts):
        attempt = AttemptTokens(tuple(tokens), len(tokens), ROOT, KEYS.chain(ROOT, tokens, SIZE))
        sampling = Sampling(max_tokens=COUNT, temperature=0.0)
        engine.post(Submit(SeqId(bytes([number])), Job.GENERATE, attempt, sampling))
    try:
        engine.turn(wait=False)
        while not engine.snapshot().idle:
            engine.turn(wait=False)
    finally:
        runner.detach()
    tokens_events = [event for event in events if isinstance(event, Tokens)]
    for number, prompt in enumerate(prompts):
        said = [e for e in tokens_events if e.seq == bytes([number])]
        assert [token.token_id for e in said for token in e.tokens] == generate(
            "llama", prompt, COUNT
        )[0]
    assert (engine.snapshot().preemptions > 0) == (num_blocks == 12)
    assert sum(e.cached.device for e in tokens_events) > 0
