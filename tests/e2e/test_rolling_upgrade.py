"""A rolling upgrade with streams running: every router and worker is another one in the end.

Without a RayCluster each pod of the chart is a whole cluster, and a Deployment replaces them one by
one: a new pod is ready before an old one leaves the Service (maxUnavailable 0, maxSurge 1), and an
old one leaves the Service before it drains (preStop). This does the same with real clusters behind
one address, a new configuration, and clients that never stop asking. No answer may be lost, and
each is the one that a calm cluster gives.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from openai import OpenAI

from pdserve.cli.self_question import wait_ready
from pdserve.client import Client
from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config_load import load_config
from tests.e2e.clusters import Clusters, Variant, settings
from tests.models import CONTEXT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SEED = 23
STREAMS = 4
LENGTH = 300
# As a pod's preStop: in it the endpoints forget the pod, which still serves.
PRE_STOP_S = 1.0
# Shorter than a stream, so that some are cut and have to be taken over by the next pod.
DRAIN_S = 1.0
OLD = Variant("llama", "shm", "roomy")
NEW = Variant("llama", "tcp", "roomy", chunk=32, settings=("log.level=debug",))


class Address:
    """A Service: each new connection goes to one of the ready pods, in turn; open ones stay."""

    def __init__(self) -> None:
        self.pods: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        host, port = self._listener.getsockname()
        self.name = f"{host}:{port}"
        self._turn = 0
        self.led_to: Counter[str] = Counter()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            pods = self.pods
            self._turn += 1
            pod = pods[self._turn % len(pods)]
            host, _, port = pod.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self.led_to[pod] += 1
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Pods:
    """The Deployment: whole clusters, and the addresses that lead to those that are ready."""

    def __init__(self, clusters: Clusters, folder: Path) -> None:
        self._clusters = clusters
        self._folder = folder
        self.grpc, self.http = Address(), Address()
        self.running: list[Cluster] = []
        self._count = 0

    def add(self, variant: Variant) -> Cluster:
        """A pod more; it is led to when it is ready."""
        self._count += 1
        name = f"pod{self._count}"
        config = load_config(
            None,
            [
                *settings(variant, CONTEXT, self._clusters.model("llama")),
                "cache.redis.mode=off",
                f"timers.drain_s={DRAIN_S}",
                *variant.settings,
            ],
            {"name": name, "state_dir": str(self._folder / name)},
        )
        made = start_cluster(config, ray=self._clusters.ray)
        self.running.append(made)
        wait_ready(made.http, 2)
        self._lead()
        return made

    def end(self, pod: Cluster, pre_stop_s: float = PRE_STOP_S) -> None:
        self.running.remove(pod)
        self._lead()
        time.sleep(pre_stop_s)
        pod.stop()

    def _lead(self) -> None:
        if self.running:
            self.grpc.pods = [pod.addresses.grpc for pod in self.running]
            self.http.pods = [pod.addresses.http for pod in self.running]

    def close(self) -> None:
        for pod in list(self.running):
            self.end(pod, 0.0)
        self.grpc.close()
        self.http.close()


@pytest.fixture
def pods(clusters: Clusters, tmp_path: Path) -> Iterator[Pods]:
    clusters.stop()
    made = Pods(clusters, tmp_path)
    try:
        yield made
    finally:
        made.close()


class Asking:
    """Clients that ask one question after another until told to stop."""

    def __init__(self, pods: Pods) -> None:
        rng = random.Random(SEED)
        print("seed", SEED)
        self.prompts = [tuple(rng.randrange(5, 512) for _ in range(60)) for _ in range(STREAMS)]
        self._pods = pods
        self.over = threading.Event()
        self.answers = [0] * (STREAMS + 1)  # of each client; OpenAI's is the last
        with Client(pods.grpc.name) as client:
            self.expected = [_ask(client, prompt) for prompt in self.prompts]

    def by_grpc(self, index: int) -> None:
        """One channel for all, as a service that calls us would have it."""
        with Client(self._pods.grpc.name) as client:
            while not self.over.is_set():
                assert _ask(client, self.prompts[index]) == self.expected[index]
                self.answers[index] += 1

    def by_http(self) -> None:
        """OpenAI's own client, with its own retries; each answer fits into the drain."""
        with OpenAI(base_url=f"http://{self._pods.http.name}/v1", api_key="none") as client:
            while not self.over.is_set():
                done = client.completions.create(
                    model=client.models.list().data[0].id,
                    prompt=list(self.prompts[0]),
                    max_tokens=4,
                    temperature=0,
                )
                assert done.usage is not None
                assert done.usage.completion_tokens == 4
                self.answers[STREAMS] += 1


def _ask(client: Client, prompt: tuple[int, ...]) -> list[int]:
    tokens: list[int] = []
    options = {"max_tokens": LENGTH, "temperature": 0.0, "ignore_eos": True, "timeout_s": 60}
    for chunk in client.stream(prompt, **options):
        assert chunk.offset == len(tokens), "a gap or a repeat"
        tokens += chunk.token_ids
    return tokens


def test_streams_go_on_while_every_pod_is_replaced(pods: Pods) -> None:
    old = [pods.add(OLD), pods.add(OLD)]
    asking = Asking(pods)
    with ThreadPoolExecutor(STREAMS + 1) as pool:
        clients = [pool.submit(asking.by_grpc, index) for index in range(STREAMS)]
        clients.append(pool.submit(asking.by_http))
        try:
            time.sleep(1.0)
            for pod in old:
                before = list(asking.answers)
                pods.add(NEW)
                assert not [one for one in clients if one.done()], "nobody gave up"
                pods.end(pod)
                # Whoever was on the old pod is served by another one.
                end = time.monotonic() + 40
                while any(now < then + 2 for now, then in zip(asking.answers, before, strict=True)):
                    assert time.monotonic() < end, (before, asking.answers)
                    assert not [one.result() for one in clients if one.done()]
                    time.sleep(0.1)
        finally:
            asking.over.set()
        for one in clients:
            one.result(60)
    assert {pod.config.engine.prefill_chunk for pod in pods.running} == {NEW.chunk}
    # gRPC's channels share one connection; which new pod took it over is the address's choice.
    assert sum(pods.grpc.led_to[pod.addresses.grpc] for pod in pods.running) > 0
    assert sum(pods.http.led_to[pod.addresses.http] for pod in pods.running) > 0
    print(f"{asking.answers} answers by client, {dict(pods.grpc.led_to)} connections by pod")
