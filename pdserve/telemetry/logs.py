"""One clear line per record: when, how bad, which part, which request, what.

setup_logging(config.log, "router")                 once per process; again replaces the first
with request_context(request_id): log.info(...)     or log.info(..., extra={"request_id": ...})

Lines go to standard error. Prompts, answers, keys and addresses of clients are never logged: no
caller passes them, and a line that grows past MAX_MESSAGE is cut.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator

from pdserve.config import LogConfig

# Loggers of other packages speak from WARNING on: their lower levels may hold what ours never do.
OUR_PACKAGES = (
    "pdserve",
    "kv_transfer",
    "cache_tiers",
    "prefill_worker",
    "decode_worker",
    "router",
)
MAX_MESSAGE = 4000

_request: contextvars.ContextVar[str] = contextvars.ContextVar("pdserve_request", default="")


@contextlib.contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Records made inside, also by tasks started inside, carry the request's id."""
    token = _request.set(request_id)
    try:
        yield
    finally:
        _request.reset(token)


def setup_logging(config: LogConfig, component: str) -> None:
    """Sends this process's records to standard error. ``component``: router, a worker's id, ..."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(component) if config.json else TextLines(component))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, TextLines | JsonLines):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    set_level(config.level)
    logging.captureWarnings(True)


def set_level(level: str) -> str:
    """How much our packages say from now on: a name of ``log.level``. Returns what it was."""
    before = logging.getLevelName(logging.getLogger(OUR_PACKAGES[0]).level).lower()
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(level.upper())
    return before


def _time_of(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


def _request_of(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", "") or _request.get())


def _message_of(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if len(message) > MAX_MESSAGE:
        return f"{message[:MAX_MESSAGE]}... ({len(message)} characters)"
    return message


def _one_line(text: str) -> str:
    """Control characters are spelled out, so that no value can pretend to be another record."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class TextLines(logging.Formatter):
    """``TIME LEVEL component [request] message``; a traceback follows, indented."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        request = _request_of(record)
        line = " ".join(
            [
                _time_of(record),
                f"{record.levelname:<7}",
                self._component,
                *([f"[{_one_line(request)}]"] if request else []),
                _one_line(_message_of(record)),
            ]
        )
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    {_one_line(part)}" for part in trace.splitlines())
        return line


class JsonLines(logging.Formatter):
    """One object a line: time, level, component, logger, message; request_id and exception."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "message": _message_of(record),
        }
        if request := _request_of(record):
            fields["request_id"] = request
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=True)
