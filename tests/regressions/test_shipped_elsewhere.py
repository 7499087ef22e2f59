"""Failures that prefill/decode systems have shipped, each told once on our own parts.

The engine is the real one on a synthetic model whose KV can be checked block by block.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from cache_tiers.redis_tier import RedisTier
from pdserve.config import RedisTierConfig
from pdserve.engine import api
from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LayoutMismatch,
    PdserveError,
    TierError,
)
from pdserve.types import (
    PROTOCOL_VERSION,
    BlockKey,
    Fingerprint,
    Incarnation,
    Tier,
    TokenOut,
)
from pdserve.v1 import kv_pb2
from prefill_worker import protocol as prefill
from prefill_worker.service import start_to_submit
from router.chat import ChatTemplate
from tests.engine.engine_world import World, prompt
from tests.prefill_facts import PREFILL_FACTS

GONE = Cancelled("the client went away")


def held(world: World, tokens: list[int], deadline: float = float("inf")) -> api.SeqId:
    """A prompt that was read and waits for its peer."""
    seq = world.submit(tokens, api.Job.PREFILL, deadline=deadline)
    world.run()
    return seq


def test_prefill_frees_on_a_timeout_while_decode_still_reads() -> None:
    world = World(num_blocks=8, block_size=4)
    tokens = prompt(20)
    seq = held(world, tokens, deadline=10.0)
    offered = [block for event in world.of(api.BlocksReady, seq) for block in event.blocks]
    world.now = 1000.0
    world.turn(3)
    for _ in range(3):
        world.submit(prompt(12, 1), max_tokens=2)
        world.turn(5)
    assert all(world.holds(block, tokens, i) for i, block in enumerate(offered))
    world.post(api.Release(seq))
    world.run()
    world.assert_quiet()


def test_an_abort_frees_blocks_that_a_transfer_still_writes() -> None:
    world = World(num_blocks=8)
    seq = world.submit(prompt(20), api.Job.IMPORT)
    world.turn()
    lent = world.only(api.Reserved, seq).blocks
    world.post(api.Cancel(seq, GONE))
    other = world.submit(prompt(30, 1), max_tokens=1)
    world.turn(5)
    assert world.of(api.Admitted, other) == [], "lent blocks were given to somebody else"
    for block in lent:
        world.scribble(block, random.Random(1))
    world.post(api.ImportFailed(seq, 0))
    world.run()
    assert world.stream(other) == world.expected(other)
    world.assert_quiet()


def test_a_completion_for_a_request_that_is_gone_ends_the_engine() -> None:
    world = World()
    seq = world.submit(prompt(20), api.Job.IMPORT)
    world.turn()
    world.post(api.ImportFailed(seq, 0))
    world.post(api.Cancel(seq, GONE))
    world.run()
    for late in (
        api.ImportDone(seq, TokenOut(3)),
        api.ImportFailed(seq, 2),
        api.TierReadDone(seq, (Tier.HOST,)),
        api.Release(seq),
        api.Cancel(seq, GONE),
        api.ImportDone(api.SeqId(b"never submitted!"), TokenOut(3)),
    ):
        world.post(late)
        world.turn()
    assert world.engine.failure is None
    assert len(world.endings(seq)) == 1
    after = world.submit(prompt(9), max_tokens=3)
    world.run()
    assert world.stream(after) == world.expected(after)
    world.assert_quiet()


@pytest.mark.parametrize("granted", [False, True])
def test_decode_rejects_and_the_blocks_of_prefill_stay_stranded(granted: bool) -> None:
    world = World()
    seq = held(world, prompt(20))
    hand_off = prefill.PrefillHandOff(seq, prompt_blocks=5)
    hand_off.admitted()
    for ready in world.of(api.BlocksReady, seq):
        hand_off.blocks(ready)
    hand_off.computed(world.only(api.Tokens, seq))
    if granted:
        hand_off.grant([0, 1])
    assert world.inspect().blocks_used > 0
    for effect in hand_off.lost(None):
        if isinstance(effect, prefill.Post):
            world.post(effect.command)
    world.turn()
    world.assert_quiet()


@pytest.mark.parametrize("valid", [0, 2])
def test_a_recompute_waits_for_the_next_request_on_an_idle_engine(valid: int) -> None:
    world = World()
    seq = world.submit(prompt(20), api.Job.IMPORT)
    world.turn()
    reserved = world.only(api.Reserved, seq)
    for i, block in enumerate(reserved.blocks[:valid]):
        world.fill(block, prompt(20), reserved.first_wanted + i)
    world.turn(3)
    world.post(api.ImportFailed(seq, valid))
    world.run(turns=30)  # and nobody else ever comes
    assert world.stream(seq) == world.expected(seq)
    world.assert_quiet()


@pytest.mark.parametrize("job", [api.Job.GENERATE, api.Job.PREFILL, api.Job.IMPORT])
def test_a_duplicate_id_ends_the_scheduler(job: api.Job) -> None:
    world = World()
    seq = world.submit(prompt(20), job)
    world.turn()
    for _ in range(3):
        world.post(world.submitted[seq])
        world.turn()
    if job is api.Job.IMPORT:
        world.post(api.ImportFailed(seq, 0))
    world.run()
    if job is not api.Job.IMPORT:  # that one would wait for its blocks once more
        world.post(world.submitted[seq])
    world.post(api.Release(seq))
    world.run()
    assert world.engine.failure is None
    after = world.submit(prompt(9, 1), max_tokens=3)
    world.run()
    assert world.stream(after) == world.expected(after)
    world.assert_quiet()


def test_a_layout_mismatch_makes_the_client_wait_for_ever() -> None:
    """It is refused by the first message, with its own type, before anything is queued."""
    start = kv_pb2.StartPrefill(
        attempt_id=b"a" * 16,
        protocol_version=PROTOCOL_VERSION,
        expected_incarnation=PREFILL_FACTS.incarnation,
        layout_fingerprint=b"another layout, of as many bytes"[:32],
    )
    with pytest.raises(LayoutMismatch):
        start_to_submit(start, PREFILL_FACTS)


def test_errors_of_redis_count_as_success_and_the_breaker_never_opens(tmp_path: Path) -> None:
    config = RedisTierConfig(timeout_s=0.2, breaker_failures=3, breaker_open_s=30.0)
    tier = RedisTier(
        f"unix://{tmp_path}/nobody.sock",
        config,
        64,
        Fingerprint(b"f" * 32),
        Incarnation(b"w" * 16),
    )
    key, value = BlockKey(b"k" * 16), memoryview(bytearray(64))
    try:
        for _ in range(config.breaker_failures):
            assert not tier.refuses_writes()
            with pytest.raises(TierError):
                tier.put([key], [value])
        assert tier.refuses_writes(), "the breaker is still closed"
        assert tier.health()
        started = time.monotonic()
        with pytest.raises(TierError):
            tier.put([key], [value])
        assert time.monotonic() - started < config.timeout_s
        assert tier.stats().stored == 0
    finally:
        tier.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7]['content'] }}",
        "{{ nothing.known.of.this }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ ().__class__.__mro__ }}",
    ],
)
def test_a_failing_template_ends_the_process(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(PdserveError) as failed:
        template.render(
            [{"role": "user", "content": "hello"}],
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
    assert isinstance(failed.value, InvalidRequest | DeadlineExceeded)
