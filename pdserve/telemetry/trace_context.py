"""The W3C trace context of a request: read from headers or metadata, or begun here.

    traceparent, tracestate -> TraceContext    a header that breaks the specification is ignored
    nothing                 -> a new trace, whose sampling is ours to decide

https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER = re.compile(f"({_KEY})=({_VALUE})")


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hex digits
    parent_id: str = ""  # the caller's span, 16 hex digits; empty: the trace begins here
    sampled: bool | None = None  # the caller's word; None: it has not said
    state: tuple[tuple[str, str], ...] = ()  # of other tracing systems, passed on as it is


def new_trace() -> TraceContext:
    return TraceContext(os.urandom(16).hex())


def read_context(parents: Sequence[str], states: Sequence[str]) -> TraceContext:
    """``parents``, ``states``: every value of traceparent and of tracestate that came."""
    found = _PARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None
    if found is None:
        return new_trace()
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more is not None):
        return new_trace()
    if not trace_id.strip("0") or not parent_id.strip("0"):
        return new_trace()
    return TraceContext(trace_id, parent_id, bool(int(flags, 16) & 1), _state(states))


def _state(states: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Empty when any of it is wrong: half a state is no state."""
    text = ",".join(states)
    members: dict[str, str] = {}
    for part in text.split(",") if len(text) <= MAX_STATE_CHARS else ():
        member = part.strip(" \t")
        if not member:
            continue
        found = _MEMBER.fullmatch(member)
        if found is None or found[1] in members or len(members) == MAX_STATE_MEMBERS:
            return ()
        members[found[1]] = found[2]
    return tuple(members.items())
