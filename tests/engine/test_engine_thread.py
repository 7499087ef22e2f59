"""The engine as its worker uses it: a thread, commands from others, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from engine_world import KEYS, MODEL, ROOT, prompt

from pdserve.config import EngineConfig
from pdserve.engine.api import (
    EngineSnapshot,
    Event,
    Failed,
    Inspect,
    Job,
    SeqId,
    Submit,
    Tokens,
)
from pdserve.engine.engine import Engine
from pdserve.engine.memory import PoolMemory, allocate_shared
from pdserve.engine.step import Row, RowResult
from pdserve.engine.synthetic import SyntheticRunner, expected_tokens, synthetic_layout
from pdserve.errors import DeadlineExceeded, Draining, InternalError, PdserveError
from pdserve.types import AttemptTokens, Incarnation, Sampling


class Listener:
    """Collects events; lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.fail_on_tokens = False
        self.broken_after: int | None = None  # endings that came before the engine broke
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[Event]) -> None:
        with self._changed:
            if self.fail_on_tokens and any(isinstance(event, Tokens) for event in events):
                self.fail_on_tokens = False
                raise RuntimeError("the sink broke")
            self.events.extend(events)
            self._changed.notify_all()

    def broke(self, _: PdserveError) -> None:
        self.broken_after = sum(isinstance(event, Failed) for event in self.events)

    def wait_for(self, found: Callable[[list[Event]], bool], timeout: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: found(self.events), timeout), self.events

    def ended(self, seq: SeqId) -> bool:
        return any(
            (isinstance(event, Tokens) and event.seq == seq and event.finish is not None)
            or (isinstance(event, Failed) and event.seq == seq)
            for event in list(self.events)
        )


@pytest.fixture
def listener() -> Listener:
    return Listener()


def new_pool() -> PoolMemory:
    return allocate_shared(32, synthetic_layout(4).span_bytes, Incarnation(b"i" * 16))


def engine_over(pool: PoolMemory, runner: SyntheticRunner, listener: Listener) -> Engine:
    return Engine(
        runner=runner,
        block_size=4,
        num_blocks=32,
        generations=pool.generations,
        config=EngineConfig(),
        hasher=KEYS.child,
        has_tiers=False,
        sink=listener,
        max_model_len=100,
        on_broken=listener.broke,
    )


@pytest.fixture
def engine(listener: Listener) -> Engine:
    pool = new_pool()
    return engine_over(pool, SyntheticRunner(pool, 4, MODEL), listener)


def submit(number: int, length: int = 9, max_tokens: int = 5, **fields: float) -> Submit:
    tokens = tuple(prompt(length, number))
    return Submit(
        SeqId(number.to_bytes(16, "big")),
        Job.GENERATE,
        AttemptTokens(tokens, length, ROOT, KEYS.chain(ROOT, tokens, 4)),
        Sampling(max_tokens=max_tokens, temperature=0.0),
        **fields,  # type: ignore[arg-type]
    )


def inspect(engine: Engine) -> EngineSnapshot:
    seen: list[EngineSnapshot] = []
    done = threading.Event()

    def read(snapshot: EngineSnapshot) -> None:
        seen.append(snapshot)
        done.set()

    engine.post(Inspect(read))
    assert done.wait(10)
    return seen[0]


class Device(SyntheticRunner):
    """Of a device that computes later, and at some point no more."""

    def __init__(self, pool: PoolMemory, listener: Listener) -> None:
        super().__init__(pool, 4, MODEL)
        self.listener = listener
        self.story: list[tuple[str, int]] = []  # and how many events had been told by then
        self.dead = False
        self.dies_after: int | None = None  # so many entries of the story

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        self.story.append(("step", len(self.listener.events)))
        self.dead = self.dies_after is not None and len(self.story) > self.dies_after
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")
        return super().step(rows)

    def finish(self) -> None:
        self.story.append(("finish", len(self.listener.events)))
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def device(listener: Listener) -> Iterator[tuple[Engine, Device]]:
    pool = new_pool()
    runner = Device(pool, listener)
    engine = engine_over(pool, runner, listener)
    engine.start()
    yield engine, runner
    engine.stop()


def test_nothing_is_told_of_a_step_before_the_device_has_finished_it(
    device: tuple[Engine, Device], listener: Listener
) -> None:
    engine, runner = device
    one = submit(1)
    engine.post(one)
    listener.wait_for(lambda _: listener.ended(one.seq))
    assert [name for name, _ in runner.story[:2]] == ["step", "finish"]
    pairs = zip(runner.story[::2], runner.story[1::2], strict=True)
    for (step, before), (finish, after) in pairs:
        assert (step, finish) == ("step", "finish")
        assert before == after


def test_a_device_that_is_gone_breaks_the_engine_and_not_each_request(
    device: tuple[Engine, Device], listener: Listener
) -> None:
    """A worker that fails every request at once would look like the least busy one."""
    engine, runner = device
    one = submit(1, max_tokens=80)
    runner.dies_after = 10
    engine.post(one)
    listener.wait_for(lambda _: listener.ended(one.seq))
    assert isinstance(engine.failure, InternalError)
    assert "illegal memory access" in str(engine.failure)
    assert listener.broken_after == 0, "a worker must end before it answers anything"


