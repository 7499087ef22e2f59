"""One child process, started again when it ends by itself (unless that makes no sense).

NEW -start-> STARTING -ready-> RUNNING -ended-> STARTING ... -stop-> STOPPED
             STARTING -not ready, and never was-> FAILED

Once it has served, nothing that keeps it from serving again is final: a full disk, or a host
without memory or descriptors to spare, may be over at the next try.

A thread of its own starts and awaits the process and lives as long as the Child: the kernel ties
the process to the *thread* that started it (PR_SET_PDEATHSIG), so that no process outlives a
killed ``pdserve up``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from pdserve.errors import ConfigError, InternalError, PdserveError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_BACKOFF_MIN_S = 0.2
_BACKOFF_MAX_S = 5.0
_STABLE_S = 30.0
_LOG_TAIL_BYTES = 4096
_LINE_BYTES_MAX = 65536

Ready = Callable[["subprocess.Popen[bytes]"], None]


def tail_of(log: Path) -> str:
    """The last line that a process wrote to its log; empty without one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def first_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """The first line of standard output; None when it ends, or takes too long, without one."""
    assert process.stdout is not None
    fd, seen = process.stdout.fileno(), b""
    limit = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while b"\n" not in seen:
            left = limit - time.monotonic()
            if left <= 0 or len(seen) > _LINE_BYTES_MAX or not selector.select(left):
                return None
            part = os.read(fd, 4096)
            if not part:
                return None
            seen += part
    return seen.partition(b"\n")[0]


class Child:
    """Owns one process at a time; all methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        ready: Ready,
        *,
        env: Mapping[str, str],
        log: Path,
        piped: bool = False,
        restarts: bool = True,
        on_ready: Callable[[bool], None] = lambda again: None,
        on_death: Callable[[int], None] = lambda code: None,
    ) -> None:
        """``command`` is asked at each start. ``ready`` blocks until the process serves, and raises
        if it never will. What it prints goes to the log; ``piped`` hands its standard output to
        ``ready``, who then reads it to its end. ``on_ready`` hears whether this was a restart,
        ``on_death`` the exit code of a process that nobody stopped; both run on the child's thread.
        """
        self.name = name
        self._command = command
        self._ready = ready
        self._env = {**os.environ, **env}
        self._log = log
        self._piped = piped
        self._restarts = restarts
        self._on_ready = on_ready
        self._on_death = on_death
        self._stopping = threading.Event()
        self._settled = threading.Event()  # first start: ready or failed
        self._failure: PdserveError | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"child-{name}", daemon=True)

    @property
    def pid(self) -> int:
        """Of the process that runs now; 0 without one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Waits for the first start. Raises what kept the process from serving."""
        if not self._settled.wait(timeout_s):
            raise InternalError(
                f"{self.name} did not serve within {timeout_s:g} s; see {self._log}"
            )
        if self._failure is not None:
            raise self._failure

    def stop(self, *timeouts_s: float) -> None:
        """SIGTERM before each of these waits, SIGKILL after the last; returns when it has ended."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None:
            _end(process, timeouts_s)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._keep_running()
        # Nobody awaits this thread: whoever waits for readiness must hear of it.
        except PdserveError as error:
            if not self._stopping.is_set():
                self._failure = error
        except Exception as error:
            logger.exception("%s: its supervision failed", self.name)
            self._failure = InternalError(f"{self.name}: {error}")
        finally:
            self._settled.set()

    def _keep_running(self) -> None:
        backoff = _BACKOFF_MIN_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                if not self._live():
                    return
            except Exception as error:
                if self._stopping.is_set() or not (self._restarts and self._settled.is_set()):
                    raise
                logger.warning(
                    "%s was not started again, and is tried once more: %s: %s",
                    self.name,
                    type(error).__name__,
                    error,
                )
            stable = time.monotonic() - started > _STABLE_S
            backoff = _BACKOFF_MIN_S if stable else min(_BACKOFF_MAX_S, backoff * 2)
            self._stopping.wait(backoff)

    def _live(self) -> bool:
        """One process from its start to its end. Whether there is to be another."""
        process = self._spawn()
        if process is None:
            return False
        try:
            self._ready(process)
            self._on_ready(self._settled.is_set())
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._settled.set()
        code = process.wait()
        if self._stopping.is_set():
            return False
        self._on_death(code)
        return self._restarts

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """None: it is to be stopped."""
        command = list(self._command())
        with self._log.open("ab") as log, self._lock:
            if self._stopping.is_set():
                return None
            try:
                self._process = _popen(command, self._env, log, self._piped)
            except OSError as error:
                raise ConfigError(f"cannot start {command[0]}: {error.strerror}") from error
            return self._process


def _end(process: subprocess.Popen[bytes], timeouts_s: Sequence[float]) -> None:
    for timeout_s in timeouts_s:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()
    process.wait()


def _popen(
    command: Sequence[str], env: Mapping[str, str], log: IO[bytes], piped: bool
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if piped else log,
        stderr=log,
        # Ctrl-C is for us; we then stop the others in order.
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (one system call, bound before the fork)
    )
