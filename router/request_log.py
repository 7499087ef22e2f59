"""A request's log: all that is needed to continue it elsewhere, and how its answer was made.

    log = RequestLog(job)
    log.begin(attempt)            a worker was asked to continue after the tokens so far
    log.accept(event) -> Accepted what the event adds; ProtocolError for a gap or a repeat
    log.lose()                    that attempt is over without an ending
    log.finish() / log.fail()

States and moves are lifecycle.REQUEST. Tokens enter in order, each once; what a client was sent is
always a prefix of the log. Nothing here waits or sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cache_tiers.keys import KeyMaker
from pdserve.errors import PdserveError, ProtocolError
from pdserve.lifecycle import REQUEST, RequestEvent, RequestState
from pdserve.rpc import convert
from pdserve.rpc.convert_timeline import phases_from_proto
from pdserve.telemetry.timeline import Phase, PhaseName
from pdserve.types import (
    AttemptTokens,
    BlockKey,
    CachedTokens,
    ChunkTiming,
    FinishReason,
    ModelFacts,
    Sampling,
    TokenLogprob,
    TokenOut,
    Usage,
)
from pdserve.v1 import worker_pb2
from router.api import Delta, Job
from router.attempt import Attempt
from router.inbox import Inbox
from router.timelines import Timeline


@dataclass(frozen=True, slots=True)
class Accepted:
    """What one event added to the log."""

    offset: int
    tokens: tuple[TokenOut, ...]
    finish: FinishReason | None
    prompt_logprobs: tuple[TokenLogprob | None, ...]


class RequestLog:
    """One running request. Event loop only."""

    def __init__(self, job: Job, timeline: Timeline | None = None) -> None:
        """``timeline`` None: nobody will look at it."""
        self.job = job
        self.timeline = timeline or Timeline(job)
        self.timeline.watch(self.usage)
        self.inbox = Inbox()
        self.state = RequestState.ACCEPTED
        self.generated: list[int] = list(job.generated)
        self.attempt: Attempt | None = None
        self.attempts = 0
        self.resumes = 0
        # The model whose workers may continue this request, from its first attempt on.
        self.model: ModelFacts | None = None
        self._root: BlockKey | None = None
        self._keys: list[BlockKey] = []
        self._prompt_logprobs_sent = False
        self._before = _HowMade()
        self._now = _HowMade()
        # Why the router ends it, once it does: its deadline, a take-over, a shutdown.
        self.ended_for: PdserveError | None = None

    # ---- asking workers -------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.job.prompt) + len(self.generated)

    @property
    def bypass_cache(self) -> bool:
        """Prompt logprobs need every position computed; once sent, they are not asked for again."""
        return self.job.sampling.prompt_logprobs is not None and not self._prompt_logprobs_sent

    def bind(self, model: ModelFacts, maker: KeyMaker) -> None:
        """The model that serves this request; one that already wrote tokens never changes."""
        if self.model is not None and self.model.fingerprint == model.fingerprint:
            return
        assert self.model is None or len(self.generated) == len(self.job.generated)
        self.model = model
        self._root = maker.root(model.fingerprint, self.job.salt)
        self._keys = []

    def keys(self, maker: KeyMaker, length: int) -> Sequence[BlockKey]:
        """Keys of the full blocks of the first ``length`` tokens; each is computed once."""
        assert self.model is not None
        assert self._root is not None
        size = self.model.block_size
        have = len(self._keys) * size
        if length - have >= size:
            parent = self._keys[-1] if self._keys else self._root
            self._keys.extend(maker.chain(parent, self._tokens(have, length), size))
        return self._keys[: length // size]

    def attempt_tokens(self, maker: KeyMaker) -> AttemptTokens:
        assert self._root is not None
        return AttemptTokens(
            token_ids=self.job.prompt + tuple(self.generated),
            prompt_len=len(self.job.prompt),
            key_root=self._root,
            block_keys=tuple(self.keys(maker, self.length)),
            bypass_cache=self.bypass_cache,
        )

    def attempt_sampling(self) -> Sampling:
        if self._prompt_logprobs_sent:
            return replace(self.job.sampling, prompt_logprobs=None)
        return self.job.sampling

    def _tokens(self, start: int, end: int) -> Sequence[int]:
        prompt = self.job.prompt
        cut = len(prompt)
        if start >= cut:
            return self.generated[start - cut : end - cut]
        return [*prompt[start:end], *self.generated[: max(0, end - cut)]]

    # ---- life -----------------------------------------------------------------------------------

    def _move(self, event: RequestEvent) -> None:
        self.state = REQUEST.next(self.state, event)

    def begin(self, attempt: Attempt) -> None:
        self._move(RequestEvent.PLACE)
        placement = attempt.placement
        self.timeline.leave("pair" if placement.skip is None else placement.skip.value)
        self.timeline.enter(
            PhaseName.ATTEMPT,
            prefill_worker="" if placement.prefill is None else placement.prefill.facts.id,
            decode_worker=placement.decode.facts.id,
        )
        if self.attempts:
            self.resumes += 1
        self.attempts += 1
        self.attempt = attempt
        self._now = _HowMade(decode_worker=attempt.placement.decode.facts.id)

    def lose(self, why: str) -> None:
        """The attempt is over; the request is not."""
        self.timeline.leave(why, self._made_by_attempt())
        self.timeline.enter(PhaseName.RECOVER)
        self._move(RequestEvent.ATTEMPT_LOST)
        self._before = self._before.then(self._now)
        self._now = _HowMade()
        self.attempt = None

    def finish(self) -> None:
        self.timeline.leave("finished", self._made_by_attempt())
        self._move(RequestEvent.FINISH)

    def fail(self) -> None:
        self._move(RequestEvent.FAIL)

    def _made_by_attempt(self) -> int:
        return 0 if self.attempt is None else len(self.generated) - self.attempt.started_at

    @property
    def running(self) -> bool:
        return self.state not in (RequestState.FINISHED, RequestState.FAILED)

    def finished_by_itself(self) -> FinishReason | None:
        """Whether the tokens so far already end the sequence, so that nobody need be asked."""
        sampling, made = self.job.sampling, len(self.generated)
        if made > sampling.min_tokens and self.generated[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        if made >= sampling.max_tokens:
            return FinishReason.LENGTH
        if self.model is not None and made and self.length >= self.model.max_model_len:
            return FinishReason.LENGTH
        return None

    # ---- what workers say -----------------------------------------------------------------------

    def accept(self, event: worker_pb2.AttemptEvent) -> Accepted:
        """Appends the event's tokens. ProtocolError, and no change, if they do not fit here."""
        offset = len(self.generated)
        tokens = tuple(convert.token_out_from_proto(token) for token in event.tokens)
        if tokens:
            self._check(event.offset, tokens)
        finish = convert.finish_reason_from_proto(event.finish_reason)
        how = self._now
        phases: tuple[Phase, ...] = ()
        if event.HasField("facts"):
            phases = phases_from_proto(event.phases)
            how = _HowMade.read(event.facts, how.decode_worker)
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if event.prompt_logprobs and self.bypass_cache:
            prompt_logprobs = convert.prompt_logprobs_from_proto(event.prompt_logprobs)
            self._check_prompt_logprobs(prompt_logprobs)
        # Everything is checked; from here on nothing fails.
        self._now = how
        self.timeline.add(phases)
        self._prompt_logprobs_sent |= bool(prompt_logprobs)
        if tokens:
            self.generated.extend(token.token_id for token in tokens)
            self._move(RequestEvent.TOKENS)
        return Accepted(offset, tokens, finish, prompt_logprobs)

    def _check_prompt_logprobs(self, entries: Sequence[TokenLogprob | None]) -> None:
        if len(entries) != len(self.job.prompt):
            raise ProtocolError(
                f"{len(entries)} prompt logprobs for {len(self.job.prompt)} prompt tokens"
            )

    def _check(self, offset: int, tokens: Sequence[TokenOut]) -> None:
        assert self.model is not None
        made = len(self.generated)
        if offset != made:
            kind = "gap" if offset > made else "repeat"
            raise ProtocolError(f"{kind}: tokens at offset {offset}, expected {made}")
        if made + len(tokens) > self.job.sampling.max_tokens:
            raise ProtocolError(f"{made + len(tokens)} tokens, more than max_tokens")
        if any(token.token_id >= self.model.vocab_size for token in tokens):
            raise ProtocolError(f"a token id beyond the vocabulary of {self.model.vocab_size}")

    # ---- what clients hear ----------------------------------------------------------------------

    def delta(self, accepted: Sequence[Accepted], finish: FinishReason | None) -> Delta:
        """One message for consecutive events (none: an ending without tokens)."""
        if len(accepted) == 1:
            first = accepted[0]
            return Delta(first.offset, first.tokens, self.usage(), finish, first.prompt_logprobs)
        tokens = tuple(token for part in accepted for token in part.tokens)
        logprobs = next((part.prompt_logprobs for part in accepted if part.prompt_logprobs), ())
        offset = accepted[0].offset if accepted else len(self.generated)
        return Delta(offset, tokens, self.usage(), finish, logprobs)

    def usage(self) -> Usage:
        how = self._before.then(self._now) if self.resumes else self._now
        cached = how.cached or CachedTokens()
        return Usage(
            prompt_tokens=len(self.job.prompt),
            completion_tokens=len(self.generated),
            cached_tokens=cached,
            prefill_worker=how.prefill_worker,
            decode_worker=how.decode_worker,
            kv_bytes_transferred=how.kv_bytes,
            kv_transport=how.kv_transport,
            kv_skipped_reason="" if how.kv_bytes else how.kv_skipped_reason,
            preemptions=how.preemptions,
            resumes=self.resumes,
            chunks=how.chunks,
        )


