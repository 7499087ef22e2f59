"""When the next piece for Redis may go, where engines compute on the cores that send it.

All at once, a prompt's blocks would hold up the step that writes its answer's second token. So they
go in pieces, with a pause after each and at a moment in which nobody computes, if there is one in
time. Nobody else may wait for that: batches go at once while a forget or a clear waits behind them,
while room for copies is scarce, and when all comes to its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """``wait_slowly`` and ``sent`` are the sending thread's; the others are anybody's."""

    def __init__(
        self, pause_s: float, computing: Callable[[], bool], scarce: Callable[[], bool]
    ) -> None:
        """``pause_s``: after each piece; 0: there are no pieces. ``computing``: whether an engine
        does now, as far as can be told. ``scarce``: whether room for copies is. Both are asked
        under the lock that ``room_taken`` and ``press`` need: they must not block."""
        self._pause_s = pause_s
        self._computing = computing
        self._scarce = scarce
        self._changed = threading.Condition()
        self._pressing = 0  # jobs that wait behind what is sent, and must not
        self._ended = False
        self._next = 0.0  # time.monotonic() before which no piece goes

    def wait_slowly(self, due: float) -> bool:
        """Waits until a piece may go. False, and at once: somebody is held up, so a batch goes now.

        After ``due`` (time.monotonic()) nobody's computing is waited for, only the pause.
        """
        with self._changed:
            while not self._is_pressed():
                now = time.monotonic()
                wait_s = self._next - now
                if wait_s <= 0 and now < due and self._computing():
                    wait_s = self._pause_s
                if wait_s <= 0:
                    return True
                self._changed.wait(wait_s)
            return False

    def sent(self) -> None:
        """A piece went: the pause begins."""
        with self._changed:
            self._next = time.monotonic() + self._pause_s

    def press(self) -> None:
        """A job came that nothing may hold up; ``release`` once it is done."""
        with self._changed:
            self._pressing += 1
            self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._pressing -= 1

    def room_taken(self) -> None:
        """It may be scarce now, which ends a wait."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """From now on nothing is sent slowly."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _is_pressed(self) -> bool:
        return self._pause_s == 0 or self._ended or self._pressing > 0 or self._scarce()
