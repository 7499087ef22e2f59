"""Server-sent events out of a byte stream, however the network cut it. Pure."""

from __future__ import annotations

from pdserve.errors import WorkerLost

EVENT_BYTES_MAX = 4 * 2**20


class SseReader:
    """Feed bytes, get the data of each event that they complete. Comments are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, received: bytes) -> list[bytes]:
        """WorkerLost when one event exceeds EVENT_BYTES_MAX."""
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
                self._held += len(text)
            elif not text and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._held = [], 0
        if len(self._rest) + self._held > EVENT_BYTES_MAX:
            raise WorkerLost(f"one event of the answer exceeds {EVENT_BYTES_MAX} bytes")
        return events
