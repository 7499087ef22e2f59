"""What becomes of a request whose attempt failed: a pure decision.

    decide(history, failure, limits) -> Retry(history', delay) | GiveUp(error)

Caps count attempts whose decode worker wrote no token, so a request that gets on is never given up
before its deadline. A worker that drains, and one that is full while an answer is already on its
way, cost nothing: the request goes elsewhere, or comes back later.

When the next attempt may begin is the recovery budget's to say (router/budget.py); those that a
drain drove away are exempt from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdserve.config import RouterConfig
from pdserve.errors import Cancelled, Draining, Overloaded, PdserveError
from pdserve.types import Incarnation

BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    prefill: int
    decode: int
    strict: bool

    @staticmethod
    def of(config: RouterConfig) -> Limits:
        return Limits(config.attempts_prefill, config.attempts_decode, config.strict)


@dataclass(frozen=True, slots=True)
class History:
    """What failed since a decode worker last wrote a token."""

    failed: frozenset[Incarnation] = frozenset()
    prefill_failures: int = 0
    decode_failures: int = 0
    prefill_given_up: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    error: PdserveError
    # As the worker said; it knows what a repetition would meet.
    retryable: bool
    decode: Incarnation
    # The prefill worker, if the failure is its fault.
    prefill: Incarnation | None
    # The attempt's decode worker wrote tokens before it failed.
    progressed: bool
    # The client already has tokens of this request, from whichever attempt.
    streaming: bool


@dataclass(frozen=True, slots=True)
class Retry:
    history: History
    delay_s: float = 0.0
    exempt: bool = False  # from the recovery budget


@dataclass(frozen=True, slots=True)
class GiveUp:
    error: PdserveError


def decide(history: History, failure: Failure, limits: Limits) -> Retry | GiveUp:
    if not failure.retryable and not isinstance(failure.error, Cancelled):
        # Cancelled, though the router cancelled nothing: the worker's lease ran out.
        return GiveUp(failure.error)
    if failure.progressed:
        history = History()
    if failure.prefill is not None:
        return _prefill_failed(history, failure, failure.prefill, limits)
    again = failure.decode in history.failed
    history = replace(history, failed=history.failed | {failure.decode})
    drained = isinstance(failure.error, Draining)
    if failure.progressed or drained:
        return Retry(history, BACKOFF_MAX_S if again else 0.0, exempt=drained)
    if failure.streaming and isinstance(failure.error, Overloaded):
        return Retry(history, failure.error.retry_after_s or BACKOFF_MAX_S)
    count = history.decode_failures + 1
    if count >= limits.decode:
        return GiveUp(failure.error)
    return Retry(replace(history, decode_failures=count), _delay(count))


def _prefill_failed(
    history: History, failure: Failure, prefill: Incarnation, limits: Limits
) -> Retry | GiveUp:
    again = prefill in history.failed
    history = replace(history, failed=history.failed | {prefill})
    drained = isinstance(failure.error, Draining)
    if failure.progressed or drained:
        return Retry(history, BACKOFF_MAX_S if again else 0.0, exempt=drained)
    count = history.prefill_failures + 1
    history = replace(history, prefill_failures=count)
    if count < limits.prefill:
        return Retry(history, _delay(count))
    if limits.strict:
        return GiveUp(failure.error)
    return Retry(replace(history, prefill_given_up=True))


def _delay(count: int) -> float:
    """The first repetition is immediate: most failures are one worker's."""
    return 0.0 if count <= 1 else min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (count - 2))
