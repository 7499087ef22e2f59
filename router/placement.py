"""Who works for whom: a pure choice over one snapshot of the registry.

Every way to serve a request is an *option*: a mixed worker alone, a decode worker alone, or a
decode worker with the prefill worker that would be done soonest. A policy picks one of them:

    round_robin    the decoding workers in turn
    least_loaded   the least work waiting
    prefix         the least work waiting plus the tokens that would have to be computed

A decode worker reads a prompt itself when it lacks few of its tokens. That holds in strict mode
too: strict refuses KV that *should* move and cannot, whereas here there is next to nothing to move,
and ``kv_skipped_reason`` says so. Mixed workers read what they answer; that is what they are for.

Workers of other fingerprints are never considered. A worker that failed this request before is
taken only when no other is left: a request must not end while somebody could serve it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from pdserve.config import RouterConfig
from pdserve.errors import ContextTooLong, NoWorker
from pdserve.types import Fingerprint, Incarnation, Role, WorkerId, WorkerState
from router.api import WorkerView

T = TypeVar("T")

# A running stream slows its neighbours down about as much as so many waiting prompt tokens.
STREAM_COST_TOKENS = 16
# Moving a token's KV costs far less than computing it, but not nothing.
MOVE_COST = 0.25


class Skip(Enum):
    """Why a decode worker reads the prompt itself; goes to ``Usage.kv_skipped_reason``."""

    LITTLE_UNCACHED = "little_uncached"
    NO_PREFILL_WORKER = "no_prefill_worker"
    PREFILL_POOL_TOO_SMALL = "prefill_pool_too_small"
    PREFILL_FAILED = "prefill_failed"
    MIXED_WORKER = "mixed_worker"


@dataclass(frozen=True, slots=True)
class Rules:
    policy: str
    skip_handoff_tokens: int
    load_weight: float
    strict: bool

    @staticmethod
    def of(config: RouterConfig) -> Rules:
        return Rules(
            config.policy, config.skip_handoff_tokens, config.prefix_load_weight, config.strict
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as far as placement is concerned."""

    fingerprint: Fingerprint
    tokens: int  # prompt and what was generated so far
    # Tokens of the longest prefix that each worker is known to hold.
    known: Mapping[WorkerId, int] = field(default_factory=dict)
    # Incarnations that failed this request.
    failed: frozenset[Incarnation] = frozenset()
    # Prefill workers failed too often: read the prompt on the decode worker.
    prefill_given_up: bool = False
    # Hand over whenever a prefill worker lives, however little is uncached. (In strict mode with
    # decode workers alone, there is then nobody.)
    force_pair: bool = False
    # Raised by one per request; turns round_robin, and ties of the other policies.
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    decode: WorkerView
    prefill: WorkerView | None
    skip: Skip | None  # set exactly when prefill is None
    uncached: int  # prompt tokens that the reading worker has to compute, by what is known

    @property
    def reader(self) -> WorkerView:
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class _Option:
    placement: Placement
    waiting: float  # tokens' worth of work before this request


def place(snapshot: Sequence[WorkerView], ask: Ask, rules: Rules) -> Placement:
    """Chooses. NoWorker when nobody can take it now, ContextTooLong when nobody ever could."""
    group = [view for view in snapshot if view.facts.model.fingerprint == ask.fingerprint]
    check_capacity(group, ask.tokens)
    fits = [view for view in group if view.state is WorkerState.READY and _holds(view, ask.tokens)]
    decoders = _preferred([v for v in fits if v.facts.role is not Role.PREFILL], ask)
    if not decoders:
        raise NoWorker("no live decode worker")
    prefill, skip = _choose_prefill(group, fits, ask, rules)
    options = [
        option
        for view in decoders
        if (option := _option(view, prefill, skip, ask, rules)) is not None
    ]
    if ask.force_pair and any(option.placement.prefill for option in options):
        options = [option for option in options if option.placement.prefill]
    if not options:
        assert skip is not None
        raise NoWorker(f"strict mode needs a prefill worker: {skip.value}")
    return _pick(options, ask, rules)


def hope(snapshot: Sequence[WorkerView], ask: Ask, rules: Rules, restarts: bool) -> bool:
    """After NoWorker: whether one that could serve the request may be ready soon.

    ``restarts``: dead workers are started again.
    """
    soon = {WorkerState.STARTING, WorkerState.SUSPECT, WorkerState.DRAINING}
    if restarts:
        soon.add(WorkerState.DEAD)
    decoding = any(
        view.state is WorkerState.READY
        and view.facts.role is not Role.PREFILL
        and view.facts.model.fingerprint == ask.fingerprint
        for view in snapshot
    )
    # With a decode worker at hand, it is strict mode that misses a prefill worker.
    missing = {Role.PREFILL} if decoding and rules.strict else {Role.DECODE, Role.MIXED}
    return any(view.state in soon and view.facts.role in missing for view in snapshot)


