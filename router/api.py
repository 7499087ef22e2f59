"""The seam between the router's fronts and its dispatcher: jobs in, deltas out.

front:      bytes of a client -> Job (validated, tokenized)            validation, tokens
dispatcher: Job -> Delta...   (placement, attempts, resumes)           placement, dispatch
front:      Delta -> text, stop strings -> bytes for the client        text
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pdserve.telemetry.trace_context import TraceContext
from pdserve.types import (
    FinishReason,
    Load,
    ModelFacts,
    RequestId,
    Sampling,
    TokenLogprob,
    TokenOut,
    Usage,
    WorkerFacts,
    WorkerId,
    WorkerState,
)

if TYPE_CHECKING:
    from router.separation import Shortfall
    from router.timelines import Timeline


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, as authentication found out. ``salt`` separates tenants' cached blocks."""

    name: str
    salt: bytes


ANONYMOUS = Principal("anonymous", b"")


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate; every value validated, every default resolved."""

    request_id: RequestId
    principal: Principal
    prompt: tuple[int, ...]
    sampling: Sampling
    deadline: float  # seconds of time.monotonic()
    generated: tuple[int, ...] = ()  # resume after these
    salt: bytes = b""  # of the principal and the request's cache_salt together
    priority: int = 0
    resume: bool = False
    begun: float = 0.0  # when the request came, seconds of time.monotonic(); 0: not known
    trace: TraceContext | None = None  # None: nobody asked for one


@dataclass(frozen=True, slots=True)
class Delta:
    """Some tokens of a job, in order, without gap or repeat.

    The first has ``prompt_logprobs`` if asked for; each has the usage so far; the last, and only
    the last, has ``finish``. A job whose prompt and ``generated`` already meet a stop condition
    ends with one Delta without tokens.
    """

    offset: int  # index of tokens[0] among all generated tokens
    tokens: tuple[TokenOut, ...]
    usage: Usage
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker in a frozen snapshot of the registry."""

    facts: WorkerFacts
    state: WorkerState
    load: Load = field(default_factory=Load)
    # Attempts that the router sent and that have not ended.
    in_flight: int = 0
    # Prompt tokens that the router sent here to be read and has no first token for yet.
    pending_tokens: int = 0


class Dispatcher(Protocol):
    """What a front needs from the rest of the router."""

    def check_room(self, coming: int, prepared: int) -> None:
        """Before work is done for ``coming`` new jobs, while it is done for ``prepared`` others.

        Raises what ``generate`` would raise for want of a place: Overloaded, Draining.
        """
        ...

    def generate(self, job: Job, timeline: Timeline | None = None) -> AsyncIterator[Delta]:
        """Raises PdserveError before or between deltas; closing the iterator cancels the job.

        ``timeline``: told what happens, by the caller ended.
        """
        ...

    def model(self) -> ModelFacts | None:
        """Facts that the workers agreed on; None while no worker was ever seen."""
        ...

    def workers(self) -> tuple[WorkerView, ...]: ...

    def missing(self) -> tuple[WorkerId, ...]:
        """Planned workers that have never joined."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether a request went the whole way and still could; else the reason why not."""
        ...

    def shortfalls(self) -> tuple[Shortfall, ...]:
        """What the cluster was asked for and does not do; in strict mode it is not ready then."""
        ...
