"""Blocks of the pool as the tiers see them: spans to copy from and to, wherever the pool lies.

    pool.of(blocks) -> spans
    spans.read({0: row, ...})     span -> row of host memory      (write-back)
    spans.write({0: row, ...})    row -> span                     (a hit in the host tier)
    with spans.received() as got:    bytes come into host memory; got.found are in place at the end

A pool in host memory is here; one on a device is in cache_tiers/device_spans.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pdserve.pages import Bytes, take_pages


@dataclass(slots=True)
class Received:
    views: Sequence[memoryview]  # writable, one for each span
    found: int = 0  # whoever fills them says how many leading ones are good


class Spans(Protocol):
    """Some blocks in order. One thread uses it; every copy is complete when its call returns."""

    def __len__(self) -> int: ...

    @property
    def room(self) -> int:
        """How many leading spans ``received`` can hold at once."""
        ...

    def part(self, begin: int, end: int) -> Spans: ...

    def read(self, into: Mapping[int, Bytes]) -> None:
        """Copies the span at each position into its row, uint8 [span_bytes]."""
        ...

    def write(self, rows: Mapping[int, Bytes]) -> None:
        """Copies each row into the span at its position."""
        ...

    def received(self) -> AbstractContextManager[Received]:
        """Host bytes for at most ``room`` spans, valid inside; those found are in place after it.

        The others may hold garbage.
        """
        ...


Adopt = Callable[[Bytes, bool], Callable[[], None]]


class PoolSpans(Protocol):
    """Thread-safe."""

    def of(self, blocks: Sequence[int]) -> Spans: ...

    def adopt(self, memory: Bytes, ahead: bool) -> Callable[[], None]:
        """Prepares host memory that spans are copied from and to; call the result at its end.

        ``ahead``: its pages are taken before they are used, and not as they are.
        """
        ...


class HostSpans:
    """Spans in host memory; ``received`` shows the spans themselves."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    @property
    def room(self) -> int:
        return len(self._views)

    def part(self, begin: int, end: int) -> HostSpans:
        return HostSpans(self._views[begin:end])

    def read(self, into: Mapping[int, Bytes]) -> None:
        for position, row in into.items():
            np.copyto(row, np.frombuffer(self._views[position], np.uint8))

    def write(self, rows: Mapping[int, Bytes]) -> None:
        for position, row in rows.items():
            np.copyto(np.frombuffer(self._views[position], np.uint8), row)

    @contextmanager
    def received(self) -> Iterator[Received]:
        yield Received(self._views)


class HostPool:
    """``span(block)``: the writable bytes of one block."""

    def __init__(self, span: Callable[[int], memoryview]) -> None:
        self._span = span

    def of(self, blocks: Sequence[int]) -> HostSpans:
        return HostSpans([self._span(block) for block in blocks])

    def adopt(self, memory: Bytes, ahead: bool) -> Callable[[], None]:
        if ahead:
            take_pages(memory)
        return _nothing


def _nothing() -> None:
    return