def check_capacity(group: Sequence[WorkerView], tokens: int) -> None:
    """ContextTooLong when the pools of all decoding workers are smaller than the request."""
    pools = [
        view.facts.blocks_total * view.facts.model.block_size
        for view in group
        if view.facts.role is not Role.PREFILL and view.state is not WorkerState.DEAD
    ]
    if pools and tokens + 1 > max(pools):
        raise ContextTooLong(
            f"{tokens} tokens and one more exceed the largest KV pool of {max(pools)} tokens",
            param="prompt",
        )


def _holds(view: WorkerView, tokens: int) -> bool:
    return tokens + 1 <= view.facts.blocks_total * view.facts.model.block_size


def _preferred(views: list[WorkerView], ask: Ask) -> list[WorkerView]:
    """Those that did not fail this request, or else all of them."""
    return [view for view in views if view.facts.incarnation not in ask.failed] or views


def _uncached(view: WorkerView, ask: Ask) -> int:
    # The last token is always computed: its logits are what the first new token is drawn from.
    return max(1, ask.tokens - ask.known.get(view.facts.id, 0))


def _waiting(view: WorkerView) -> float:
    """Work ahead of a new request, in tokens: what is reported, or sent and not yet reported."""
    streams = max(view.in_flight, view.load.running + view.load.waiting)
    reading = max(view.pending_tokens, view.load.waiting_tokens)
    return reading + STREAM_COST_TOKENS * streams


def _choose_prefill(
    group: Sequence[WorkerView], fits: Sequence[WorkerView], ask: Ask, rules: Rules
) -> tuple[WorkerView | None, Skip | None]:
    """The prefill worker that would be done first, or why there is none."""
    if ask.prefill_given_up:
        return None, Skip.PREFILL_FAILED
    candidates = _preferred([v for v in fits if v.facts.role is Role.PREFILL], ask)
    if not candidates:
        small = any(
            view.facts.role is Role.PREFILL and view.state is WorkerState.READY for view in group
        )
        return None, Skip.PREFILL_POOL_TOO_SMALL if small else Skip.NO_PREFILL_WORKER
    if rules.policy == "round_robin":
        return candidates[ask.turn % len(candidates)], None

    def cost(view: WorkerView) -> float:
        computing = _uncached(view, ask) if rules.policy == "prefix" else 0
        return computing + _weight(rules) * _waiting(view)

    return min(_turned(candidates, ask.turn), key=cost), None


def _option(
    decode: WorkerView,
    prefill: WorkerView | None,
    skip: Skip | None,
    ask: Ask,
    rules: Rules,
) -> _Option | None:
    """How this worker would serve the request; None when strict mode forbids it."""
    here = _uncached(decode, ask)
    if decode.facts.role is Role.MIXED:
        return _Option(Placement(decode, None, Skip.MIXED_WORKER, here), _waiting(decode))
    if here <= rules.skip_handoff_tokens and not ask.force_pair:
        return _Option(Placement(decode, None, Skip.LITTLE_UNCACHED, here), _waiting(decode))
    if prefill is not None:
        there = _uncached(prefill, ask)
        return _Option(
            Placement(decode, prefill, None, there), _waiting(decode) + _waiting(prefill)
        )
    if rules.strict:
        return None
    return _Option(Placement(decode, None, skip, here), _waiting(decode))


def _pick(options: Sequence[_Option], ask: Ask, rules: Rules) -> Placement:
    if rules.policy == "round_robin":
        return options[ask.turn % len(options)].placement

    def cost(option: _Option) -> float:
        waiting = _weight(rules) * option.waiting
        if rules.policy == "least_loaded":
            return waiting
        placement = option.placement
        moved = 0 if placement.prefill is None else _uncached(placement.decode, ask)
        return waiting + placement.uncached + MOVE_COST * moved

    return min(_turned(options, ask.turn), key=cost).placement


def _weight(rules: Rules) -> float:
    return rules.load_weight if rules.policy == "prefix" else 1.0


def _turned(items: Sequence[T], turn: int) -> list[T]:
    """Rotated, so that equals take turns: min() takes the first of them."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]
