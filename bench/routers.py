"""Routers over instant workers, as processes that can be asked over HTTP and whose CPU is read.

with our_router(step_s) as router / with sglang_router(python, step_s) as router:
    asyncio.run(load(router, streams, tokens)) -> Relayed
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench.live import settings
from pdserve.cluster.child import first_line
from pdserve.engine.resolve import default_cache, prepare_model
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from router.boot import RouterBoot
from router.boot_file import write_boot

_START_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_OPEN_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Router:
    """``model``: what a request asks for."""

    port: int
    pid: int
    model: str

    def cpu_s(self) -> float:
        """Of all its threads, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass(frozen=True, slots=True)
class Relayed:
    """``at_once``: most streams that had begun and not ended."""

    tokens: int
    seconds: float
    router_cpu_s: float
    at_once: int
    failed: int


@contextlib.contextmanager
def _process(command: list[str], tell: str = "") -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process and its first line; ended afterwards."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(f"{tell}\n".encode())
            process.stdin.flush()
            line = first_line(process, _START_S)
            if line is None:
                raise RuntimeError(f"{command[:4]} did not start")
            yield process, line.decode()
        finally:
            process.kill()


@contextlib.contextmanager
def our_router(step_s: float) -> Iterator[Router]:
    config = settings("router.max_requests=4096", "router.skip_handoff_tokens=0")
    prepared = prepare_model(config.model, default_cache(), lambda step: None)
    token = secrets.token_hex(16)
    told = json.dumps({"token": token, "model": str(prepared.path)})
    worker = [sys.executable, "-m", "bench.instant_worker", "grpc", str(step_s)]
    with tempfile.TemporaryDirectory() as folder, _process(worker, told) as (_, line):
        boot = RouterBoot(
            config=config,
            model_path=str(prepared.path),
            served_name=prepared.served_name,
            identity=mint(token, Caller.ROUTER),
            hash_key=os.urandom(16),
            run_dir=folder,
        )
        path = Path(folder) / "boot.json"
        write_boot(path, boot)
        with _process([sys.executable, "-m", "router", str(path)]) as (process, said):
            addresses = json.loads(said)
            facts = worker_pb2.WorkerInfo.FromString(bytes.fromhex(json.loads(line)["facts"]))
            _tell_workers(addresses["internal"], token, facts)
            port = int(addresses["http"].rpartition(":")[2])
            _wait_serving(f"http://127.0.0.1:{port}/ready")
            yield Router(port, process.pid, prepared.served_name)


def _tell_workers(address: str, token: str, facts: worker_pb2.WorkerInfo) -> None:
    credential = mint(token, Caller.SUPERVISOR).header("/pdserve.v1.Membership/SetWorkers")
    with grpc.insecure_channel(address) as channel:
        worker_pb2_grpc.MembershipStub(channel).SetWorkers(
            worker_pb2.SetWorkersRequest(workers=[facts]),
            timeout=10,
            metadata=(("authorization", credential),),
        )


@contextlib.contextmanager
def sglang_router(python: Path, step_s: float) -> Iterator[Router]:
    """``python``: of an environment that has sglang-router."""
    worker = [sys.executable, "-m", "bench.instant_worker", "http", str(step_s)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with _process(worker) as (_, line):
        command = [
            *(str(python), "-m", "sglang_router.launch_router"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--worker-urls", f"http://127.0.0.1:{json.loads(line)['port']}"),
            *("--policy", "round_robin", "--max-concurrent-requests", "8192"),
            *("--log-level", "error", "--prometheus-port", str(port + 1)),
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                _wait_serving(f"http://127.0.0.1:{port}/readiness")
                yield Router(port, process.pid, "stub")
            finally:
                process.kill()


def _wait_serving(url: str) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


async def load(router: Router, streams: int, tokens: int) -> Relayed:
    """So many streams at once, each to its end."""
    clock = _Clock()
    opening = asyncio.Semaphore(_OPEN_AT_ONCE)
    cpu, began = router.cpu_s(), time.perf_counter()
    ends = await asyncio.gather(
        *(_stream(router, tokens, clock, opening) for _ in range(streams)), return_exceptions=True
    )
    seconds = time.perf_counter() - began
    good = sum(end is True for end in ends)
    return Relayed(
        good * tokens, seconds, router.cpu_s() - cpu, clock.most, failed=len(ends) - good
    )


@dataclass(slots=True)
class _Clock:
    now: int = 0
    most: int = 0

    def step(self, by: int) -> None:
        self.now += by
        self.most = max(self.most, self.now)


async def _stream(router: Router, tokens: int, clock: _Clock, opening: asyncio.Semaphore) -> bool:
    """One completion, read as bare bytes: the client must cost less than what it measures."""
    body = json.dumps(
        {
            "model": router.model,
            "prompt": "What does a router do?",
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    )
    async with opening:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(request.encode())
        first = await reader.read(65536)
    clock.step(1)
    tail = first
    whole = b" 200 " in first[:20]
    while received := await reader.read(65536):
        tail = (tail + received)[-256:]
    clock.step(-1)
    writer.close()
    return whole and b"[DONE]" in tail