def test_many_threads_may_submit(engine: Engine, listener: Listener) -> None:
    engine.start()
    submits = [submit(number) for number in range(40)]
    threads = [
        threading.Thread(target=lambda part=submits[i::4]: [engine.post(each) for each in part])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listener.wait_for(lambda _: all(listener.ended(each.seq) for each in submits))
    for each in submits:
        stream = [
            token.token_id
            for event in listener.events
            if isinstance(event, Tokens) and event.seq == each.seq
            for token in event.tokens
        ]
        tokens = each.tokens
        assert stream == expected_tokens(MODEL, tokens.token_ids, tokens.prompt_len, each.sampling)
    counts = inspect(engine)
    assert (counts.violations, counts.idle, counts.blocks_used) == ((), True, 0)
    assert engine.snapshot().steps > 0
    engine.stop(10)


def test_an_idle_engine_sleeps(engine: Engine, listener: Listener) -> None:
    engine.start()
    engine.post(submit(1))
    listener.wait_for(lambda _: listener.ended(submit(1).seq))
    clock = time.pthread_getcpuclockid(engine._thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.1
    engine.stop(10)


def test_a_deadline_wakes_a_sleeping_engine(engine: Engine, listener: Listener) -> None:
    engine.start()
    tokens = tuple(prompt(9))
    waiting = Submit(
        SeqId(b"w" * 16),
        Job.IMPORT,
        AttemptTokens(tokens, 9, ROOT, KEYS.chain(ROOT, tokens, 4)),
        Sampling(max_tokens=5),
        deadline=time.monotonic() + 0.2,
    )
    engine.post(waiting)
    listener.wait_for(lambda _: listener.ended(waiting.seq))
    failed = [event for event in listener.events if isinstance(event, Failed)]
    assert type(failed[0].error) is DeadlineExceeded
    engine.stop(10)


def test_stopping_ends_what_lives(engine: Engine, listener: Listener) -> None:
    engine.start()
    tokens = tuple(prompt(9))
    attempt = AttemptTokens(tokens, 9, ROOT, KEYS.chain(ROOT, tokens, 4))
    engine.post(Submit(SeqId(b"a" * 16), Job.IMPORT, attempt, Sampling(max_tokens=5)))
    listener.wait_for(bool)
    engine.stop(10)
    failed = [event for event in listener.events if isinstance(event, Failed)]
    assert [type(event.error) for event in failed] == [Draining]
    with pytest.raises(Draining):
        engine.post(submit(1))


def test_a_bug_of_our_own_is_not_hidden(engine: Engine, listener: Listener) -> None:
    listener.fail_on_tokens = True
    engine.start()
    engine.post(submit(1, max_tokens=80))
    listener.wait_for(lambda _: listener.ended(submit(1).seq))
    assert isinstance(engine.failure, InternalError)
    assert listener.broken_after == 0, "a worker must end before it answers anything"
    steps = engine.snapshot().steps
    engine.post(submit(2))
    listener.wait_for(lambda _: listener.ended(submit(2).seq))
    counts = inspect(engine)
    assert counts.steps == steps
    assert not counts.idle
    assert counts.violations
    engine.stop(10)


def test_a_reader_that_raises_harms_nobody(engine: Engine, listener: Listener) -> None:
    def read(_: EngineSnapshot) -> None:
        raise ValueError("reader")

    engine.start()
    engine.post(Inspect(read))
    engine.post(submit(1))
    listener.wait_for(lambda _: listener.ended(submit(1).seq))
    assert engine.failure is None
    engine.stop(10)


def test_a_step_costs_little_and_no_more_with_a_long_context(listener: Listener) -> None:
    """Scheduling alone, on a runner that computes nothing: linear in rows, flat in context."""

    class Idle(SyntheticRunner):
        def _write(self, row: object) -> None: ...

        def _read(self, row: object) -> np.ndarray:
            return np.zeros((2, 1), dtype=np.uint32)

    def turns(length: int) -> float:
        blocks = 4096
        pool = allocate_shared(blocks, synthetic_layout(16).span_bytes, Incarnation(b"i" * 16))
        engine = Engine(
            runner=Idle(pool, 16, MODEL),
            block_size=16,
            num_blocks=blocks,
            generations=pool.generations,
            config=EngineConfig(step_tokens=4096, prefill_chunk=4096),
            hasher=KEYS.child,
            has_tiers=False,
            sink=listener,
            max_model_len=10_000,
        )
        for number in range(16):
            engine.post(submit(number, length, max_tokens=1000))
        while engine.snapshot().waiting_tokens or not engine.snapshot().steps:
            engine.turn(wait=False)
        best = float("inf")
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(10):
                engine.turn(wait=False)
            best = min(best, (time.perf_counter() - started) / 10 / 16)
        return best

    short, long = turns(40), turns(3000)
    print(f"per row and step: {short * 1e6:.1f} us short, {long * 1e6:.1f} us long context")
    assert short < 300e-6
    assert long < 3 * short + 50e-6
