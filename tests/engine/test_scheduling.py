"""Stories of single sequences and small crowds: what is computed, shared, preempted and told."""

from __future__ import annotations

import pytest
from engine_world import KEYS, MODEL, ROOT, World, prompt

from pdserve.engine.api import (
    Admitted,
    BlocksReady,
    Cancel,
    Cleared,
    Failed,
    FlushDevice,
    Forget,
    Job,
    Release,
    Removed,
    SeqId,
    Stored,
    Submit,
    Tokens,
)
from pdserve.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
)
from pdserve.types import AttemptTokens, CachedTokens, FinishReason, Sampling


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 33, 50])
def test_a_prompt_of_any_length_is_continued_as_the_model_would(length: int) -> None:
    world = World()
    seq = world.submit(prompt(length), max_tokens=9)
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert [type(event) for event in world.endings(seq)] == [Tokens]
    assert world.of(Tokens, seq)[-1].finish is FinishReason.LENGTH
    world.assert_quiet()


def test_a_long_prompt_is_read_in_chunks_beside_running_ones() -> None:
    world = World(num_blocks=40, step_tokens=10, prefill_chunk=8)
    running = world.submit(prompt(4), max_tokens=30)
    world.turn()
    long = world.submit(prompt(40, 3), max_tokens=2)
    world.turn()
    assert [len(row.tokens) for row in world.runner.rows] == [1, 8]
    world.run()
    assert world.stream(running) == world.expected(running)
    assert world.stream(long) == world.expected(long)
    chunks = world.of(Tokens, long)[-1].chunks
    assert [(chunk.first_token, chunk.tokens) for chunk in chunks] == [
        (start, 8) for start in range(0, 40, 8)
    ]


def test_events_of_one_step_come_in_one_batch() -> None:
    world = World()
    first, second = world.submit(prompt(1)), world.submit(prompt(1, 1))
    world.turn()
    world.batches.clear()
    world.turn()
    assert [[getattr(event, "seq", None) for event in batch] for batch in world.batches] == [
        [first, second]
    ]


def test_stop_ids_end_a_sequence_and_are_part_of_it() -> None:
    world = World()
    whole = world.submit(prompt(5), max_tokens=12)
    world.run()
    stop = world.stream(whole)[5]
    first = world.stream(whole).index(stop)
    stopped = world.submit(prompt(5), max_tokens=12, stop_token_ids=(stop,))
    world.run()
    assert world.stream(stopped) == world.stream(whole)[: first + 1]
    assert world.of(Tokens, stopped)[-1].finish is FinishReason.STOP


def test_a_sequence_ends_where_context_or_pool_end() -> None:
    small = World(num_blocks=4, block_size=4)
    seq = small.submit(prompt(5), max_tokens=100)
    small.run()
    assert len(small.stream(seq)) == 4 * 4 + 1 - 5
    assert small.of(Tokens, seq)[-1].finish is FinishReason.LENGTH
    short = World(max_model_len=12)
    seq = short.submit(prompt(5), max_tokens=100)
    short.run()
    assert len(short.stream(seq)) == 12 - 5
    assert short.stream(seq) == short.expected(seq)


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    world = World()
    whole = world.submit(prompt(7), max_tokens=10)
    world.run()
    stream = world.stream(whole)
    for done in range(11):
        seq = world.submit(
            prompt(7) + stream[:done], generated=done, max_tokens=10, bypass=done % 2 == 0
        )
        world.run()
        assert world.stream(seq) == stream[done:]
        last = world.of(Tokens, seq)[-1]
        assert last.finish is FinishReason.LENGTH
    assert last.tokens == ()
    assert last.offset == 10
    world.assert_quiet()


def test_impossible_submissions_are_refused_at_once() -> None:
    world = World(num_blocks=4, max_model_len=15, max_waiting=1)
    cases = [
        (world.submit(prompt(15)), ContextTooLong),
        (world.submit(prompt(18), generated=5, max_tokens=9), ContextTooLong),
        (world.submit([]), InvalidRequest),
        (world.submit(prompt(3), generated=3), InvalidRequest),
    ]
    world.submit(prompt(3))
    crowded = world.submit(prompt(3))
    world.turn()
    for seq, error in [*cases, (crowded, Overloaded)]:
        assert type(world.only(Failed, seq).error) is error
    world.run()
    world.assert_quiet()


