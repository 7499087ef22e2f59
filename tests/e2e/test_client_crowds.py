"""Many clients at once: crowds, clients that do not read, and four times what can be served."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import grpc
import pytest

from pdserve.client import AsyncClient
from pdserve.errors import Overloaded
from tests.e2e.ask import request
from tests.e2e.clients import (
    CLIENTS,
    HTTP_DEADLINE_S,
    TIMERS,
    HttpClient,
    Survivors,
    all_given_back,
    fresh,
    in_flight,
    metric,
    metric_series,
    rss_bytes,
)
from tests.e2e.clusters import Clusters, Running, Variant

pytestmark = pytest.mark.cluster

IS_LONG = os.environ.get("PDSERVE_LONG") == "1"
STREAMS = 1000 if IS_LONG else 200
# In turns, since what a shared machine can do drifts from one stretch to the next.
TURNS = 1 if IS_LONG else 3
OVERLOAD_S = 180.0 if IS_LONG else 10.0
PEAK_S = 20.0 if IS_LONG else 6.0
PLACES = 16
# Long enough that asking costs little beside answering: both share the cores.
LENGTH = 256
NARROW = Variant("llama", "shm", "roomy", settings=(*TIMERS, f"router.max_requests={PLACES}"))
# What the router may grow by while its clients do not read, or are refused.
GROWTH_BYTES = 48 * 2**20


def test_many_streams_at_once_each_end_once_and_exactly(clusters: Clusters) -> None:
    cluster = clusters.get(CLIENTS)
    cluster.wait_whole()
    oracle = clusters.oracle("llama")
    rng = random.Random(23)
    known = [(fresh(f"many-{i}", rng.choice((5, 40, 90))), 8 + i % 7) for i in range(20)]
    expected = [oracle.greedy(prompt, length).tokens for prompt, length in known]

    async def one(client: AsyncClient, which: int) -> None:
        prompt, length = known[which]
        got: list[int] = []
        endings = 0
        async for chunk in client.stream(
            prompt, max_tokens=length, temperature=0.0, timeout_s=100.0
        ):
            assert endings == 0, "something came after the end"
            assert chunk.offset == len(got)
            got.extend(chunk.token_ids)
            endings += chunk.finish is not None
        assert endings == 1
        assert tuple(got) == expected[which]

    async def all_at_once() -> None:
        async with AsyncClient(cluster.cluster.addresses.grpc) as client:
            await asyncio.gather(*(one(client, i % len(known)) for i in range(STREAMS)))

    with all_given_back(cluster):
        asyncio.run(all_at_once())


def test_clients_that_do_not_read_cost_bounded_memory_and_nobody_else(
    clusters: Clusters,
) -> None:
    cluster = clusters.get(CLIENTS)
    cluster.wait_whole()
    survivors = Survivors(clusters, cluster, "unread")
    survivors.check()
    pid = cluster.cluster.router_pid
    with all_given_back(cluster), unreading(cluster) as stub:
        before = most = rss_bytes(pid)
        began = time.monotonic()
        calls = [
            stub.Generate(
                request(fresh(f"unread-{i}", 20), 480, ignore_eos=True, logprobs=20),
                timeout=HTTP_DEADLINE_S,
            )
            for i in range(12)
        ]
        more = {"logprobs": 20, "n": 2}
        readers = [
            HttpClient(cluster, fresh(f"unread-{i}", 20), 480, receive_buffer=1, more=more)
            for i in range(6)
        ]
        while time.monotonic() - began < HTTP_DEADLINE_S:
            survivors.check()
            most = max(most, rss_bytes(pid))
        late = began + HTTP_DEADLINE_S + 1 - time.monotonic()
        cluster.wait(lambda: in_flight(cluster) == 0, max(late, 0.0))
        print(f"router: {before / 2**20:.0f} MiB before, {most / 2**20:.0f} MiB at most")
        assert most - before < GROWTH_BYTES
        for call in calls:
            call.cancel()
        for reader in readers:
            reader.vanish()
    survivors.check()


def test_a_stream_that_is_not_read_leaves_its_worker_and_goes_on_exactly(
    clusters: Clusters,
) -> None:
    cluster = clusters.get(CLIENTS)
    cluster.wait_whole()
    prompt = fresh("parked", 20)
    sampling = {"ignore_eos": True, "temperature": 1.0, "seed": 3}
    whole = cluster.caller.ask(prompt, 480, **sampling)
    parked = metric(cluster, "router_parked_total")
    with all_given_back(cluster), unreading(cluster) as stub:
        call = stub.Generate(request(prompt, 480, logprobs=20, **sampling), timeout=60)
        cluster.wait(lambda: metric(cluster, "router_parked_total") > parked, 30.0)
        cluster.check_idle()  # its blocks serve others meanwhile
        assert in_flight(cluster) == 1
        got = [token for chunk in call for token in chunk.token_ids]
        assert tuple(got) == whole.tokens


@contextmanager
def unreading(cluster: Running) -> Iterator[Any]:
    """A stub whose own buffers are as small as they can be made."""
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(cluster.cluster.addresses.grpc, options) as channel:
        yield type(cluster.caller.stub)(channel)


@dataclass
class Tally:
    """What came of requests that were sent in one stretch of time."""

    ends: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, float]] = field(default_factory=list)  # from, to: time.monotonic()
    late: list[float] = field(default_factory=list)  # seconds from asking to a refusal

    async def one(self, client: AsyncClient, prompt: tuple[int, ...]) -> None:
        began = time.monotonic()
        try:
            await client.generate(prompt, max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
            self.ends["answered"] += 1
            self.answered.append((began, time.monotonic()))
        except Overloaded as error:
            self.late.append(time.monotonic() - began)
            self.ends["refused" if error.retry_after_s else "refused without a hint"] += 1

    def rate(self, since: float, until: float) -> float:
        """Answers a second between two moments; each counts by the part of it that lies there.

        Requests that began together end together, so whole answers would count by the wave: of 8 s
        and waves of 1.8 s either 4 or 5.
        """
        parts = (
            max(0.0, min(until, end) - max(since, began)) / (end - began)
            for began, end in self.answered
        )
        return sum(parts) / (until - since)


# The first answers come together and late; what counts is how it goes on.
SETTLE_S = 3.0


async def closed_loop(address: str, seconds: float) -> float:
    """Answers a second with every place taken all the time."""
    tally, began = Tally(), time.monotonic()
    end = began + SETTLE_S + seconds
    rng = random.Random(5)

    async def loop(client: AsyncClient) -> None:
        while time.monotonic() < end:
            await tally.one(client, tuple(rng.randrange(5, 512) for _ in range(60)))

    async with AsyncClient(address) as client:
        await asyncio.gather(*(loop(client) for _ in range(PLACES)))
    assert set(tally.ends) == {"answered"}
    return tally.rate(began + SETTLE_S, end)


async def open_loop(address: str, rate: float, seconds: float) -> tuple[Tally, float]:
    """So many requests a second, whatever becomes of them; and the answers a second."""
    tally, began = Tally(), time.monotonic()
    end = began + SETTLE_S + seconds
    rng = random.Random(6)
    tasks = []
    async with AsyncClient(address) as client:
        for index in range(int(rate * (end - began))):
            await asyncio.sleep(began + index / rate - time.monotonic())
            prompt = tuple(rng.randrange(5, 512) for _ in range(60))
            tasks.append(asyncio.create_task(tally.one(client, prompt)))
        await asyncio.gather(*tasks)
    return tally, tally.rate(began + SETTLE_S, end)


def refusals(cluster: Running) -> dict[str, float]:
    """The router's own histogram: refusals within so many seconds (le)."""
    series = metric_series(cluster, "request_rejection_seconds_bucket")
    return {labels["le"]: count for labels, count in series}


