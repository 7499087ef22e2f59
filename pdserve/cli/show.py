"""How ``pdserve up`` shows what it does: live lines on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pdserve.cluster.progress import Progress


class PlainShow:
    """One line per step and change, with the seconds since the start. Any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._last: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(self, key: str, text: str) -> None:
        self._line(f"{text} ...")

    def update(self, key: str, text: str, fraction: float | None = None) -> None:
        with self._lock:
            if self._last.get(key) == text:
                return
            self._last[key] = text
        done = "" if fraction is None else f" ({fraction:.0%})"
        self._line(f"{text}{done}")

    def end(self, key: str, text: str) -> None:
        self._line(text)

    def note(self, text: str) -> None:
        self._line(text)

    def close(self) -> None:
        """Nothing lives on the screen."""

    def _line(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self._began:5.1f}s] {text}", file=self._stream, flush=True)


class RichShow:
    """A spinner, a bar where a step knows how far it is, and a line for what is done."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._console = Console(highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._open = False

    def begin(self, key: str, text: str) -> None:
        with self._lock:
            if not self._open:
                self._open = True
                self._progress.start()
            self._tasks[key] = self._progress.add_task(text, total=None)

    def update(self, key: str, text: str, fraction: float | None = None) -> None:
        with self._lock:
            if key in self._tasks:
                total = None if fraction is None else 1.0
                self._progress.update(
                    self._tasks[key], description=text, total=total, completed=fraction or 0.0
                )

    def end(self, key: str, text: str) -> None:
        with self._lock:
            task = self._tasks.pop(key, None)
            if task is not None:
                self._progress.remove_task(task)
        self._console.print(f"\N{CHECK MARK} {text}", markup=False)

    def note(self, text: str) -> None:
        self._console.print(f"\N{BULLET} {text}", markup=False)

    def close(self) -> None:
        """Ends the live part of the screen; notes go on as plain lines."""
        with self._lock:
            if self._open:
                self._open = False
                self._progress.stop()


def make_show() -> PlainShow | RichShow:
    return RichShow() if sys.stdout.isatty() else PlainShow(sys.stdout)


if TYPE_CHECKING:
    _plain: Progress = PlainShow(sys.stdout)
    _rich: Progress = RichShow()
