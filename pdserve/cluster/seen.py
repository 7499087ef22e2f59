"""What is known of one worker, and what its answers or their failures make of that: pure steps.

    UNKNOWN -described-> PRESENT -gone-> ABSENT -described, new incarnation-> PRESENT
            -told why not-> FAILED -restarted-> ...
    PRESENT -out of reach, though it runs-> PRESENT

Gone is what Ray's control plane counts as gone, and it takes no process back: the router, which
revokes the KV of an incarnation that it is told no more, is never told it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pdserve.types import WorkerFacts

if TYPE_CHECKING:  # it brings in the worker's side
    from pdserve.cluster.actor import StartFailure


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one worker."""

    facts: WorkerFacts | None = None
    failure: StartFailure | None = None
    deaths: int = 0
    fruitless: int = 0  # deaths, or refused calls, since it last answered


@dataclass(frozen=True, slots=True)
class Step:
    """What is known next, and what is to be told of it; empty: nothing."""

    seen: Seen
    note: str = ""


def described(before: Seen, facts: WorkerFacts) -> Step:
    if before.facts == facts:
        return Step(replace(before, fruitless=0))
    replaced = before.facts is not None and before.facts.incarnation != facts.incarnation
    deaths = before.deaths + (1 if replaced else 0)
    return Step(Seen(facts, None, deaths), f"serves again (pid {facts.pid})" if deaths else "")


def refused(before: Seen, failure: StartFailure) -> Step:
    """It does not start, and says why."""
    if before.failure == failure:
        return Step(before)
    return Step(replace(before, facts=None, failure=failure), f"does not start: {failure.message}")


def gone(before: Seen) -> Step:
    """Its process is no more."""
    note = "died" if before.facts is not None or not before.deaths else ""
    fruitless = before.fruitless + 1 if before.facts is None else 0
    return Step(Seen(None, before.failure, before.deaths + 1, fruitless), note)


def out_of_reach(before: Seen) -> Step:
    """Its process runs and cannot be asked; what the router hears of it is what counts."""
    return Step(replace(before, fruitless=before.fruitless + 1))
