"""What reaches one request while it runs: events of its attempts, and words from the router.

The token path puts here, once per attempt and engine step; the request's generator takes all that
is there at once. A client that stops reading stops its generator. Once UNREAD_EVENTS lie here the
attempt is parked: it leaves its worker, and begins again after the tokens so far when somebody
reads on. So what a client does not read costs neither the router's memory nor a worker's blocks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pdserve.errors import PdserveError
from pdserve.types import AttemptId
from pdserve.v1 import worker_pb2

UNREAD_EVENTS = 256


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """A worker of this attempt cannot be heard any more: its prefill worker, or the other one."""

    attempt: AttemptId
    error: PdserveError
    blame_prefill: bool = False


@dataclass(frozen=True, slots=True)
class Parked:
    """This attempt was ended because nobody reads what it writes."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Ended:
    """The router ends the request: its deadline, a take-over, a shutdown."""

    error: PdserveError


class Poke:
    """Nothing but a reason to look again (the cluster changed, a wait is over)."""


POKE = Poke()

# An AttemptEvent stays the protobuf message that it came as: it is read once, by the request.
Item = worker_pb2.AttemptEvent | AttemptLost | Parked | Ended | Poke


class Inbox:
    """Event loop only; one taker."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_event(self, event: worker_pb2.AttemptEvent) -> bool:
        """False: this many lie unread that the attempt has to be parked."""
        if self._items:
            # A part keeps the whole message alive that it came in, with all other requests' parts.
            copied = worker_pb2.AttemptEvent()
            copied.CopyFrom(event)
            event = copied
        self.put(event)
        return len(self._items) < UNREAD_EVENTS

    async def take(self) -> list[Item]:
        """Everything that came since the last take; waits for at least one."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items