def test_a_second_request_finds_the_blocks_of_the_first() -> None:
    world = World()
    first = world.submit(prompt(17), max_tokens=8)
    world.run()
    # A second turn of a chat: the first prompt, its answer but for the last token, and more.
    turn = prompt(17) + world.stream(first) + prompt(3, 5)
    second = world.submit(turn, max_tokens=3)
    world.run()
    assert world.stream(second) == world.expected(second)
    # 17 + 8 - 1 tokens have KV: 6 full blocks.
    assert world.of(Tokens, second)[-1].cached == CachedTokens(device=24)
    assert world.only(Admitted, second).device_hit_blocks == 6
    bypassing = world.submit(turn, max_tokens=3, bypass=True)
    world.run()
    assert world.stream(bypassing) == world.expected(bypassing)
    assert world.of(Tokens, bypassing)[-1].cached == CachedTokens()
    world.assert_quiet()


def test_the_last_token_is_always_computed() -> None:
    world = World()
    for _ in range(2):
        seq = world.submit(prompt(16), max_tokens=1)
        world.run()
    assert world.stream(seq) == world.expected(seq)
    assert world.of(Tokens, seq)[-1].cached == CachedTokens(device=12)


def test_equal_prompts_at_the_same_time_are_read_once() -> None:
    world = World(num_blocks=64, step_tokens=200, prefill_chunk=16)
    seqs = [world.submit(prompt(41), max_tokens=3) for _ in range(4)]
    world.run()
    for seq in seqs:
        assert world.stream(seq) == world.expected(seq)
    cached = [world.of(Tokens, seq)[-1].cached.device for seq in seqs]
    assert cached == [0, 40, 40, 40]
    assert world.inspect().blocks_cached == 10
    world.assert_quiet()


def test_when_blocks_run_out_the_youngest_makes_room() -> None:
    world = World(num_blocks=8, max_running=4)
    old = world.submit(prompt(9), max_tokens=16)
    young = world.submit(prompt(9, 1), max_tokens=16)
    world.run()
    assert world.stream(old) == world.expected(old)
    assert world.stream(young) == world.expected(young)
    assert world.of(Tokens, old)[-1].preemptions == 0
    assert world.of(Tokens, young)[-1].preemptions > 0
    assert len(world.of(Admitted, young)) == 1
    world.assert_quiet()


def test_the_oldest_waits_for_blocks_that_others_hold() -> None:
    """With nothing to preempt it keeps what it has, and goes on once a block is given back."""
    world = World(num_blocks=8)
    held = world.submit(prompt(20), Job.PREFILL)
    running = world.submit(prompt(9, 1), max_tokens=9)
    world.turn(20)
    said = len(world.stream(running))
    assert said == 4  # 3 blocks hold 12 tokens, the last one sampled has none
    steps = world.engine.snapshot().steps
    world.turn(20)
    counts = world.engine.snapshot()
    assert (counts.steps, counts.running, counts.preemptions) == (steps, 1, 0)
    world.post(Release(held))
    world.run()
    assert world.stream(running) == world.expected(running)
    world.assert_quiet()


def test_stop_ids_wait_for_min_tokens() -> None:
    world = World()
    stops = tuple(range(25))
    plain = world.submit(prompt(5), max_tokens=30, stop_token_ids=stops)
    patient = world.submit(prompt(5), max_tokens=30, stop_token_ids=stops, min_tokens=12)
    world.run()
    assert len(world.stream(plain)) < 12 < len(world.stream(patient))
    for seq in (plain, patient):
        assert world.stream(seq) == world.expected(seq)


