"""A decode worker's reads of blocks: on threads, since opening connects and reading copies.

    open -> read ... -> peer_lost or sweep -> close

Giving a peer up is two things. That it is given up holds at once, before ``peer_lost`` returns.
Closing what was open to it may wait for the read that runs, so each has a thread of its own, which
ends with it: it stands in line neither behind reads that wait for that very peer nor behind the
closing of another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kv_transfer.base import BlockOffer, BlockReader, Endpoint, ReadReport
from kv_transfer.readers import ReaderPool
from pdserve.types import Incarnation

_log = logging.getLogger(__name__)

# Reads of one peer take turns, each on its thread: so many that a peer which moves nothing leaves
# threads to the others.
READ_THREADS = 32
LOST_PEERS_EVERY_S = 2.0
READING = "kv-read"


class PeerReads:
    """Owns the threads and the pool of readers. Coroutines belong to one event loop."""

    def __init__(self, readers: ReaderPool) -> None:
        self._readers = readers
        self._reading = ThreadPoolExecutor(
            READ_THREADS, thread_name_prefix=READING, initializer=_name_this_thread
        )
        self.late = 0  # reads that returned to attempts that were over; event loop only
        self._sweeping = ThreadPoolExecutor(1, thread_name_prefix="kv-sweep")
        self._closing: set[threading.Thread] = set()  # event loop only, until the last close
        # One search for ended peers at a time, however many attempts each of them leaves behind.
        self._search: threading.Thread | None = None
        self._once_more = threading.Event()

    async def open(self, endpoint: Endpoint) -> BlockReader:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, self._readers.reader_for, endpoint)

    async def read(
        self,
        reader: BlockReader,
        offers: tuple[BlockOffer, ...],
        into: tuple[int, ...],
        deadline: float,
    ) -> ReadReport:
        """``deadline`` is the request's; the time that the read itself may take begins later."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, reader.read, offers, into, deadline)

    def came_late(self) -> None:
        self.late += 1

    def peer_lost(self, incarnation: Incarnation, gone: bool) -> None:
        """``gone``: it is over, whatever it may still send. Else its process may have ended."""
        if not gone:
            self._once_more.set()
            if self._search is None or not self._search.is_alive():
                self._search = self._close(self._close_lost)
        elif (reader := self._readers.fence(incarnation)) is not None:
            self._close(reader.close)

    async def sweep(self) -> None:
        """The router tells of lost peers, but may be gone itself: their memory must not stay."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOST_PEERS_EVERY_S)
            await loop.run_in_executor(self._sweeping, self._readers.close_lost)

    def _close_lost(self) -> None:
        # Asked just as this ends, it waits for the next sweep.
        while self._once_more.is_set():
            self._once_more.clear()
            self._readers.close_lost()

    def _close(self, closing: Callable[[], object]) -> threading.Thread:
        self._closing = {thread for thread in self._closing if thread.is_alive()}
        thread = threading.Thread(target=_close_and_report, args=(closing,), name="kv-close")
        self._closing.add(thread)
        thread.start()
        return thread

    def end_reads(self) -> None:
        """Returns when no read is under way; none may be begun any more."""
        self._reading.shutdown(wait=True)

    def close(self) -> None:
        self._sweeping.shutdown(wait=True)
        for thread in self._closing:
            thread.join()
        self._readers.close()


def _name_this_thread() -> None:
    """For ``top -H`` and the like: Python's own names stay within the process (until 3.14)."""
    with contextlib.suppress(OSError):  # where /proc cannot be written, a name is not worth a read
        Path("/proc/thread-self/comm").write_text(READING)


def _close_and_report(closing: Callable[[], object]) -> None:
    try:
        closing()
    except Exception:
        _log.exception("giving up what was open to a peer failed")
