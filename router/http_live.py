"""``/live.json``: the cluster as it is now and the last minutes, for the live page.

A viewer asks once a second with the sequence number of the last sample that it has and gets only
those after it. The part that is the same for all viewers is put together once a tick.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from aiohttp import web

from pdserve.types import Role, WorkerState
from router import fields
from router.api import WorkerView
from router.auth import KeyRing
from router.http_errors import json_response
from router.http_tools import version, worker_object
from router.recent import HEADLINE_S, HISTORY_S, INTERVAL_S, LATENCY_S, Recent
from router.service import Service

log = logging.getLogger(__name__)

# At one a second nobody gets there.
MAX_SEQUENCE = 10**12


class LiveHandlers:
    """``run`` is the application's clean-up context: it ticks as long as the front serves."""

    def __init__(self, service: Service, keys: KeyRing) -> None:
        self._service = service
        self._keys = keys
        self._recent = Recent(service.metrics.totals)
        # A viewer that outlives the router must not take new sequence numbers for old ones.
        self._epoch = secrets.token_hex(8)
        self._now: msgspec.Raw | None = None

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        ticking = asyncio.create_task(self._tick(), name="live-page")
        yield
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)

    async def live(self, request: web.Request) -> web.Response:
        self._keys.principal(request.headers.get("Authorization"))
        since = fields.digits("since", request.query.get("since", "0"), 0, MAX_SEQUENCE)
        if request.query.get("epoch") != self._epoch:
            since = 0
        if self._now is None:
            self._now = msgspec.Raw(msgspec.json.encode(self._snapshot()))
        return json_response(
            {
                "epoch": self._epoch,
                "sequence": self._recent.sequence,
                "now": self._now,
                "history": self._recent.since(since),
            }
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                self._recent.tick()
            except Exception:
                log.exception("the live page misses a sample")
            self._now = None

    def _snapshot(self) -> dict[str, Any]:
        service = self._service
        ready, reason = service.dispatcher.ready()
        model = service.dispatcher.model()
        views = service.dispatcher.workers()
        return {
            "version": version(),
            "model": service.tokens.model.name,
            "block_size": 0 if model is None else model.block_size,
            "numerics": "" if model is None else model.numerics.value,
            "ready": ready,
            "reason": reason,
            "missing": service.dispatcher.missing(),
            "shortfalls": [one.text for one in service.dispatcher.shortfalls()],
            "interval_s": INTERVAL_S,
            "history_s": HISTORY_S,
            "latency_s": LATENCY_S,
            "headline_s": HEADLINE_S,
            "headline": self._recent.headline(),
            "pools": [_pool(role, views) for role in Role],
            "workers": [_worker(view) for view in views],
        }


def _pool(role: Role, views: Sequence[WorkerView]) -> dict[str, Any]:
    """What a pool's living workers hold together."""
    live = [v for v in views if v.facts.role is role and v.state is not WorkerState.DEAD]
    return {
        "role": role.value,
        "workers": len(live),
        "ready": sum(view.state is WorkerState.READY for view in live),
        "running": sum(view.load.running for view in live),
        "waiting": sum(view.load.waiting for view in live),
        "blocks": {
            "used": sum(view.load.blocks_used for view in live),
            "cached": sum(view.load.blocks_cached for view in live),
            "total": sum(view.load.blocks_total or view.facts.blocks_total for view in live),
        },
    }


def _worker(view: WorkerView) -> dict[str, Any]:
    tiers = view.load.tiers
    return {
        **worker_object(view),
        "in_flight": view.in_flight,
        "pending_tokens": view.pending_tokens,
        "tiers": {
            "host": tiers.host,
            "host_total": tiers.host_total,
            "redis_written": tiers.redis_written,
        },
    }
