"""An engine on the synthetic runner, turned by hand, with a fake clock: the stage of its tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from cache_tiers.keys import KeyMaker
from pdserve.config import EngineConfig
from pdserve.engine.api import (
    Command,
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
from pdserve.engine.memory import allocate_shared
from pdserve.engine.step import Row, RowResult
from pdserve.engine.synthetic import (
    SyntheticModel,
    SyntheticRunner,
    expected_tokens,
    synthetic_layout,
)
from pdserve.types import AttemptTokens, BlockKey, Incarnation, Sampling

KEYS = KeyMaker(b"a hash key of the tests")
ROOT = BlockKey(b"r" * 16)
MODEL = SyntheticModel(vocab_size=50)
E = TypeVar("E")


class BrokenStep(Exception):
    """What a runner raises for reasons of its own."""


class BrittleRunner(SyntheticRunner):
    """Breaks on rows that hold a poisoned token, or by chance; keeps the last step's rows.

    ``shared`` tells blocks that others can find: no row may write into one.
    """

    shared: Callable[[int], bool]

    poison: int | None = None
    chance: float = 0.0
    rng = random.Random(0)

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        if any(self.poison in row.tokens for row in rows):
            raise BrokenStep("poisoned row")
        if self.rng.random() < self.chance:
            super().step(rows[: len(rows) // 2])
            raise BrokenStep("bad luck")
        for row in rows:
            end = -(-(row.start + len(row.tokens)) // self._block_size)
            written = row.block_table[row.start // self._block_size : end]
            assert not any(self.shared(int(block)) for block in written)
        self.rows = list(rows)
        return super().step(rows)


@dataclass
class World:
    num_blocks: int = 16
    block_size: int = 4
    has_tiers: bool = False
    max_model_len: int = 200
    step_tokens: int = 64
    prefill_chunk: int = 16
    max_running: int = 8
    max_waiting: int = 100
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    batches: list[list[Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = synthetic_layout(self.block_size)
        self.pool = allocate_shared(self.num_blocks, layout.span_bytes, Incarnation(b"i" * 16))
        self.runner = BrittleRunner(self.pool, self.block_size, MODEL)
        self.words = self.pool.blocks.numpy().view(np.uint32)
        self.words = self.words.reshape(self.num_blocks, 2, self.block_size)
        self.submitted: dict[SeqId, Submit] = {}
        self.engine = Engine(
            runner=self.runner,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            generations=self.pool.generations,
            config=EngineConfig(
                step_tokens=self.step_tokens,
                prefill_chunk=self.prefill_chunk,
                max_running=self.max_running,
                max_waiting=self.max_waiting,
            ),
            hasher=KEYS.child,
            has_tiers=self.has_tiers,
            sink=self._sink,
            max_model_len=self.max_model_len,
            clock=lambda: self.now,
        )
        self.runner.shared = self.engine._scheduler.kv.pool.is_indexed

    def _sink(self, events: Sequence[Event]) -> None:
        self.batches.append(list(events))
        self.events.extend(events)

    # ---- acting ----------------------------------------------------------------------------------

    def submit(
        self,
        tokens: Sequence[int],
        job: Job = Job.GENERATE,
        *,
        max_tokens: int = 4,
        generated: int = 0,
        priority: int = 0,
        deadline: float = float("inf"),
        bypass: bool = False,
        **sampling: object,
    ) -> SeqId:
        seq = SeqId(len(self.submitted).to_bytes(16, "big"))
        attempt = AttemptTokens(
            tuple(tokens),
            len(tokens) - generated,
            ROOT,
            KEYS.chain(ROOT, tokens, self.block_size),
            bypass,
        )
        resolved = Sampling(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
        self.submitted[seq] = Submit(seq, job, attempt, resolved, priority, deadline)
        self.engine.post(self.submitted[seq])
        return seq

    def post(self, command: Command) -> None:
        self.engine.post(command)

    def turn(self, count: int = 1) -> list[Event]:
        """The events of ``count`` turns."""
        before = len(self.events)
        for _ in range(count):
            assert self.engine.turn(wait=False)
        return self.events[before:]

    def run(self, turns: int = 500) -> None:
        """Until no sequence runs or waits."""
        for _ in range(turns):
            self.turn()
            counts = self.engine.snapshot()
            if not counts.running and not counts.waiting:
                return
        raise AssertionError(f"still busy after {turns} turns: {self.engine.snapshot()}")

    # ---- looking ---------------------------------------------------------------------------------

    def of(self, kind: type[E], seq: SeqId | None = None) -> list[E]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (seq is None or getattr(event, "seq", None) == seq)
        ]

    def only(self, kind: type[E], seq: SeqId | None = None) -> E:
        found = self.of(kind, seq)
        assert len(found) == 1, found
        return found[0]

    def stream(self, seq: SeqId) -> list[int]:
        """All tokens of a sequence; offsets must follow one another."""
        tokens: list[int] = []
        offset = self.submitted[seq].tokens.generated
        for event in self.of(Tokens, seq):
            assert event.offset == offset + len(tokens)
            tokens += [token.token_id for token in event.tokens]
        return tokens

    def expected(self, seq: SeqId) -> list[int]:
        """What the model would write, up to the limits of context and pool."""
        submit = self.submitted[seq]
        tokens = submit.tokens
        stops = tokens.generated > submit.sampling.min_tokens
        if stops and tokens.token_ids[-1] in submit.sampling.stop_token_ids:
            return []
        room = min(self.max_model_len, self.num_blocks * self.block_size + 1)
        stream = expected_tokens(MODEL, tokens.token_ids, tokens.prompt_len, submit.sampling)
        return stream[: room - len(tokens.token_ids)]

    def endings(self, seq: SeqId) -> list[Event]:
        ends = [event for event in self.of(Tokens, seq) if event.finish is not None]
        return [*ends, *self.of(Failed, seq)]

    def inspect(self) -> EngineSnapshot:
        seen: list[EngineSnapshot] = []
        self.post(Inspect(seen.append))
        self.turn()
        return seen[0]

    def assert_quiet(self) -> None:
        """Nothing lives, and every block is free or cached."""
        counts = self.inspect()
        assert counts.violations == ()
        assert counts.idle
        assert counts.pins == 0
        assert counts.waiting_tokens == 0
        assert counts.blocks_used == 0
        assert counts.blocks_free + counts.blocks_cached == counts.blocks_total

    # ---- KV --------------------------------------------------------------------------------------

    def kv_of(self, tokens: Sequence[int], index: int) -> np.ndarray:
        """uint32 [2, block_size]: block ``index`` of these tokens, its unused tail zero."""
        block = np.zeros((2, self.block_size), dtype=np.uint32)
        part = MODEL.context(tokens)[:, index * self.block_size : (index + 1) * self.block_size]
        block[:, : part.shape[1]] = part
        return block

    def fill(self, block: int, tokens: Sequence[int], index: int) -> None:
        self.words[block] = self.kv_of(tokens, index)

    def scribble(self, block: int, rng: random.Random) -> None:
        self.words[block] = rng.randrange(1, 2**32)

    def holds(self, block: int, tokens: Sequence[int], index: int) -> bool:
        return bool((self.words[block] == self.kv_of(tokens, index)).all())


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % 50 for i in range(length)]
