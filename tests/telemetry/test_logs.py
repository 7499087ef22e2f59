"""Log lines: one per record, with the request's id, in text and JSON."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdserve.config import LogConfig
from pdserve.telemetry import logs, request_context, setup_logging

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Gives the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for package in logs.OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_a_line_says_when_how_bad_who_and_which_request(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(), "decode-0")
    log = logging.getLogger("decode_worker.attempts")
    with request_context("req-1"):
        log.info("admitted %d blocks", 3)
    log.warning("plain")
    log.info("by hand", extra={"request_id": "req-2"})
    found = lines(capfd)
    assert all(LINE.match(line) for line in found)
    assert [line.split("Z ", 1)[1] for line in found] == [
        "INFO    decode-0 [req-1] admitted 3 blocks",
        "WARNING decode-0 plain",
        "INFO    decode-0 [req-2] by hand",
    ]


def test_requests_of_concurrent_tasks_do_not_mix(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(), "router")
    log = logging.getLogger("router.front")

    async def serve(name: str) -> None:
        with request_context(name):
            for _ in range(3):
                await asyncio.sleep(0.001)
                log.info("about %s", name)

    async def main() -> None:
        await asyncio.gather(*(serve(f"r{place}") for place in range(5)))

    asyncio.run(main())
    found = lines(capfd)
    assert len(found) == 15
    for line in found:
        named = re.search(r"\[(r\d)\] about (r\d)$", line)
        assert named is not None
        assert named[1] == named[2]


def test_no_value_can_forge_a_second_line(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(), "router")
    log = logging.getLogger("router.front")
    log.info(
        "got %s",
        "a\n2026-01-01T00:00:00.000Z ERROR router forged\x1b[31m",
        extra={"request_id": "x\ny"},
    )
    (line,) = lines(capfd)
    assert "[x\\ny]" in line
    assert "\x1b" not in line


def test_an_exception_is_shown_below_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(), "router")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("router.front").exception("failed")
    first, *rest = lines(capfd)
    assert first.endswith("ERROR   router failed")
    assert rest[-1] == "    ValueError: broken"
    assert all(line.startswith("    ") for line in rest)


def test_json_holds_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(json=True, level="debug"), "prefill-1")
    log = logging.getLogger("prefill_worker.x")
    with request_context("req-9"):
        log.debug("line\nbreak and ü")
    try:
        raise KeyError("k")
    except KeyError:
        log.exception("oh")
    first, second = (json.loads(line) for line in lines(capfd))
    time = first.pop("time")
    assert LINE.match(time + " ")
    assert first == {
        "level": "debug",
        "component": "prefill-1",
        "logger": "prefill_worker.x",
        "message": "line\nbreak and ü",
        "request_id": "req-9",
    }
    assert "KeyError" in second["exception"]
    assert "request_id" not in second


def test_levels_are_for_our_packages_and_others_speak_from_warning_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    setup_logging(LogConfig(level="warning"), "router")
    setup_logging(LogConfig(level="debug"), "router")  # again: replaces, does not double
    logging.getLogger("cache_tiers.redis").debug("ours")
    logging.getLogger("somebody.else").info("theirs: a prompt, perhaps")
    logging.getLogger("somebody.else").warning("theirs")
    assert [line.split(" router ")[1] for line in lines(capfd)] == ["ours", "theirs"]


def test_a_huge_message_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(LogConfig(), "router")
    logging.getLogger("router.x").info("y" * 100_000)
    (line,) = lines(capfd)
    assert len(line) < logs.MAX_MESSAGE + 200
    assert line.endswith("(100000 characters)")


def test_logging_needs_neither_prometheus_nor_torch() -> None:
    code = (
        "import sys, pdserve.telemetry; "
        "print([m for m in ('prometheus_client', 'torch', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
