"""What an engine notes of a sequence's way: every station, in order, and nothing for a token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from engine_world import World

from pdserve.engine.api import (
    Cancel,
    Event,
    Failed,
    ImportDone,
    Job,
    Release,
    Reserved,
    SeqId,
    TierRead,
    TierReadDone,
    Tokens,
)
from pdserve.errors import Cancelled
from pdserve.telemetry.timeline import PHASES_PER_NAME, Phase, PhaseName, between
from pdserve.types import Tier, TokenOut


@dataclass
class Timed(World):
    """A world whose clock moves with every turn."""

    def turn(self, count: int = 1) -> list[Event]:
        before = len(self.events)
        for _ in range(count):
            self.now += 1.0
            super().turn()
        return self.events[before:]


def phases(world: World, seq: SeqId) -> list[Phase]:
    told = [*world.of(Tokens, seq), *world.of(Failed, seq)]
    return [phase for event in told for phase in event.phases]


def names(found: Sequence[Phase]) -> list[str]:
    return [phase.name.value for phase in found]


def only(found: Sequence[Phase], name: PhaseName) -> Phase:
    (one,) = (phase for phase in found if phase.name is name)
    return one


def test_a_prompt_read_and_answered_here() -> None:
    world = Timed()
    seq = world.submit(range(1, 41), max_tokens=6)
    world.run()
    found = phases(world, seq)
    assert names(found) == ["queue", "chunk", "chunk", "chunk", "prefill", "decode"]
    assert [p.tokens for p in found if p.name is PhaseName.CHUNK] == [16, 16, 8]
    prefill, decode = only(found, PhaseName.PREFILL), only(found, PhaseName.DECODE)
    assert (prefill.tokens, decode.tokens) == (40, 6)
    assert prefill.end_ns == decode.start_ns
    assert decode.duration_ns == 5_000_000_000
    for phase in found[:4]:
        assert prefill.start_ns <= phase.start_ns <= phase.end_ns <= prefill.end_ns


def test_a_long_answer_has_one_decode_and_no_more_phases_than_a_short_one() -> None:
    world = Timed(num_blocks=60, max_model_len=200)
    seq = world.submit([1, 2, 3], max_tokens=150)
    world.run()
    assert names(phases(world, seq)) == ["queue", "chunk", "prefill", "decode"]
    quiet = [event for event in world.of(Tokens, seq) if not event.phases]
    assert len(quiet) == 148


def test_device_hits_and_slower_tiers_are_told_apart() -> None:
    world = Timed(has_tiers=True)
    first = world.submit(range(1, 10), max_tokens=1)
    world.turn()
    world.post(TierReadDone(first, (None, None)))
    world.run()
    second = world.submit([*range(1, 9), *range(20, 30)], max_tokens=1)
    world.turn()
    read = world.of(TierRead, second)[-1]
    slower = between(PhaseName.TIER_READ, 1.0, 1.5, tier=Tier.REDIS, blocks=1)
    world.post(TierReadDone(second, (Tier.REDIS, *[None] * (len(read.keys) - 1)), (slower,)))
    world.run()
    found = [p for p in phases(world, second) if p.name is PhaseName.TIER_READ]
    assert [(p.tier, p.blocks) for p in found] == [(Tier.DEVICE, 2), (Tier.REDIS, 1)]


def test_each_preemption_and_its_end_are_one_phase() -> None:
    world = Timed(num_blocks=8)
    old = world.submit(range(1, 9), max_tokens=20)
    young = world.submit(range(11, 19), max_tokens=20)
    world.run()
    preemptions = world.of(Tokens, young)[-1].preemptions
    assert preemptions > 0
    found = phases(world, young)
    gaps = [phase for phase in found if phase.name is PhaseName.PREEMPTED]
    assert len(gaps) == preemptions
    assert all(gap.duration_ns > 0 for gap in gaps)
    # What it had is computed again after each, and within its one decode.
    decode = only(found, PhaseName.DECODE)
    again = [p for p in found if p.name is PhaseName.CHUNK and p.start_ns >= gaps[0].end_ns]
    assert again
    assert decode.start_ns < gaps[0].start_ns <= gaps[-1].end_ns <= decode.end_ns
    assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(gaps))
    assert not [p for p in phases(world, old) if p.name is PhaseName.PREEMPTED]


def test_blocks_from_a_peer_are_decoded_without_a_prefill() -> None:
    world = Timed()
    seq = world.submit(range(1, 10), Job.IMPORT, max_tokens=3)
    world.turn(2)
    assert world.only(Reserved, seq).blocks
    world.post(ImportDone(seq, TokenOut(5)))
    world.run()
    found = phases(world, seq)
    assert names(found) == ["queue", "decode"]
    assert only(found, PhaseName.DECODE).tokens == 3


def test_a_prompt_read_for_a_peer_is_told_with_its_only_token() -> None:
    world = Timed()
    seq = world.submit(range(1, 20), Job.PREFILL, max_tokens=3)
    world.run()
    (event,) = world.of(Tokens, seq)
    assert names(event.phases) == ["queue", "chunk", "chunk", "prefill"]
    world.post(Release(seq))
    world.turn()


def test_what_fails_tells_how_far_it_came() -> None:
    world = Timed()
    seq = world.submit(range(1, 10), max_tokens=50)
    world.turn(5)
    world.post(Cancel(seq, Cancelled("enough")))
    world.turn()
    assert names(world.only(Failed, seq).phases) == ["decode"]
    assert names(phases(world, seq)) == ["queue", "chunk", "prefill", "decode"]


def test_a_prompt_of_many_chunks_is_bounded() -> None:
    world = Timed(num_blocks=60, prefill_chunk=4, max_model_len=230)
    seq = world.submit(range(1, 161), max_tokens=1)
    world.run()
    chunks = [p for p in phases(world, seq) if p.name is PhaseName.CHUNK]
    assert len(chunks) == PHASES_PER_NAME
    assert sum(p.tokens for p in chunks) == 160
    assert sum(p.merged for p in chunks) == 40 - PHASES_PER_NAME