@pytest.mark.parametrize("job", [Job.GENERATE, Job.PREFILL])
@pytest.mark.parametrize("least", range(5))
def test_a_stop_id_that_a_client_sends_counts_as_one_that_was_sampled(job: Job, least: int) -> None:
    """Three tokens were generated, the last a stop id: the third may be one if two were asked."""
    world = World()
    tokens = [*prompt(6), 1, 2, 49]
    seq = world.submit(
        tokens, job, generated=3, max_tokens=9, min_tokens=least, stop_token_ids=(49,)
    )
    world.run()
    ended = least < 3
    assert world.of(Tokens, seq)[0].finish is (FinishReason.STOP if ended else None)
    assert bool(world.of(Admitted, seq)) is not ended
    if job is Job.GENERATE:
        assert world.stream(seq) == world.expected(seq)
        assert len(world.stream(seq)) == (0 if ended else 6)


def test_priority_goes_before_arrival() -> None:
    world = World(max_running=1)
    late = world.submit(prompt(5), priority=1)
    urgent = world.submit(prompt(5, 1), priority=-1)
    normal = world.submit(prompt(5, 2))
    world.run()
    ends = [event.seq for event in world.of(Tokens) if event.finish]
    assert ends == [urgent, normal, late]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    world = World(num_blocks=8)
    world.submit(prompt(12), max_tokens=8)
    world.turn()
    large = world.submit(prompt(24, 1), max_tokens=2)
    small = world.submit(prompt(2, 2), max_tokens=2)
    world.run()
    order = [event.seq for event in world.of(Admitted)]
    assert order.index(large) < order.index(small)


def test_cancel_and_deadline_end_sequences_in_every_place() -> None:
    world = World(num_blocks=8, max_running=1)
    running = world.submit(prompt(5), max_tokens=50, deadline=10.0)
    waiting = world.submit(prompt(5, 1), deadline=5.0)
    other = world.submit(prompt(5, 2))
    world.turn(3)
    world.post(Cancel(other, Cancelled("the client went away")))
    world.turn()
    assert type(world.only(Failed, other).error) is Cancelled
    world.now = 5.0
    world.turn()
    assert type(world.only(Failed, waiting).error) is DeadlineExceeded
    assert world.of(Failed, running) == []
    world.now = 10.0
    world.turn()
    assert type(world.only(Failed, running).error) is DeadlineExceeded
    world.post(Cancel(running, Cancelled("too late")))
    world.turn()
    assert len(world.endings(running)) == 1
    world.assert_quiet()


def test_a_submission_repeated_under_its_id_changes_nothing() -> None:
    world = World()
    seq = world.submit(prompt(5), max_tokens=6)
    world.turn()
    world.post(world.submitted[seq])
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert len(world.endings(seq)) == 1
    world.assert_quiet()


def test_logprobs_of_prompt_and_answer_come_with_the_tokens() -> None:
    world = World(prefill_chunk=6)
    world.submit(prompt(17))
    world.run()
    seq = world.submit(prompt(17), max_tokens=3, prompt_logprobs=2, logprobs=1)
    world.run()
    events = world.of(Tokens, seq)
    tokens = prompt(17)
    assert events[0].prompt_logprobs == (
        None,
        *(MODEL.logprob(tokens[i], i, 2) for i in range(1, 17)),
    )
    assert all(event.prompt_logprobs == () for event in events[1:])
    assert all(event.tokens[0].logprob is not None for event in events)
    assert events[-1].cached == CachedTokens()
    only_prompt = world.submit(prompt(17), max_tokens=0, prompt_logprobs=2)
    world.run()
    event = world.only(Tokens, only_prompt)
    assert (event.tokens, event.finish) == ((), FinishReason.LENGTH)
    assert event.prompt_logprobs == events[0].prompt_logprobs


