"""What came from a request's workers, applied to its log: the inside of the token path.

    items of the inbox -> Relayed(accepted, finish | failure | parked)   or raise: the request ends

An attempt that breaks the protocol (a gap, a repeat, a token that cannot be) has failed: nothing of
that reaches the client, and another worker continues.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.errors import PdserveError, ProtocolError, from_wire
from pdserve.rpc.convert_timeline import phases_from_proto
from pdserve.types import FinishReason
from pdserve.v1 import worker_pb2
from router.attempt import Attempt
from router.counters import Counters
from router.inbox import AttemptLost, Ended, Item, Parked
from router.recovery import Failure
from router.request_log import Accepted, RequestLog

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Relayed:
    """What one visit to the inbox came to: at most one of the last three is set."""

    accepted: Sequence[Accepted]
    finish: FinishReason | None = None
    failure: Failure | None = None
    parked: bool = False


def relay(request: RequestLog, items: Sequence[Item], counters: Counters) -> Relayed:
    """Applies items in order, up to the running attempt's end. Raises what ends the request."""
    attempt = request.attempt
    assert attempt is not None
    accepted: list[Accepted] = []
    for item in items:
        if isinstance(item, worker_pb2.AttemptEvent):
            if item.attempt_id != attempt.id:
                counters.late_events += 1
                continue
            part = _apply(request, attempt, item, counters)
            if isinstance(part, Failure):
                return Relayed(accepted, failure=part)
            if part.tokens or part.prompt_logprobs or part.finish is not None:
                accepted.append(part)
            if part.finish is not None:
                return Relayed(accepted, finish=part.finish)
        elif isinstance(item, Ended):
            raise item.error
        elif isinstance(item, AttemptLost) and item.attempt == attempt.id:
            lost = _failure(request, attempt, item.error, blame_prefill=item.blame_prefill)
            return Relayed(accepted, failure=lost)
        elif isinstance(item, Parked) and item.attempt == attempt.id:
            return Relayed(accepted, parked=True)
    return Relayed(accepted)


def _apply(
    request: RequestLog,
    attempt: Attempt,
    event: worker_pb2.AttemptEvent,
    counters: Counters,
) -> Accepted | Failure:
    try:
        if event.HasField("failure"):
            request.timeline.add(phases_from_proto(event.phases))
            return _reported(request, attempt, event.failure)
        part = request.accept(event)
    except ProtocolError as error:
        counters.protocol_errors += 1
        worker = attempt.placement.decode.facts.id
        log.error("request %s: worker %s: %s", request.job.request_id, worker, error)
        return _failure(request, attempt, error)
    if attempt.progressed(len(request.generated)):
        attempt.prompt_read()
    return part


def _reported(request: RequestLog, attempt: Attempt, said: worker_pb2.AttemptFailure) -> Failure:
    """The worker's own word on why its attempt failed, and whose fault it is."""
    retry_after = said.retry_after_ms / 1000 if said.retry_after_ms else None
    error = from_wire(said.code, said.message, retry_after)
    prefill = attempt.placement.prefill
    blamed = prefill is not None and said.suspect_worker == prefill.facts.id
    return _failure(request, attempt, error, retryable=said.retryable, blame_prefill=blamed)


def _failure(
    request: RequestLog,
    attempt: Attempt,
    error: PdserveError,
    *,
    retryable: bool = True,
    blame_prefill: bool = False,
) -> Failure:
    placement = attempt.placement
    peer = None if placement.prefill is None else placement.prefill.facts.incarnation
    return Failure(
        error=error,
        retryable=retryable,
        decode=placement.decode.facts.incarnation,
        prefill=peer if blame_prefill else None,
        progressed=attempt.progressed(len(request.generated)),
        streaming=bool(request.generated),
    )