def test_four_times_the_load_is_refused_quickly_and_served_nearly_as_before(
    clusters: Clusters,
) -> None:
    cluster = clusters.get(NARROW)
    cluster.wait_whole()
    address = cluster.cluster.addresses.grpc
    pid = cluster.cluster.router_pid
    with all_given_back(cluster):
        peaks = [asyncio.run(closed_loop(address, PEAK_S))]
        before, counted = rss_bytes(pid), refusals(cluster)
        goodputs, grown = [], 0
        ends: Counter[str] = Counter()
        late: list[float] = []
        for _ in range(TURNS):
            tally, rate = asyncio.run(open_loop(address, 4 * peaks[-1], OVERLOAD_S))
            goodputs.append(rate)
            ends += tally.ends
            late += tally.late
            grown = max(grown, rss_bytes(pid) - before)
            peaks.append(asyncio.run(closed_loop(address, PEAK_S)))
        after = refusals(cluster)
        within = {le: after[le] - counted[le] for le in after}
        client_p99 = sorted(late)[int(len(late) * 0.99)]
        # Each stretch against those beside it; the machine may disturb one of them.
        beside = [mean(pair) for pair in itertools.pairwise(peaks)]
        ratios = [rate / peak for rate, peak in zip(goodputs, beside, strict=True)]
        print(f"peaks {peaks}, goodputs {goodputs} a second: {ratios}; {dict(ends)}")
        print(f"refusals by le: {within}; p99 at the client {1000 * client_p99:.1f} ms")
        print(f"the router grew by {grown / 2**20:.1f} MiB")
        assert set(ends) == {"answered", "refused"}
        assert ends["refused"] > ends["answered"]
        assert within["0.05"] >= 0.99 * within["+Inf"] > 0
        assert median(ratios) >= 0.8
        assert min(ratios) >= 0.4
        assert grown < GROWTH_BYTES


def test_both_fronts_refuse_in_their_own_words(clusters: Clusters) -> None:
    cluster = clusters.get(NARROW)
    cluster.wait_whole()
    prompt = fresh("words", 30)
    with all_given_back(cluster):
        running = [
            cluster.caller.stub.Generate(request(prompt, 400, ignore_eos=True), timeout=30)
            for _ in range(PLACES)
        ]
        cluster.wait(lambda: in_flight(cluster) == PLACES)
        with pytest.raises(grpc.RpcError) as refused:
            cluster.caller.ask(prompt, 4)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(refused.value.trailing_metadata() or ())
        assert int(trailers["pdserve-retry-after-ms"]) > 0
        client = HttpClient(cluster, prompt, stream=False)
        head = client.socket.recv(65536).decode()
        assert head.startswith("HTTP/1.1 429 ")
        assert int(head.lower().partition("retry-after: ")[2].split()[0]) >= 1
        assert json.loads(head.partition("\r\n\r\n")[2])["error"]["code"] == "overloaded"
        client.vanish()
        for call in running:
            call.cancel()
