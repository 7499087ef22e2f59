"""How many streams each gRPC connection has open, and how many it may.

    take(connection) -> the call runs -> give_back(connection)      full: Overloaded, nothing taken

A connection is told by its peer's address, which no two live ones share.
"""

from __future__ import annotations

from pdserve.errors import Overloaded

# A place is free as soon as any call of the connection ends.
RETRY_AFTER_S = 0.5


class StreamLimit:
    """Owns the counts. Event loop only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[str, int] = {}  # connections with none are not kept

    def take(self, connection: str) -> None:
        """Raises Overloaded, with a hint when to come back."""
        taken = self._open.get(connection, 0)
        if taken >= self._most:
            raise Overloaded(
                f"this connection has {taken} streams open and may have {self._most}: "
                "wait, or open another connection",
                retry_after_s=RETRY_AFTER_S,
            )
        self._open[connection] = taken + 1

    def give_back(self, connection: str) -> None:
        self._open[connection] -= 1
        if not self._open[connection]:
            del self._open[connection]