@dataclass(frozen=True, slots=True)
class _HowMade:
    """How one attempt, or all attempts up to one, made their part of the answer."""

    decode_worker: str = ""
    prefill_worker: str = ""
    # Of the first attempt that told: later ones find the request's own blocks in caches.
    cached: CachedTokens | None = None
    kv_bytes: int = 0
    kv_transport: str = ""
    kv_skipped_reason: str = ""
    preemptions: int = 0
    chunks: tuple[ChunkTiming, ...] = ()

    @staticmethod
    def read(facts: worker_pb2.AttemptFacts, decode_worker: str) -> _HowMade:
        return _HowMade(
            decode_worker=decode_worker,
            prefill_worker=facts.prefill_worker,
            cached=convert.cached_tokens_from_proto(facts.cached_tokens),
            kv_bytes=facts.kv_bytes_transferred,
            kv_transport=facts.kv_transport,
            kv_skipped_reason=facts.kv_skipped_reason,
            preemptions=facts.preemptions,
            chunks=tuple(convert.chunk_timing_from_proto(chunk) for chunk in facts.chunks),
        )

    def then(self, later: _HowMade) -> _HowMade:
        """Both together: the later one's workers, the sum of what was moved and computed."""
        told = later.cached is not None  # an attempt that said nothing made nothing
        return _HowMade(
            decode_worker=later.decode_worker or self.decode_worker,
            prefill_worker=later.prefill_worker if told else self.prefill_worker,
            cached=self.cached or later.cached,
            kv_bytes=self.kv_bytes + later.kv_bytes,
            kv_transport=later.kv_transport or self.kv_transport,
            kv_skipped_reason=later.kv_skipped_reason if told else self.kv_skipped_reason,
            preemptions=self.preemptions + later.preemptions,
            chunks=self.chunks + later.chunks,
        )
