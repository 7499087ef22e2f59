"""A command on a terminal of its own: what it draws, its keys, and how it leaves the terminal."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Makes the terminal it stands on its own, then becomes the command.
_LAUNCH = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
_LOCAL_FLAGS = 3  # of tcgetattr's list


class Terminal:
    """The command is the terminal's foreground process; ``close`` ends it."""

    def __init__(self, command: Sequence[str], rows: int = 24, columns: int = 80) -> None:
        self._fd, inner = os.openpty()
        # Before the command starts: it must never see another size.
        self.resize(rows, columns)
        self._flags = termios.tcgetattr(self._fd)[_LOCAL_FLAGS]
        self._raw = b""
        # These two would be believed before the terminal.
        names = os.environ.keys() - {"COLUMNS", "LINES"}
        environment = {name: os.environ[name] for name in names} | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
        )
        os.close(inner)

    @property
    def raw(self) -> str:
        """All that was written so far."""
        while select.select([self._fd], [], [], 0)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the other end was closed
                break
            if not data:
                break
            self._raw += data
        return self._raw.decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """All lines that were ever drawn, in order, without colours and moves."""
        return [line.rstrip() for line in _ESCAPE.sub("", self.raw).splitlines()]

    def wait_for(self, pattern: str, seconds: float = 30.0, after: int = 0) -> str:
        """The first line from the one numbered ``after`` on that has the pattern."""
        limit = time.monotonic() + seconds
        while True:
            found = [line for line in self.lines[after:] if re.search(pattern, line)]
            if found:
                return found[0]
            assert time.monotonic() < limit, self.lines[-60:]
            time.sleep(0.05)

    def key(self, data: bytes) -> None:
        os.write(self._fd, data)

    def wait_end(self, seconds: float = 10.0) -> int:
        """Its exit status; the terminal must be as it was. What it writes meanwhile is read."""
        limit = time.monotonic() + seconds
        while self.process.poll() is None:
            drawn = self.raw
            assert time.monotonic() < limit, drawn[-4000:]
            time.sleep(0.02)
        status, raw = self.process.returncode, self.raw
        assert raw.rfind("\x1b[?25h") >= raw.rfind("\x1b[?25l"), "the cursor stays hidden"
        assert _ESCAPE.sub("", raw).endswith("\n"), "the shell's prompt would not begin a line"
        assert termios.tcgetattr(self._fd)[_LOCAL_FLAGS] == self._flags, "keys are read otherwise"
        return status

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
