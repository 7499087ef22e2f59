"""Servers as commands, from their start to their end: ours and vLLM's, on the embedded model.

with served("pdserve 1+1") as server:   its command has been started and has written a first token
    server.seconds                      from the command to that token
    with server.turn():                 a peer stands still outside
        await burst(server.target, ...)     so many requests at once, each to its end
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.engines import vllm_python
from bench.paused import awake, stop, wake
from pdserve.bench.caller import Target, call
from pdserve.bench.samples import Outcome, Sample
from pdserve.bench.server import open_session
from pdserve.bench.workload import Request
from pdserve.config import Config
from pdserve.engine.resolve import default_cache, prepare_model

MODEL = "bench"
_START_S = 300.0
_STOP_S = 60.0
_POLL_S = 0.05
_CONTEXT = "2048"
# What ``pdserve up`` is told, by the name that the figures bear.
POOLS = {
    "pdserve 1+1": ("--prefill", "1", "--decode", "1"),
    "pdserve mixed": ("--mixed", "1"),
}


@dataclass(frozen=True, slots=True)
class Server:
    """``seconds``: from its command to the first token that a client saw."""

    target: Target
    seconds: float
    _process: subprocess.Popen[bytes]
    _stops: bool  # outside its turns; a cluster takes a stopped worker for a dead one

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return awake(self._process) if self._stops else contextlib.nullcontext()


@contextlib.contextmanager
def served(name: str) -> Iterator[Server]:
    """``name``: of POOLS, or vllm. CalledProcessError when it ends before it answers."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        command, environment = _command(name, port, Path(folder))
        began = time.perf_counter()
        with (Path(folder) / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        target = Target(f"http://127.0.0.1:{port}", MODEL)
        try:
            asyncio.run(_first_token(target, process))
            seconds = time.perf_counter() - began
            if stops := name == "vllm":
                stop(process)
            yield Server(target, seconds, process, stops)
        except subprocess.CalledProcessError:
            print((Path(folder) / "output").read_text("utf-8", "replace")[-2000:], file=sys.stderr)
            raise
        finally:
            wake(process)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def burst(target: Target, prompts: Sequence[list[int]], tokens: int) -> list[Sample]:
    """All at once; RuntimeError when one is not answered whole."""
    async with open_session("", None) as session:
        return await _ask(session, target, prompts, tokens)


async def _ask(
    session: aiohttp.ClientSession, target: Target, prompts: Sequence[list[int]], tokens: int
) -> list[Sample]:
    due = time.perf_counter()
    samples = await asyncio.gather(
        *(
            call(session, target, Request(0.0, len(prompt), tokens), prompt, due)
            for prompt in prompts
        )
    )
    for sample in samples:
        if sample.outcome is not Outcome.ANSWERED or sample.output_tokens != tokens:
            raise RuntimeError(
                f"{target.url}: {sample.outcome} {sample.detail}, "
                f"{sample.output_tokens} tokens of {tokens}"
            )
    return samples


async def _first_token(target: Target, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    async with open_session("", None) as session:
        while True:
            if process.poll() is not None:
                raise subprocess.CalledProcessError(process.returncode, process.args)
            try:
                await _ask(session, target, [[1000]], 1)
                return
            except RuntimeError:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(_POLL_S)


def _command(name: str, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """And what it is to find in its environment."""
    model = str(prepare_model(Config().model, default_cache(), lambda step: None).path)
    shared = ["--model", model, "--served-model-name", MODEL, "--max-model-len", _CONTEXT]
    shared += ["--dtype", "bfloat16", "--port", str(port)]
    if name != "vllm":
        own = [*POOLS[name], "--grpc-port", "0", "--name", f"bench-{secrets.token_hex(3)}"]
        own += ["--set", f"state_dir={folder}/state"]
        return [sys.executable, "-m", "pdserve.cli.main", "up", *shared, *own], {}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", *shared], {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "HF_HUB_OFFLINE": "1",
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port