def test_a_prefill_offers_its_blocks_and_holds_them() -> None:
    world = World(prefill_chunk=8)
    tokens = prompt(18)
    seq = world.submit(tokens, Job.PREFILL, max_tokens=5, deadline=100.0)
    world.run()
    ready = world.of(BlocksReady, seq)
    assert [(event.first_index, len(event.blocks)) for event in ready] == [(0, 2), (2, 2), (4, 1)]
    assert all(event.chunk is not None for event in ready)
    blocks = [block for event in ready for block in event.blocks]
    assert all(world.holds(block, tokens, i) for i, block in enumerate(blocks))
    event = world.only(Tokens, seq)
    assert [token.token_id for token in event.tokens] == world.expected(seq)[:1]
    assert event.finish is None
    assert len(event.chunks) == 3
    world.now = 200.0
    world.turn()
    counts = world.inspect()
    assert (counts.held, counts.running, counts.idle) == (1, 0, False)
    assert world.of(Failed, seq) == []
    # Another one finds the full blocks, and says so first.
    second = world.submit(tokens, Job.PREFILL, max_tokens=1)
    world.run()
    ready = world.of(BlocksReady, second)
    assert [(event.first_index, event.blocks) for event in ready] == [
        (0, tuple(blocks[:4])),
        (4, ready[1].blocks),
    ]
    assert ready[0].chunk is None
    assert world.only(Tokens, second).finish is FinishReason.LENGTH
    world.post(Release(seq))
    world.post(Release(second))
    world.post(Release(second))
    world.turn()
    world.assert_quiet()


def test_a_prefill_whose_peer_went_away_ends_and_frees() -> None:
    world = World(prefill_chunk=4)
    early = world.submit(prompt(20), Job.PREFILL)
    late = world.submit(prompt(20, 1), Job.PREFILL)
    world.turn()
    world.post(Release(early))
    world.run()
    assert type(world.only(Failed, early).error) is Cancelled
    world.post(Cancel(late, Cancelled("the peer is gone")))
    world.turn()
    assert world.of(Failed, late) == []
    world.assert_quiet()


def test_a_row_that_cannot_be_computed_costs_its_own_sequence_alone() -> None:
    world = World()
    world.runner.poison = 49
    good = world.submit([1, 2, 3], max_tokens=2)
    bad = world.submit([1, 49, 3])
    world.run()
    assert world.stream(good) == world.expected(good)
    assert type(world.only(Failed, bad).error) is InternalError
    assert world.engine.failure is None
    world.assert_quiet()


def test_the_index_is_told_as_it_changes() -> None:
    world = World(num_blocks=6)
    tokens = prompt(13)
    world.submit(tokens, max_tokens=5)
    world.run()
    keys = KEYS.chain(ROOT, tokens + world.stream(SeqId(bytes(16)))[:-1], 4)
    stored = world.of(Stored)
    assert tuple(key for event in stored for key in event.keys) == keys
    assert [event.parent for event in stored] == [None, keys[2]]
    assert stored[0].token_ids == tuple(tokens[:12])
    world.submit(prompt(10, 9), max_tokens=1)
    world.run()
    assert world.only(Removed).keys == (keys[3],)
    world.post(Forget((keys[1],)))
    world.turn()
    assert set(world.of(Removed)[1].keys) == {keys[1], keys[2]}
    world.post(FlushDevice())
    world.turn()
    assert len(world.of(Cleared)) == 1
    assert world.inspect().blocks_free == 6


def test_what_is_computed_on_forgotten_blocks_is_not_found() -> None:
    world = World()
    tokens = prompt(8)
    seq = world.submit(tokens, max_tokens=9)
    world.turn(2)
    world.post(Forget(KEYS.chain(ROOT, tokens, 4)[:1]))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert len(world.of(Stored)) == 1
    counts = world.inspect()
    assert (counts.blocks_cached, counts.blocks_free) == (0, 16)


def test_missing_keys_are_made_up_for() -> None:
    """A submission whose keys are fewer than its full blocks is cached all the same."""
    world = World()
    tokens = prompt(12)
    attempt = AttemptTokens(tuple(tokens), 12, ROOT, KEYS.chain(ROOT, tokens, 4)[:1])
    world.post(Submit(SeqId(b"x" * 16), Job.GENERATE, attempt, Sampling(max_tokens=1)))
    world.run()
    assert world.only(Stored).keys == KEYS.chain(ROOT, tokens, 4)
