"""Clients that leave, wait or misbehave, and the phases of a request that they do it in.

A request is held in a phase by a worker that hangs for HOLD_S at one step, so a test knows where
its clients left off. What they leave behind is looked at through the workers and the metrics.
"""

from __future__ import annotations

import enum
import http.client
import json
import random
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdserve.faults import Action, Step
from tests.e2e.clusters import Clusters, Running, Variant

LEASE_S = 3.0
# Everything is given back so long after the last client has gone.
QUIET_S = LEASE_S + 5.0
HOLD_S = 2.5
# Of HTTP requests, which cannot say one themselves; shorter than a request is held.
HTTP_DEADLINE_S = 2.0
TIMERS = (
    "timers.heartbeat_s=0.3",
    "timers.dead_after_s=2",
    "timers.stuck_after_s=20",
    "timers.kill_after_s=4",
    f"transfer.lease_s={LEASE_S}",
    "testing.faults=true",
)
CLIENTS = Variant(
    "llama", "tcp", "roomy", settings=(*TIMERS, f"router.request_timeout_s={HTTP_DEADLINE_S}")
)
LONG = 300  # tokens: more than anybody waits for


class Phase(enum.Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"


_HELD_AT = {
    Phase.QUEUED: ("prefill", Step.ENGINE_STEP, 1),
    Phase.PREFILLING: ("prefill", Step.ENGINE_STEP, 2),
    Phase.TRANSFERRING: ("prefill", Step.TRANSFER_SERVE, 1),
    Phase.DECODING: ("decode", Step.ENGINE_STEP, 12),
}


def fresh(seed: object, length: int) -> tuple[int, ...]:
    rng = random.Random(str(seed))
    print(f"seed {seed}")
    return tuple(rng.randrange(5, 512) for _ in range(length))


@dataclass(frozen=True)
class Held:
    """Waits until the worker hangs that holds the phase's requests."""

    cluster: Running
    phase: Phase
    before: int
    worker: Any

    def wait(self) -> None:
        self.cluster.wait(lambda: self.cluster.fired(self.worker) > self.before, 20.0)


def hold(cluster: Running, phase: Phase, seconds: float = HOLD_S) -> Held:
    role, step, nth = _HELD_AT[phase]
    worker = next(f for f in cluster.cluster.workers() if f.role.value == role)
    before = cluster.fired(worker)
    cluster.arm(role, step, Action.HANG, nth, seconds)
    return Held(cluster, phase, before, worker)


# ---- HTTP clients --------------------------------------------------------------------------------


@dataclass
class HttpClient:
    """One request over one connection. ``receive_buffer``: bytes that the kernel holds for it."""

    cluster: Running
    prompt: tuple[int, ...]
    max_tokens: int = LONG
    stream: bool = True
    receive_buffer: int = 0
    more: dict[str, Any] = field(default_factory=dict)
    path: str = "/v1/completions"

    def __post_init__(self) -> None:
        host, _, port = self.cluster.cluster.addresses.http.rpartition(":")
        self.socket = socket.socket()
        if self.receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        body = {
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.stream,
            "return_token_ids": True,
            **self.more,
        }
        raw = json.dumps(body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.started = time.monotonic()
        self.socket.sendall(head.encode() + raw)

    def wait_for(self, events: int) -> None:
        seen = b""
        while seen.count(b"data: ") < events:
            part = self.socket.recv(4096)
            assert part, "the answer ended"
            seen += part

    def answer(self) -> tuple[int, bytes, float]:
        """Status, body and the seconds that it all took."""
        response = http.client.HTTPResponse(self.socket, method="POST")
        response.begin()
        body = response.read()
        self.socket.close()
        return response.status, body, time.monotonic() - self.started

    def vanish(self) -> None:
        """With a reset, as of a process that was killed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


# ---- what the cluster says afterwards ------------------------------------------------------------


def metric(cluster: Running, name: str, **labels: str) -> float:
    """The sum of all series of this name that have these labels."""
    return sum(
        value
        for line_labels, value in metric_series(cluster, name)
        if all(line_labels.get(key) == wanted for key, wanted in labels.items())
    )


def metric_series(cluster: Running, name: str) -> Iterator[tuple[dict[str, str], float]]:
    connection = http.client.HTTPConnection(cluster.cluster.addresses.http, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        found, _, rest = head.partition("{")
        if found == f"pdserve:{name}":
            yield dict(re.findall(r'(\w+)="([^"]*)"', rest)), float(value)


def in_flight(cluster: Running) -> float:
    return metric(cluster, "requests_in_flight")


def rss_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]


@contextmanager
def all_given_back(cluster: Running) -> Iterator[None]:
    """Around a test: within a lease and 5 s of quiet, nothing of its requests is left anywhere."""
    yield
    began = time.monotonic()
    cluster.wait(lambda: in_flight(cluster) == 0, QUIET_S)
    cluster.check_idle()
    assert time.monotonic() - began < QUIET_S


@dataclass
class Survivors:
    """Requests beside the ones that are tormented; each must be what the model alone writes."""

    clusters: Clusters
    cluster: Running
    tag: str
    max_tokens: int = 16

    def __post_init__(self) -> None:
        self.prompts = [fresh(f"{self.tag}-{i}", 25 + 30 * i) for i in range(3)]

    def check(self) -> None:
        """All at once. Bypasses what earlier rounds left in the caches."""
        answers = self.cluster.caller.ask_all(self.prompts, self.max_tokens)
        oracle = self.clusters.oracle("llama")
        for prompt, answer in zip(self.prompts, answers, strict=True):
            assert answer.tokens == oracle.greedy(prompt, self.max_tokens).tokens
