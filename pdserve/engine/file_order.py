"""Reads checkpoint files from front to back once, by threads that run ahead of whoever uses them.

    plan_windows(shards) -> windows    pure: consecutive bytes, and the tensors they belong to
    with FileOrderReader(...) as reader:    the threads begin to read
        for window, views in reader: ...    in order; asking for the next gives this one back

Readers claim windows in file order, so the disk sees one forward scan. No more than ``ahead``
windows are read and not yet given back, which bounds the memory that reading takes. Files go
through the page cache: of several workers on a host that load the same model, one makes the disk
read a page, the others find it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from pdserve.engine.safetensors_file import Shard
from pdserve.errors import BadWeights

WINDOW_BYTES = 8 * 2**20
MOST_READERS = 4
MOST_AHEAD = 32
_LEAST_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes ``begin .. end`` of a tensor: the ``tensor``-th of all shards, in file order."""

    tensor: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Window:
    shard: int
    begin: int  # in the shard's file
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.end - part.begin for part in self.parts)


def plan_windows(shards: Sequence[Shard], size: int = WINDOW_BYTES) -> tuple[Window, ...]:
    """Every byte of every tensor lies in one window; none is longer than ``size``."""
    windows = []
    base = 0
    for number, shard in enumerate(shards):
        parts: list[Part] = []
        begin = room = 0
        for index, tensor in enumerate(shard.tensors, base):
            at = 0
            while at < tensor.nbytes:
                if room == 0:
                    begin, room = tensor.begin + at, size
                count = min(room, tensor.nbytes - at)
                parts.append(Part(index, at, at + count))
                at, room = at + count, room - count
                if room == 0:
                    windows.append(Window(number, begin, tuple(parts)))
                    parts = []
        if parts:
            windows.append(Window(number, begin, tuple(parts)))
        base += len(shard.tensors)
    return tuple(windows)


def windows_ahead(shards: Sequence[Shard]) -> int:
    """How many windows may wait: half the largest shard at most."""
    largest = max(shard.size for shard in shards)
    return max(_LEAST_AHEAD, min(MOST_AHEAD, largest // (2 * WINDOW_BYTES)))


class FileOrderReader:
    """Entered and iterated once, by one thread: windows, and the memory each was read into.

    ``room`` says where a window's bytes go; it is called in order, under a lock, and must be quick.
    ``readers`` 0: one for each core, at most MOST_READERS.

    BadWeights when a file ends early, OSError.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        windows: Sequence[Window],
        room: Callable[[Window], Sequence[memoryview]],
        ahead: int,
        readers: int = 0,
    ) -> None:
        self._shards = shards
        self._windows = windows
        self._room = room
        self._ahead = ahead
        self._readers = readers or min(MOST_READERS, len(os.sched_getaffinity(0)))
        # Guarded by _changed.
        self._changed = threading.Condition()
        self._claimed = 0  # windows that a reader has taken, always the first so many
        self._given_back = 0
        self._views: dict[int, Sequence[memoryview]] = {}  # of windows that are read
        self._failure: Exception | None = None
        self._closed = False
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as ending:
            files = [ending.enter_context(shard.path.open("rb", 0)) for shard in self._shards]
            numbers = [file.fileno() for file in files]
            for number in numbers:
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for index in range(min(self._readers, len(self._windows))):
                thread = threading.Thread(
                    target=self._run, args=(numbers,), name=f"pdserve-read-{index}"
                )
                thread.start()
                ending.callback(thread.join)
            ending.callback(self._close)
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.close()

    def __iter__(self) -> Iterator[tuple[Window, Sequence[memoryview]]]:
        for index, window in enumerate(self._windows):
            yield window, self._wait_for(index)
            with self._changed:
                self._given_back = index + 1
                self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait_for(self, index: int) -> Sequence[memoryview]:
        with self._changed:
            self._changed.wait_for(lambda: index in self._views or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            return self._views.pop(index)

    def _run(self, files: Sequence[int]) -> None:
        try:
            while (claim := self._claim()) is not None:
                index, views = claim
                window = self._windows[index]
                shard = self._shards[window.shard]
                _read_into(files[window.shard], window.begin, list(views), shard)
                with self._changed:
                    self._views[index] = views
                    self._changed.notify_all()
                del claim, views  # a reader that waits holds no memory
        except Exception as error:  # raised again where the windows are used
            with self._changed:
                self._failure = self._failure or error
                self._closed = True
                self._changed.notify_all()

    def _claim(self) -> tuple[int, Sequence[memoryview]] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._claimed < self._given_back + self._ahead
            )
            if self._closed or self._claimed == len(self._windows):
                return None
            index = self._claimed
            self._claimed += 1
            return index, self._room(self._windows[index])


def _read_into(file: int, at: int, views: list[memoryview], shard: Shard) -> None:
    """Fills the views, one after the other, from byte ``at`` of the file."""
    most = os.sysconf("SC_IOV_MAX")
    while views:
        count = os.preadv(file, views[:most], at)
        if count == 0:
            raise BadWeights(f"{shard.path}: it was cut off at byte {at} while it was read")
        at += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
