"""``/requests`` and ``/requests/{request_id}``: what became of requests, and when.

A principal sees its own requests alone; without API keys everybody is the same principal.
"""

from __future__ import annotations

import itertools
from typing import Any

from aiohttp import web

from pdserve.errors import RequestNotFound
from pdserve.telemetry.timeline import Phase
from pdserve.types import Usage
from router import fields
from router.auth import KeyRing
from router.http_errors import json_response
from router.timelines import Timeline, Timelines

_MS = 1e6
# Of /requests: without a limit of the asker's, and with the largest.
USUAL = 500
MOST = 100_000


class RequestHandlers:
    def __init__(self, timelines: Timelines, keys: KeyRing) -> None:
        self._timelines = timelines
        self._keys = keys

    async def requests(self, request: web.Request) -> web.Response:
        principal = self._keys.principal(request.headers.get("Authorization"))
        limit = fields.digits("limit", request.query.get("limit", str(USUAL)), 1, MOST)
        newest = itertools.islice(self._timelines.newest(principal), limit)
        found = [summary(timeline) for timeline in newest]
        return json_response({"requests": found})

    async def request(self, request: web.Request) -> web.Response:
        principal = self._keys.principal(request.headers.get("Authorization"))
        request_id = request.match_info["request_id"]
        timeline = self._timelines.find(request_id, principal)
        if timeline is None:
            raise RequestNotFound(
                f"request_id: {fields.show(request_id)} is not among the requests that run or "
                "that ended last",
                param="request_id",
            )
        return json_response(detail(timeline))


def summary(timeline: Timeline) -> dict[str, Any]:
    """One entry of ``/requests``."""
    usage = timeline.usage()
    current = timeline.current()
    return {
        "request_id": timeline.request_id,
        "trace_id": timeline.trace.trace_id,
        "started_at": timeline.started_ns / 1e9,
        "duration_ms": timeline.duration_ns() / _MS,
        "state": timeline.state.value,
        "phase": current.name.value if current is not None else "",
        "finish_reason": timeline.finish_reason.value if timeline.finish_reason else "",
        "error": timeline.error,
        "attempts": timeline.attempts,
        "prefill_worker": usage.prefill_worker or (current.prefill_worker if current else ""),
        "decode_worker": usage.decode_worker or (current.decode_worker if current else ""),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def detail(timeline: Timeline) -> dict[str, Any]:
    """The whole of ``/requests/{request_id}``: the summary, how it was made, and every span."""
    return {
        **summary(timeline),
        "usage": usage_object(timeline.usage()),
        "spans": [span_object(phase, timeline.started_ns) for phase in timeline.phases()],
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    cached = usage.cached_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": {"device": cached.device, "host": cached.host, "redis": cached.redis},
        "prefill_worker": usage.prefill_worker,
        "decode_worker": usage.decode_worker,
        "kv_bytes_transferred": usage.kv_bytes_transferred,
        "kv_transport": usage.kv_transport,
        "kv_skipped_reason": usage.kv_skipped_reason,
        "preemptions": usage.preemptions,
        "resumes": usage.resumes,
    }


def span_object(phase: Phase, origin_ns: int) -> dict[str, Any]:
    return {
        "name": phase.name.value,
        "who": phase.who,
        "start_ms": (phase.start_ns - origin_ns) / _MS,
        "duration_ms": phase.duration_ns / _MS,
        "attributes": phase.attributes(),
    }
