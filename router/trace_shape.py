"""A timeline as the spans of one trace: a pure function.

request                                  the root, a child of the caller's span
  prepare, place, recover                the router's
  attempt                                one for each choice of workers
    prefill                              the worker that read the prompt
      queue, tier_read, chunk            ... as far as they lie within it
    queue, grant, transfer, decode, preempted, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.telemetry.timeline import Phase, PhaseName
from router.timelines import ROUTER, State, Timeline

ROOT_NAME = "request"
_OF_READING = (PhaseName.QUEUE, PhaseName.TIER_READ, PhaseName.CHUNK, PhaseName.PREEMPTED)
Attributes = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class PlannedSpan:
    name: str
    start_ns: int
    end_ns: int
    parent: int | None  # place in the list, before this one; None: the caller's span
    attributes: Attributes
    error: str = ""  # what went wrong


def plan_spans(timeline: Timeline) -> list[PlannedSpan]:
    """Of a timeline that has ended; each parent comes before its children."""
    phases = timeline.phases()
    spans = [_root(timeline)]
    attempts: dict[int, int] = {}
    for phase in phases:
        if phase.who == ROUTER:
            if phase.name is PhaseName.ATTEMPT:
                attempts[phase.attempt] = len(spans)
            spans.append(_span(phase, 0))
    readings: dict[tuple[int, str], tuple[int, Phase]] = {}
    of_workers = [phase for phase in phases if phase.who != ROUTER]
    for phase in of_workers:
        if phase.name is PhaseName.PREFILL:
            readings[phase.attempt, phase.who] = (len(spans), phase)
            spans.append(_span(phase, attempts.get(phase.attempt, 0)))
    for phase in of_workers:
        if phase.name is PhaseName.PREFILL:
            continue
        parent = attempts.get(phase.attempt, 0)
        reading = readings.get((phase.attempt, phase.who))
        if phase.name in _OF_READING and reading is not None and _within(phase, reading[1]):
            parent = reading[0]
        spans.append(_span(phase, parent))
    return spans


def _within(phase: Phase, outer: Phase) -> bool:
    return outer.start_ns <= phase.start_ns and phase.end_ns <= outer.end_ns


def _root(timeline: Timeline) -> PlannedSpan:
    usage = timeline.usage()
    attributes: dict[str, str | int] = {
        "pdserve.request_id": timeline.request_id,
        "pdserve.state": timeline.state.value,
        "pdserve.attempts": timeline.attempts,
        "pdserve.kv_bytes_transferred": usage.kv_bytes_transferred,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
    }
    if timeline.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = timeline.finish_reason.value
    error = (timeline.error or State.FAILED.value) if timeline.state is State.FAILED else ""
    return PlannedSpan(ROOT_NAME, timeline.started_ns, timeline.ended_ns, None, attributes, error)


def _span(phase: Phase, parent: int) -> PlannedSpan:
    attributes: dict[str, str | int] = {
        f"pdserve.{name}": value for name, value in phase.attributes().items()
    }
    attributes["pdserve.worker"] = phase.who
    return PlannedSpan(phase.name.value, phase.start_ns, phase.end_ns, parent, attributes)
