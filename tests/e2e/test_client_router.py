"""The router is killed under its clients, and readiness is what requests find.

pdserve.client resumes by itself at the router that the supervisor starts again on the same ports.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pdserve.client import AsyncClient, Chunk, Client
from pdserve.faults import Action, Step
from tests.e2e.clients import CLIENTS, Phase, all_given_back, fresh, hold
from tests.e2e.clusters import Clusters, Running

pytestmark = pytest.mark.cluster

LENGTH = 400
STREAMS = 6
# A router's start, the workers' introduction, and reading again what was streamed.
LONGEST_GAP_S = 20.0
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.3, "seed": 41}
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": SAMPLED}


@pytest.fixture
def cluster(clusters: Clusters) -> Running:
    running = clusters.get(CLIENTS)
    running.wait_whole()
    return running


class Follower:
    """What one client has heard of one stream."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.endings = 0
        self.longest_gap = 0.0
        self._heard = time.monotonic()

    def take(self, chunk: Chunk) -> None:
        assert chunk.offset == len(self.tokens), "a gap or a repeat"
        now = time.monotonic()
        if self.tokens:
            self.longest_gap = max(self.longest_gap, now - self._heard)
        self._heard = now
        self.tokens.extend(chunk.token_ids)
        self.text += chunk.text
        self.endings += chunk.finish is not None


def run_sync(address: str, prompts: Sequence[Any], followers: list[Follower], ask: Any) -> None:
    def one(prompt: tuple[int, ...], follower: Follower) -> None:
        with Client(address) as client:
            for chunk in client.stream(prompt, **ask):
                follower.take(chunk)

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(one, prompts, followers))


def run_async(address: str, prompts: Sequence[Any], followers: list[Follower], ask: Any) -> None:
    async def everything() -> None:
        async with AsyncClient(address) as client:

            async def one(prompt: tuple[int, ...], follower: Follower) -> None:
                async for chunk in client.stream(prompt, **ask):
                    follower.take(chunk)

            await asyncio.gather(*map(one, prompts, followers))

    asyncio.run(everything())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_clients_resume_at_a_restarted_router(cluster: Running, kind: str, sampling: str) -> None:
    run = run_sync if kind == "sync" else run_async
    addresses = cluster.cluster.addresses
    prompts = [fresh(f"router-{kind}-{i}", 20 + 15 * i) for i in range(STREAMS)]
    ask = {"max_tokens": LENGTH, "ignore_eos": True, "timeout_s": 60.0, **SAMPLINGS[sampling]}
    calm, stormy = ([Follower() for _ in prompts] for _ in range(2))
    run(addresses.grpc, prompts, calm, ask)
    with all_given_back(cluster):
        before = cluster.cluster.router_pid
        clients = threading.Thread(target=run, args=(addresses.grpc, prompts, stormy, ask))
        clients.start()
        cluster.wait(lambda: min(len(each.tokens) for each in stormy) >= 5)
        assert not any(each.endings for each in stormy), "too late to be mid-stream"
        os.kill(before, signal.SIGKILL)
        clients.join(60)
        assert not clients.is_alive()
        for one, other in zip(calm, stormy, strict=True):
            assert other.tokens == one.tokens
            assert other.text == one.text
            assert other.endings == 1
        assert cluster.cluster.router_pid not in (0, before)
        assert cluster.cluster.addresses == addresses, "the same ports"
        gap = max(each.longest_gap for each in stormy)
        print(f"longest gap {gap:.1f} s")
        assert gap < LONGEST_GAP_S


def test_a_client_without_a_token_yet_resumes_as_well(cluster: Running) -> None:
    """Its request is queued in a worker that hangs when the router dies."""
    prompt = fresh("no-token", 100)
    calm, stormy = Follower(), Follower()
    ask = {"max_tokens": 20, "timeout_s": 60.0, **SAMPLED}
    # Under another salt: the blocks that the calm run leaves in the caches are not found.
    run_sync(cluster.cluster.addresses.grpc, [prompt], [calm], {**ask, "cache_salt": "calm"})
    with all_given_back(cluster):
        held = hold(cluster, Phase.PREFILLING)
        args = (cluster.cluster.addresses.grpc, [prompt], [stormy], ask)
        clients = threading.Thread(target=run_sync, args=args)
        clients.start()
        held.wait()
        assert not stormy.tokens
        os.kill(cluster.cluster.router_pid, signal.SIGKILL)
        clients.join(60)
        assert (stormy.tokens, stormy.endings) == (calm.tokens, 1)


def status_of(cluster: Running, path: str) -> int:
    try:
        with urllib.request.urlopen(cluster.http + path, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0  # nobody listens


def test_ready_means_that_a_request_succeeds(cluster: Running) -> None:
    """Through the death of every decode worker, and that of the router."""
    prompt = fresh("ready", 30)
    expected = cluster.caller.ask(prompt, 6).tokens
    assert status_of(cluster, "/ready") == 200
    for facts in cluster.cluster.workers():
        if facts.role.value == "decode":
            cluster.cluster.kill_worker(facts.id)
    cluster.wait(lambda: status_of(cluster, "/ready") == 503, 10.0)
    assert status_of(cluster, "/health") == 200
    cluster.wait(lambda: status_of(cluster, "/ready") == 200, 60.0)
    assert cluster.caller.ask(prompt, 6).tokens == expected
    os.kill(cluster.cluster.router_pid, signal.SIGKILL)
    cluster.wait(lambda: status_of(cluster, "/ready") != 200, 5.0)
    cluster.wait(lambda: status_of(cluster, "/ready") == 200, 60.0)
    with Client(cluster.cluster.addresses.grpc) as client:
        answer = client.generate(prompt, max_tokens=6, temperature=0.0)
    assert answer.token_ids == expected
    cluster.wait_whole()
    cluster.check_idle()


def test_a_worker_whose_engine_broke_ends_and_its_requests_go_on(cluster: Running) -> None:
    """It is the only one that decodes: they wait for the process that comes after it."""
    prompts = [fresh(f"broken-{i}", 40) for i in range(4)]
    calm = cluster.caller.ask_all(prompts, 20)
    victim = cluster.arm("decode", Step.ENGINE_STEP, Action.RAISE, 12)
    stormy = cluster.caller.ask_all(prompts, 20)
    assert [answer.tokens for answer in stormy] == [answer.tokens for answer in calm]
    assert victim.incarnation not in {facts.incarnation for facts in cluster.cluster.workers()}
    cluster.wait_whole()
    cluster.wait(lambda: status_of(cluster, "/ready") == 200)
    cluster.check_idle()
