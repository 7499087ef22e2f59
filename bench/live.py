"""A cluster of one's own to measure on: the embedded model, free ports, gone afterwards.

with running_cluster(prefill=1, decode=1) as cluster:
    stream(channel, prompt, tokens) -> Timed     when each token came, on time.perf_counter
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from pdserve.client.aio import AsyncClient
from pdserve.client.types import Chunk
from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config import Config
from pdserve.config_load import load_config
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import worker_pb2, worker_pb2_grpc

# Ordinary text tokens of the embedded model; what they mean does not matter.
_FIRST_ID, _LAST_ID = 1000, 30000


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: time of each token after the request was made, in seconds, and its last chunk."""

    token_s: tuple[float, ...]
    last: Chunk

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in itertools.pairwise(self.token_s))


def prompt_ids(length: int, rng: np.random.Generator) -> list[int]:
    return [int(token) for token in rng.integers(_FIRST_ID, _LAST_ID, length)]


def settings(*changes: str, **pools: int) -> Config:
    """Defaults but for free ports, ``changes`` (key=value) and the numbers of workers."""
    given = [f"pools.{role}={count}" for role, count in pools.items()]
    return load_config(None, ["router.http_port=0", "router.grpc_port=0", *given, *changes], {})


@dataclass(frozen=True, slots=True)
class Live:
    cluster: Cluster
    token: str

    @property
    def grpc(self) -> str:
        return self.cluster.addresses.grpc

    @property
    def http(self) -> str:
        return self.cluster.http.url

    def flush(self, *tiers: str) -> None:
        """Empties these tiers (device, host, redis) of every worker."""
        credential = mint(self.token, Caller.OPERATOR).header("/pdserve.v1.Worker/Flush")
        for facts in self.cluster.workers():
            with grpc.insecure_channel(facts.address) as channel:
                worker_pb2_grpc.WorkerStub(channel).Flush(
                    worker_pb2.FlushRequest(tiers=tiers),
                    timeout=60,
                    metadata=(("authorization", credential),),
                )


@contextlib.contextmanager
def running_cluster(*changes: str, **pools: int) -> Iterator[Live]:
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        token = secrets.token_hex(16)
        token_file = Path(folder) / "token"
        token_file.touch(0o600)
        token_file.write_text(token, "utf-8")
        own = [
            f"name=bench-{secrets.token_hex(3)}",
            f"state_dir={folder}/state",
            f"security.cluster_token_file={token_file}",
        ]
        cluster = start_cluster(settings(*own, *changes, **pools))
        try:
            yield Live(cluster, token)
        finally:
            cluster.stop(drain_s=0.5)


async def stream(client: AsyncClient, prompt: Sequence[int], tokens: int, salt: str = "") -> Timed:
    """Greedy, to exactly ``tokens`` tokens."""
    began = time.perf_counter()
    times: list[float] = []
    last: Chunk | None = None
    async for chunk in client.stream(
        tuple(prompt), max_tokens=tokens, temperature=0.0, ignore_eos=True, cache_salt=salt
    ):
        times += [time.perf_counter() - began] * len(chunk.token_ids)
        last = chunk
    assert last is not None
    assert len(times) == tokens, f"{len(times)} tokens of {tokens}"
    return Timed(tuple(times), last)


async def in_background(
    client: AsyncClient, count: int, prompt: int, tokens: int, rng: np.random.Generator
) -> list[asyncio.Task[Timed]]:
    """So many streams; returns when each has written its first token."""
    started = asyncio.Barrier(count + 1)

    async def one(ids: list[int]) -> Timed:
        began = time.perf_counter()
        times: list[float] = []
        last: Chunk | None = None
        async for chunk in client.stream(
            tuple(ids), max_tokens=tokens, temperature=0.0, ignore_eos=True
        ):
            if not times:
                await started.wait()
            times += [time.perf_counter() - began] * len(chunk.token_ids)
            last = chunk
        assert last is not None
        return Timed(tuple(times), last)

    tasks = [asyncio.create_task(one(prompt_ids(prompt, rng))) for _ in range(count)]
    await started.wait()
    return tasks
