"""What each step computes: a plan over the board, without a model, a clock or a thread.

    handle(command, now)...  expire(now)  plan() -> rows  [computed]  apply(plan, results)

A plan has one row for every RUNNING sequence, then prefill chunks in order of age under
``step_tokens`` and ``prefill_chunk``. Admission is strictly in order of (priority, arrival), all
blocks of a sequence or none; local work and imports wait in the same line.

Why it always gets on:

- *Running out of blocks.* RUNNING sequences take their next block oldest first. One that finds none
  preempts the youngest of PREFILLING and RUNNING, itself if that is the youngest; never the oldest.
  So each preemption leaves an older one that can go on, and every preempted sequence comes back in
  its old place. While something runs, admission leaves one block for each running sequence, and
  nothing is admitted in a step that preempted: what was just freed is not at once taken again.
- *The oldest alone.* With nothing left to preempt, all other blocks belong to HELD, FETCHING or
  RECEIVING sequences, to PREFILL jobs, to pins, or to ended sequences that are still written to.
  The oldest then sits out steps. None of those waits for it: PREFILL jobs have all their blocks;
  tiers, write-back and hand-offs answer in bounded time; a receiver's peer reserved its blocks
  before this engine did (the grant comes after Started); HELD is bounded by the role's lease, and
  every sequence by its deadline.
- *A hand-off in both directions* between two engines that both prefill and decode could make each
  one's HELD blocks wait for the other's admission; the lease and the deadlines end that too.

PREFILL jobs are never preempted: their blocks were offered to a peer.
A plan without rows means that only a command or a deadline can change anything, unless the plan
preempted: then the next one may admit.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdserve.engine.api import BlockHasher, EngineSnapshot, Event, Job, SeqId, Submit
from pdserve.engine.board import Board, OpenSampler, unanswered
from pdserve.engine.commands import SchedulerCommand, handle
from pdserve.engine.kv_book import KvBook
from pdserve.engine.limits import Limits
from pdserve.engine.sequence import Sequence
from pdserve.engine.step import Row, RowResult
from pdserve.errors import DeadlineExceeded, InternalError, PdserveError
from pdserve.lifecycle import SequenceState
from pdserve.types import BlockKey, ChunkTiming, FinishReason

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """One row and what it is for."""

    seq: Sequence
    row: Row
    last: bool  # the row computes the last known token
    # (block, tokens in it): positions after these are to be zeroed once the row is computed.
    zero_tail: tuple[int, int] | None = None


@dataclass(slots=True)
class Plan:
    work: list[Work] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Owned by the engine's thread. ``take_events`` hands out what happened since the last call."""

    def __init__(
        self,
        limits: Limits,
        generations: npt.NDArray[np.uint64],
        hasher: BlockHasher,
        has_tiers: bool,
        open_sampler: OpenSampler,
    ) -> None:
        self.limits = limits
        self._events: list[Event] = []
        self.kv = KvBook(limits, generations, hasher, has_tiers, self._events)
        self.board = Board(limits, self.kv, open_sampler, self._events)
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, SeqId]] = []  # heap
        # (head of the queue, state of the board) of an admission that failed.
        self._no_room: tuple[Sequence, int, int] | None = None

    def take_events(self) -> list[Event]:
        self.kv.write_back()
        events = self._events.copy()
        self._events.clear()
        return events

    def take_last_events(self) -> list[Event]:
        """Events that are left after a bug; asks nothing of the pool."""
        return self._events.copy()

    def unanswered(self) -> list[Sequence]:
        """Sequences whose ending is still to come."""
        return unanswered(self.board.sequences.values())

    # ---- commands and time -----------------------------------------------------------------------

    def handle(self, command: SchedulerCommand, now: float) -> None:
        self._arrivals += 1
        self.board.now = now
        if not handle(self.board, command, self._arrivals):
            log.debug("%s came too late", type(command).__name__)
        elif isinstance(command, Submit) and command.deadline < float("inf"):
            heapq.heappush(self._deadlines, (command.deadline, self._arrivals, command.seq))

    def expire(self, now: float) -> None:
        """Fails the sequences whose deadline has passed. HELD ones are bounded by their lease."""
        self.board.now = now
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = self._expiring(heapq.heappop(self._deadlines))
            if seq is not None and seq.state is not SequenceState.HELD:
                self.board.fail(seq, DeadlineExceeded("the deadline passed on the worker"))

    def next_deadline(self) -> float:
        """When ``expire`` has something to do; infinity for never."""
        while self._deadlines and self._expiring(self._deadlines[0]) is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def _expiring(self, entry: tuple[float, int, SeqId]) -> Sequence | None:
        """The sequence of an entry, unless it has ended."""
        seq = self.board.sequences.get(entry[2])
        return seq if seq is not None and seq.order[1] == entry[1] else None

    def fail_all(self, error: PdserveError) -> None:
        for seq in self.unanswered():
            self.board.fail(seq, error)

    # ---- planning --------------------------------------------------------------------------------

    def plan(self) -> Plan:
        plan = Plan()
        self._plan_decode(plan)
        if not plan.preempted:
            self._admit()
        self._plan_prefill(plan)
        return plan

    def _plan_decode(self, plan: Plan) -> None:
        size = self.limits.block_size
        for seq in self.board.active:
            # An older one may have preempted it in this very loop.
            if seq.state is not SequenceState.RUNNING:
                continue
            known = len(seq.tokens)
            if known > len(seq.blocks) * size and not self._grow(seq, plan):
                continue
            row = Row((seq.tokens[-1],), known - 1, seq.table, seq.sampler)
            plan.work.append(Work(seq, row, last=True))

    def _grow(self, seq: Sequence, plan: Plan) -> bool:
        """One more block for a RUNNING sequence, at the expense of the youngest."""
        if self.kv.grow(seq):
            return True
        oldest = True
        for victim in self.board.active.youngest():
            if victim.job is Job.PREFILL:
                continue
            if victim is seq:
                # All younger ones are gone already. Preempt it, unless it is the oldest.
                oldest = self._is_oldest(seq)
                break
            self.board.preempt(victim)
            plan.preempted = True
            if self.kv.grow(seq):
                return True
        if not oldest:
            self.board.preempt(seq)
            plan.preempted = True
        return False

    def _is_oldest(self, seq: Sequence) -> bool:
        for each in self.board.active:
            if each.job is not Job.PREFILL:
                return each is seq
        return True

    def _admit(self) -> None:
        board = self.board
        while (seq := board.waiting.first()) is not None:
            if board.busy >= self.limits.max_running:
                return
            tried = (seq, self.kv.pool.version, board.moves)
            if self._no_room == tried:
                return
            running = board.counts[SequenceState.RUNNING]
            if not self.kv.reserve(seq, spare=running):
                self._no_room = (seq, self.kv.pool.version, board.moves)
                return
            board.admit(seq)

    def _plan_prefill(self, plan: Plan) -> None:
        budget = self.limits.step_tokens - len(plan.work)
        coming: set[BlockKey] = set()  # blocks that this step computes
        for seq in self.board.active:
            if budget <= 0:
                return
            if seq.state is not SequenceState.PREFILLING:
                continue
            if seq.caches:
                self.board.adopt(seq)
                if self._next_key(seq) in coming:
                    continue  # an older sequence computes it now: adopt it in the next step
            count = self._chunk(seq, budget)
            last = seq.computed + count == seq.known
            if last and seq.generated < seq.sampling.max_tokens and not self._ready(seq):
                continue
            plan.work.append(self._chunk_work(seq, count, last))
            budget -= count
            if seq.caches:
                size = self.limits.block_size
                coming.update(seq.keys[seq.computed // size : (seq.computed + count) // size])

    def _ready(self, seq: Sequence) -> bool:
        return self.board.open_sampler(seq)

    def _next_key(self, seq: Sequence) -> BlockKey | None:
        index = seq.computed // self.limits.block_size
        if seq.computed % self.limits.block_size or index >= self.kv.cacheable(seq):
            return None
        return seq.keys[index]

    def _chunk(self, seq: Sequence, budget: int) -> int:
        """Tokens of the next chunk; one that is not the last ends with a block where it can."""
        left = seq.known - seq.computed
        count = min(left, budget, self.limits.prefill_chunk)
        beyond = (seq.computed + count) % self.limits.block_size
        return count - beyond if count < left and beyond < count else count

    def _chunk_work(self, seq: Sequence, count: int, last: bool) -> Work:
        start, end = seq.computed, seq.computed + count
        targets: list[int] = []
        if seq.wants_prompt_logprobs and not seq.spoke:
            targets = seq.tokens[start + 1 : min(end + 1, seq.prompt_len)]
        row = Row(
            tokens=seq.tokens[start:end],
            start=start,
            block_table=seq.table,
            sampler=seq.sampler if last else None,
            prompt_logprobs=seq.sampling.prompt_logprobs if targets else None,
            targets=targets,
        )
        tail = None
        if last and seq.job is Job.PREFILL and end % self.limits.block_size:
            tail = (seq.blocks[-1], end % self.limits.block_size)
        return Work(seq, row, last, tail)

    # ---- results ---------------------------------------------------------------------------------

    def apply(
        self,
        plan: Plan,
        results: Seq[RowResult | PdserveError],
        started: float,
        ended: float,
    ) -> None:
        """``results[i]`` is what came of ``plan.work[i]``; times of the whole step, in seconds."""
        self.board.now = ended
        for work, result in zip(plan.work, results, strict=True):
            if isinstance(result, PdserveError):
                self.board.fail(work.seq, result)
            elif work.seq.state is SequenceState.RUNNING:
                self.board.computed(work.seq, 1)
                self._sampled(work, result)
            else:
                self._chunk_done(work, result, started, ended)

    def _chunk_done(self, work: Work, result: RowResult, started: float, ended: float) -> None:
        seq, row = work.seq, work.row
        chunk = ChunkTiming(row.start, len(row.tokens), started, ended)
        seq.journal.computed(started, ended, len(row.tokens))
        if not seq.spoke:
            seq.chunks.append(chunk)
            if seq.wants_prompt_logprobs:
                if row.start == 0:
                    seq.prompt_logprobs.append(None)
                seq.prompt_logprobs.extend(result.prompt_logprobs)
        self.board.computed(seq, len(row.tokens))
        if seq.job is Job.PREFILL:
            self.board.report(seq, chunk)
        if work.last:
            self._sampled(work, result)

    def _sampled(self, work: Work, result: RowResult) -> None:
        if result.token is not None:
            self.board.take_token(work.seq, result.token)
        elif work.row.sampler is None:
            self.board.finish(work.seq, FinishReason.LENGTH)
        else:
            self.board.fail(work.seq, InternalError("the runner sampled no token"))

    # ---- accounts --------------------------------------------------------------------------------

    def snapshot(self, steps: int, check: bool) -> EngineSnapshot:
        """Counts of this moment; ``check`` also looks for broken invariants, in O(blocks)."""
        board, pool, counts = self.board, self.kv.pool, self.board.counts
        return EngineSnapshot(
            steps=steps,
            running=(
                counts[SequenceState.RUNNING]
                + counts[SequenceState.PREFILLING]
                + counts[SequenceState.FETCHING]
            ),
            waiting=counts[SequenceState.WAITING],
            waiting_tokens=board.owed,
            held=counts[SequenceState.HELD],
            receiving=counts[SequenceState.RECEIVING],
            blocks_free=pool.free,
            blocks_cached=pool.cached,
            blocks_used=pool.used,
            blocks_total=pool.num_blocks,
            pins=self.kv.pinned,
            preemptions=board.preemptions,
            violations=board.violations() if check else (),
            idle=board.idle,
        )
