"""The requests that run now, by id: admission, duplicates, take-over.

room   whether a new request would be refused for want of a place
open   a new id, or a resume of a running one by the same principal, which fences the old one
close  forgets a request, unless its id has been taken over meanwhile
"""

from __future__ import annotations

import asyncio

from pdserve.errors import DuplicateRequest, Overloaded
from pdserve.types import RequestId
from router.request_log import RequestLog

RETRY_AFTER_S = 1.0


class RequestBook:
    """Owner of the running requests' logs. Event loop only."""

    def __init__(self, max_requests: int) -> None:
        self._max = max_requests
        self._by_id: dict[RequestId, RequestLog] = {}
        self._own: set[RequestLog] = set()  # the router's, of which clients lose no place
        # Fenced ones too: they count until their generators have ended.
        self._open: set[RequestLog] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        """Generators that have not ended; the load that the router carries."""
        return len(self._open)

    def check_room(self, coming: int, prepared: int) -> None:
        """Overloaded when ``coming`` requests find no place beside ``prepared`` other ones."""
        if len(self._by_id) - len(self._own) + prepared + coming > self._max:
            raise Overloaded(f"{self._max} requests are in flight", retry_after_s=RETRY_AFTER_S)

    def open(self, request: RequestLog, *, own: bool = False) -> RequestLog | None:
        """Admits it; the answer is the request that it takes over, which the caller must end.

        ``own``: the router's, whose id nobody else has; it is never refused.
        """
        job = request.job
        running = self._by_id.get(job.request_id)
        # Ids are no secret: who resumes also says the same prompt as whoever asked.
        same = running is not None and (running.job.principal, running.job.prompt) == (
            job.principal,
            job.prompt,
        )
        if running is not None and not (job.resume and same):
            raise DuplicateRequest(
                f"request {job.request_id} is running; resume takes it over", param="request_id"
            )
        if own:
            self._own.add(request)
        elif running is None:
            self.check_room(1, 0)
        if not own and len(self._open) >= 2 * self._max:
            # Answered, or taken over, and nobody reads their last words.
            raise Overloaded(
                "too many requests wait for their clients", retry_after_s=RETRY_AFTER_S
            )
        self._by_id[job.request_id] = request
        self._open.add(request)
        self._empty.clear()
        return running

    def release(self, request: RequestLog) -> None:
        """Its id and its place are free again, though its generator has not ended yet."""
        self._own.discard(request)
        if self._by_id.get(request.job.request_id) is request:
            del self._by_id[request.job.request_id]

    def close(self, request: RequestLog) -> None:
        """Its generator has ended. Idempotent."""
        self.release(request)
        self._open.discard(request)
        if not self._open:
            self._empty.set()

    def running(self) -> tuple[RequestLog, ...]:
        return tuple(self._open)

    async def empty(self, timeout_s: float) -> bool:
        """Waits for the last request's end; False when it did not come in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
