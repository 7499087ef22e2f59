"""Several text streams of one request as one stream of events, in order of arrival.

start -> a task per job feeds one queue -> events -> close (cancels what still runs)

A single job takes the same way: the queue lets a front wait for the next event with a time-out
(for keep-alive comments) without disturbing the job.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from router.text import TextDelta

# Events that may wait for a slow client; its job then waits as well.
QUEUE_EVENTS = 256


@dataclass(frozen=True, slots=True)
class Event:
    """A delta of choice ``index``, or the error that ends the whole request."""

    index: int
    delta: TextDelta | None
    error: Exception | None = None


class Fanout:
    """Use as an async context manager; leaving it cancels every job that has not ended."""

    def __init__(self, streams: list[AsyncGenerator[TextDelta, None]]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_EVENTS)
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(streams)

    async def __aenter__(self) -> Fanout:
        self._tasks = [
            asyncio.create_task(self._pump(index, stream))
            for index, stream in enumerate(self._streams)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def done(self) -> bool:
        """Every choice ended, and its last event was taken."""
        return self._running == 0

    async def next(self, timeout_s: float | None = None) -> list[Event]:
        """All events at hand, at least one; none after ``timeout_s`` without any.

        Raises a choice's error once all events before it were taken.
        """
        try:
            async with asyncio.timeout(timeout_s):
                events = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty() and events[-1].error is None:
            events.append(self._queue.get_nowait())
        if events[0].error is not None:
            raise events[0].error
        if events[-1].error is not None:
            self._put_back(events.pop())
        for event in events:
            if event.delta is not None and event.delta.finish is not None:
                self._running -= 1
        return events

    def _put_back(self, event: Event) -> None:
        """The next call must find the error first; what came after it is of no use."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(event)

    async def _pump(self, index: int, stream: AsyncGenerator[TextDelta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await self._queue.put(Event(index, delta))
        except Exception as error:  # typed or not: the front turns it into an answer
            await self._queue.put(Event(index, None, error))
