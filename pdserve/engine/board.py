"""All sequences of an engine, and every move of one from a state to the next.

    waiting   WAITING, in order                active   PREFILLING and RUNNING, in order
    sequences every one that has not ended     ghosts   ended, but a caller may still write into
              (HELD ones included)                      their blocks

A move takes the sequence's blocks, queues, counters and events along, so that no caller can
forget one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pdserve.engine.api import (
    Admitted,
    BlockId,
    BlocksReady,
    Event,
    Failed,
    Job,
    Reserved,
    SeqId,
    TierRead,
    Tokens,
)
from pdserve.engine.kv_book import KvBook, Origin
from pdserve.engine.limits import Limits, finish_reason
from pdserve.engine.queues import OrderedQueue
from pdserve.engine.sequence import Lender, Sequence
from pdserve.engine.step import SamplerState
from pdserve.errors import InternalError, PdserveError
from pdserve.lifecycle import SequenceEvent, SequenceState
from pdserve.types import ChunkTiming, FinishReason, Sampling, TokenLogprob, TokenOut

OpenSampler = Callable[[Sampling, tuple[int, ...], int], SamplerState]

_BUSY = (
    SequenceState.FETCHING,
    SequenceState.PREFILLING,
    SequenceState.RECEIVING,
    SequenceState.RUNNING,
)


class Board:
    """Owned by the engine's thread. What happened is appended to ``events``."""

    def __init__(
        self, limits: Limits, kv: KvBook, open_sampler: OpenSampler, events: list[Event]
    ) -> None:
        self.limits = limits
        self.kv = kv
        self.events = events
        self.sequences: dict[SeqId, Sequence] = {}
        self.ghosts: dict[SeqId, Sequence] = {}
        self.waiting = OrderedQueue()
        self.active = OrderedQueue()
        self.counts = dict.fromkeys(SequenceState, 0)
        self.owed = 0  # tokens still to compute before sampling, over all sequences
        self.preemptions = 0
        self.moves = 0
        # The engine's clock at the last command or step; for journals alone, no move depends on it.
        self.now = 0.0
        self._open_sampler = open_sampler

    @property
    def busy(self) -> int:
        """Sequences that run or will run in this pool without further admission."""
        return sum(self.counts[state] for state in _BUSY)

    @property
    def idle(self) -> bool:
        return not (self.sequences or self.ghosts or self.kv.pinned)

    def _advance(self, seq: Sequence, event: SequenceEvent) -> None:
        self.counts[seq.state] -= 1
        seq.advance(event)
        self.counts[seq.state] += 1
        self.moves += 1

    def _owe(self, seq: Sequence, tokens: int) -> None:
        self.owed += tokens - seq.owed
        seq.owed = tokens

    # ---- arrival and admission -------------------------------------------------------------------

    def enqueue(self, seq: Sequence) -> None:
        self.sequences[seq.id] = seq
        self.counts[seq.state] += 1
        self.waiting.add(seq)
        seq.journal.waits(self.now)
        self._owe(seq, seq.known)

    def admit(self, seq: Sequence) -> None:
        """The waiting sequence has blocks for every known token: fetch what tiers may hold."""
        self.waiting.remove(seq)
        self._advance(seq, SequenceEvent.ADMIT)
        seq.journal.admitted(self.now, seq.committed, self.limits.block_size)
        if not seq.admitted_before:
            seq.admitted_before = True
            self.events.append(Admitted(seq.id, device_hit_blocks=seq.committed))
        first, end = seq.committed, self.kv.cacheable(seq)
        if self.kv.has_tiers and first < end:
            seq.lend(Lender.TIERS, first)
            blocks = tuple(BlockId(block) for block in seq.blocks[first:end])
            self.events.append(TierRead(seq.id, tuple(seq.keys[first:end]), blocks))
        else:
            self.begin(seq)

    def begin(self, seq: Sequence) -> None:
        """FETCHING is over: wait for a peer's blocks, or compute."""
        if seq.job is not Job.IMPORT:
            self._advance(seq, SequenceEvent.COMPUTE)
            self._start_computing(seq)
            return
        self._advance(seq, SequenceEvent.RECEIVE)
        self._owe(seq, 0)
        first = seq.computed // self.limits.block_size
        wanted = seq.blocks[first : self.limits.blocks_for(seq.known)]
        if wanted:
            seq.lend(Lender.IMPORT, first)
        self.events.append(
            Reserved(
                seq.id,
                first_wanted=first,
                blocks=tuple(BlockId(block) for block in wanted),
                cached=seq.cached(self.limits.block_size),
            )
        )

    def compute_instead(self, seq: Sequence, valid_blocks: int) -> None:
        """RECEIVING, and the hand-off failed: the first ``valid_blocks`` hold verified KV."""
        seq.lent_to = None
        seq.job = Job.GENERATE
        size = self.limits.block_size
        valid_blocks = seq.trusted(valid_blocks)
        seq.computed = valid_blocks * size
        # Whether the peer lived to write these to a slower tier is not known.
        self.kv.commit(seq, min(valid_blocks, self.kv.cacheable(seq)))
        self._advance(seq, SequenceEvent.HANDOFF_FAILED)
        self._start_computing(seq)

    def _start_computing(self, seq: Sequence) -> None:
        self.active.add(seq)
        size = self.limits.block_size
        # At least the last token is computed, and with prompt_logprobs all are.
        seq.computed = min(seq.computed, (seq.known - 1) // size * size)
        if seq.wants_prompt_logprobs and not seq.spoke:
            seq.computed = 0
        self._owe(seq, seq.known - seq.computed)
        if not self.kv.own_next_block(seq):
            self.preempt(seq)
        elif seq.job is Job.PREFILL:
            self.report(seq, None)

    # ---- computing -------------------------------------------------------------------------------

    def open_sampler(self, seq: Sequence) -> bool:
        """False when the sampler refused the sequence, which then has failed."""
        if seq.sampler is None:
            try:
                seq.sampler = self._open_sampler(seq.sampling, tuple(seq.tokens), seq.prompt_len)
            except Exception as error:
                self.fail(seq, _as_error(error, "the sampler could not be set up"))
                return False
        return True

    def computed(self, seq: Sequence, count: int) -> None:
        """KV of ``count`` more tokens is in the blocks."""
        seq.computed += count
        if seq.state is SequenceState.PREFILLING:
            self._owe(seq, seq.known - seq.computed)
        full = seq.computed // self.limits.block_size
        if full > seq.committed:
            self.kv.commit(seq, full)

    def adopt(self, seq: Sequence) -> None:
        """PREFILLING: takes over what another sequence has computed of the same prompt."""
        if self.kv.adopt(seq):
            self._owe(seq, seq.known - seq.computed)
            if seq.job is Job.PREFILL:
                self.report(seq, None)

    def report(self, seq: Sequence, chunk: ChunkTiming | None) -> None:
        """PREFILL: names the blocks that became final since the last report."""
        if seq.computed == seq.known:
            final = len(seq.blocks)
        else:
            final = seq.computed // self.limits.block_size
        if final > seq.reported:
            blocks = tuple(BlockId(block) for block in seq.blocks[seq.reported : final])
            self.events.append(BlocksReady(seq.id, seq.reported, blocks, chunk))
            seq.reported = final

    def preempt(self, seq: Sequence) -> None:
        """Gives all blocks up; the sequence keeps its tokens and its place in the order."""
        self.active.remove(seq)
        self._advance(seq, SequenceEvent.PREEMPT)
        self.kv.release(seq)
        seq.preemptions += 1
        if not seq.spoke:
            seq.prompt_logprobs.clear()
        self.preemptions += 1
        self.waiting.add(seq)
        seq.journal.waits(self.now)
        self._owe(seq, seq.known)

    # ---- tokens and endings ----------------------------------------------------------------------

    def arrived(self, seq: Sequence, from_cache: int) -> None:
        """RECEIVING, and every wanted block holds verified KV; see api.ImportDone."""
        seq.lent_to = None
        seq.computed = seq.known
        full = seq.known // self.limits.block_size
        self.kv.commit(seq, min(from_cache, seq.trusted(full)))
        self.kv.commit(seq, seq.trusted(full), Origin.PEER)
        # It goes on with what its peer verified, but nobody else is to find what is suspect.
        seq.chained = seq.chained and seq.trusted(full) == full
        self._advance(seq, SequenceEvent.ARRIVED)
        seq.journal.decodes(self.now)
        seq.job = Job.GENERATE
        self.active.add(seq)

    def take_token(
        self, seq: Sequence, token: TokenOut, finish: FinishReason | None = None
    ) -> None:
        """All known tokens are computed and ``token`` follows; it may end the sequence."""
        total = seq.known + 1
        reason = finish or finish_reason(
            seq.sampling, seq.job, token.token_id, seq.prompt_len, total, self.limits
        )
        if seq.job is Job.PREFILL:
            self.events.append(self._tokens(seq, (token,), reason, last=True))
            self._hold(seq)
            return
        if reason is not None:
            self.end(seq, self._tokens(seq, (token,), reason, last=True))
            return
        self.events.append(self._tokens(seq, (token,), None, last=False))
        seq.tokens.append(token.token_id)
        if seq.sampler is not None:
            seq.sampler.append(token.token_id)
        if seq.state is SequenceState.PREFILLING:
            self._advance(seq, SequenceEvent.COMPUTED)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """All known tokens are computed, and no room is left for a further one."""
        event = self._tokens(seq, (), reason, last=True)
        if seq.job is Job.PREFILL:
            self.events.append(event)
            self._hold(seq)
        else:
            self.end(seq, event)

    def fail(self, seq: Sequence, error: PdserveError) -> None:
        seq.journal.ended(self.now, seq.known)
        self.end(seq, Failed(seq.id, error, seq.journal.take()))

    def end(self, seq: Sequence, event: Tokens | Failed) -> None:
        """The one ending of a sequence. Blocks that are lent stay until their lender is done."""
        if seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
        elif seq.state in {SequenceState.PREFILLING, SequenceState.RUNNING}:
            self.active.remove(seq)
        self._strike(seq)
        if seq.lent_to is not None:
            self.ghosts[seq.id] = seq
        else:
            self.kv.release(seq)
        self.events.append(event)

    def release_held(self, seq: Sequence) -> None:
        """HELD, whose ending came already: nobody needs the blocks any more."""
        self._strike(seq)
        self.kv.release(seq)

    def bury(self, ghost: Sequence) -> None:
        """No one writes into the blocks of an ended sequence any more."""
        del self.ghosts[ghost.id]
        self.moves += 1
        self.kv.release(ghost)

    def _strike(self, seq: Sequence) -> None:
        self._advance(seq, SequenceEvent.FINISH)
        self.counts[seq.state] -= 1
        self._owe(seq, 0)
        del self.sequences[seq.id]

    def _hold(self, seq: Sequence) -> None:
        self.active.remove(seq)
        self._advance(seq, SequenceEvent.HOLD)
        self._owe(seq, 0)

    def _tokens(
        self,
        seq: Sequence,
        tokens: tuple[TokenOut, ...],
        reason: FinishReason | None,
        last: bool,
    ) -> Tokens:
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if not seq.spoke:
            seq.spoke = True
            prompt_logprobs = tuple(seq.prompt_logprobs)
            seq.prompt_logprobs.clear()
            seq.journal.first_token(self.now)
            if not last:
                phases = seq.journal.take()
                return Tokens(seq.id, seq.generated, tokens, None, prompt_logprobs, phases=phases)
        if not last:
            return Tokens(seq.id, seq.generated, tokens)
        if seq.job is not Job.PREFILL:
            seq.journal.ended(self.now, seq.known + len(tokens))
        return Tokens(
            seq.id,
            seq.generated,
            tokens,
            reason,
            prompt_logprobs,
            seq.cached(self.limits.block_size),
            tuple(seq.chunks),
            seq.preemptions,
            seq.journal.take(),
        )

    # ---- self-check ------------------------------------------------------------------------------

    def violations(self) -> tuple[str, ...]:
        return self.kv.violations((*self.sequences.values(), *self.ghosts.values()))


def unanswered(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Those whose ending is still to come; that of a HELD one came already."""
    return [seq for seq in sequences if seq.state is not SequenceState.HELD]


def _as_error(error: BaseException, what: str) -> PdserveError:
    if isinstance(error, PdserveError):
        return error
    wrapped = InternalError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def computing_failed(error: BaseException) -> PdserveError:
    """What a sequence is told whose step raised ``error``."""
    return _as_error(error, "computing the sequence failed")
