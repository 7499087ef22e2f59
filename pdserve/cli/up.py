"""``pdserve up``: start, prove, serve, stop.

start -> question to itself -> ready ... first signal -> stop in order; second signal -> kill all
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType

from pdserve.cli.checks.software import compiler, traces
from pdserve.cli.options import config_from
from pdserve.cli.self_question import Report, ask_itself, way
from pdserve.cli.show import PlainShow, RichShow, make_show
from pdserve.cluster.router_view import local_address
from pdserve.cluster.supervisor import Cluster, open_cluster
from pdserve.errors import ConfigError, InternalError
from pdserve.telemetry.logs import setup_logging

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130


class Interrupts:
    """The first signal raises KeyboardInterrupt in the main thread; a later one ends everything.

    While the stop runs nothing may be raised into it, so ``later`` does all and does not return.
    """

    def __init__(self, later: Callable[[], None]) -> None:
        self._later = later
        self._first = True

    def install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def stopping(self) -> None:
        """From here on a signal is a later one."""
        self._first = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first:
            self._first = False
            raise KeyboardInterrupt
        print("\npdserve up: killing everything", file=sys.stderr)
        self._later()
        os._exit(_INTERRUPTED)


def run(parsed: argparse.Namespace) -> int:
    """Serves until a signal. Raises PdserveError when the cluster does not come up whole."""
    began = time.monotonic()
    config = config_from(parsed)
    exported = traces(config)
    if not exported.good:
        raise ConfigError(f"{exported.text}: {exported.remedy}")
    setup_logging(config.log, "up")
    show = make_show()
    cluster = open_cluster(config, show)
    interrupts = Interrupts(cluster.kill)
    interrupts.install()
    ready = False
    try:
        show.note(f"pdserve {version('pdserve')}, cluster {config.name!r}")
        lacking = compiler(config)
        if not lacking.good:
            show.note(lacking.text)
        cluster.start()
        show.close()
        _prove(cluster, show)
        _announce(cluster, time.monotonic() - began)
        ready = True
        cluster.broken.wait()
        raise InternalError(f"{cluster.broken_by}, and the cluster with it; see its logs")
    except KeyboardInterrupt:
        return 0 if ready else _INTERRUPTED
    finally:
        interrupts.stopping()
        show.close()
        show.note("stopping; running requests may end (Ctrl-C again kills them)")
        cluster.stop()
        show.note("stopped")


def _prove(cluster: Cluster, show: PlainShow | RichShow) -> None:
    show.note("asking the cluster a question, as a client would")
    print("  ", end="")

    def show_text(text: str) -> None:
        print(text.replace("\n", "\n  "), end="", flush=True)

    try:
        report: Report = ask_itself(cluster, show_text)
    finally:
        print(flush=True)
    show.note(way(report.usage))
    show.note(f"first token after {report.first_token_s:.2f} s, all after {report.total_s:.2f} s")


def _announce(cluster: Cluster, took_s: float) -> None:
    access = cluster.http
    body = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    options = ""
    if access.api_key:
        options += " -H 'authorization: Bearer KEY'"
    if access.certificate:
        options += f" --cacert {access.certificate}"
    lines = [
        f"ready after {took_s:.1f} s",
        f"  HTTP  {access.url}  (OpenAI API at /v1, /workers, /metrics)",
        f"  gRPC  {local_address(cluster.addresses.grpc)}  (pdserve.v1.Inference)",
        f"  logs  {cluster.run.logs}",
        "try:",
        f"  curl -s {access.url}/v1/chat/completions{options}"
        f" -H 'content-type: application/json' -d '{json.dumps(body)}'",
        "Ctrl-C stops everything",
    ]
    print("\n".join(lines), flush=True)
