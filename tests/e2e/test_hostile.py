"""Fuzzed requests on both fronts, noise on every port: no process ends, a canary always answers."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from pdserve.v1 import inference_pb2 as pb
from tests.e2e.clusters import Clusters, Running, Variant
from tests.fuzz import FRAMES, LONG, REQUESTS, mutated, seeded, value
from tests.sockets import listeners

pytestmark = pytest.mark.cluster

# The same as in test_listening.py: one cluster serves both.
VARIANT = Variant("llama", "tcp", "tight")
CANARY = (5, 6, 7) * 20
CANARY_EVERY = 100
CALLERS = 8
LONGEST_ANSWER = 8
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "best_of", "seed"),
    *("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "logprobs", "logit_bias"),
    *("stream", "stream_options", "presence_penalty", "repetition_penalty", "min_tokens", "echo"),
    *("prompt_logprobs", "top_logprobs", "cache_salt", "priority", "request_id", "resume", "user"),
    *("generated_token_ids", "tokens", "add_special_tokens", "chat_template_kwargs", "tools"),
)
# 5xx that say what they mean; 500 is what must not be.
TYPED = {200, 400, 401, 404, 405, 408, 409, 411, 413, 415, 422, 429, 499, 503, 504}
GRPC_BAD = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


class Canary:
    """A request whose answer is known, asked again and again while others misbehave."""

    def __init__(self, cluster: Running) -> None:
        self._cluster = cluster
        self._before = {facts.id: facts.pid for facts in cluster.cluster.workers()}
        self._router = cluster.cluster.router_pid
        self._expected = self._ask()

    def _ask(self) -> tuple[int, ...]:
        return self._cluster.caller.ask(CANARY, 6).tokens

    def sing(self) -> None:
        assert self._ask() == self._expected

    def check(self) -> None:
        """Nothing ended or was replaced, nothing is left behind."""
        self.sing()
        assert {f.id: f.pid for f in self._cluster.cluster.workers()} == self._before
        assert self._cluster.cluster.router_pid == self._router
        self._cluster.check_idle()


def run_all(cluster: Running, calls: list[Any]) -> None:
    canary = Canary(cluster)
    with ThreadPoolExecutor(CALLERS) as pool:
        for at in range(0, len(calls), CANARY_EVERY):
            futures = [pool.submit(call) for call in calls[at : at + CANARY_EVERY]]
            canary.sing()
            for future in futures:
                future.result(120)
    canary.check()


def test_requests_on_the_http_front(clusters: Clusters) -> None:
    cluster = clusters.get(VARIANT)
    rng = seeded("http")
    address = cluster.http.removeprefix("http://")
    statuses: dict[int, int] = {}

    def call(path: str, body: bytes, headers: dict[str, str]) -> None:
        status = post(address, path, body, headers)
        assert status in TYPED, (status, path, body[:300])
        statuses[status] = statuses.get(status, 0) + 1

    cases = [http_case(rng) for _ in range(REQUESTS // 2)]
    run_all(cluster, [lambda case=case: call(*case) for case in cases])  # type: ignore[misc]
    print(statuses)
    assert statuses[200] > 0, "no request was good: the noise tests one check only"
    assert statuses[400] > 0


def http_case(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    path = rng.choice(PATHS)
    good = good_body(path)
    for _ in range(rng.randrange(3)):
        good[rng.choice(FIELDS)] = value(rng)
    if "max_tokens" in good and isinstance(good["max_tokens"], int):
        good["max_tokens"] = min(good["max_tokens"], LONGEST_ANSWER)
    body = json.dumps(good).encode()
    if rng.random() < 0.3:
        body = mutated(rng, [body])
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.1:
        headers[rng.choice(("Authorization", "X-Request-Id", "Accept"))] = "x" * rng.randrange(9000)
    return path, body, headers


def good_body(path: str) -> dict[str, Any]:
    if path == "/v1/chat/completions":
        return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    if path == "/v1/completions":
        return {"prompt": [5, 6, 7], "max_tokens": 3}
    return {"prompt": "hi"} if path == "/tokenize" else {"tokens": [5, 6]}


def post(address: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def test_messages_on_the_grpc_front(clusters: Clusters) -> None:
    cluster = clusters.get(VARIANT)
    rng = seeded("grpc")
    generate = cluster.caller.channel.unary_stream("/pdserve.v1.Inference/Generate")
    codes: dict[str, int] = {}

    def call(data: bytes) -> None:
        try:
            for _ in generate(data, timeout=60):
                pass
            code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            code = error.code()
            if code in GRPC_BAD:
                raise AssertionError((code, error.details(), data[:300])) from error
        codes[code.name] = codes.get(code.name, 0) + 1

    cases = [grpc_case(rng) for _ in range(REQUESTS // 2)]
    run_all(cluster, [lambda data=data: call(data) for data in cases])  # type: ignore[misc]
    print(codes)
    assert codes["OK"] > 0
    assert codes["INVALID_ARGUMENT"] > 0


def grpc_case(rng: random.Random) -> bytes:
    # Most are bounded by their answer's length, all by the context.
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[rng.randrange(5, 512) for _ in range(rng.randrange(1, 60))]),
        sampling=pb.SamplingParams(
            max_tokens=rng.randrange(1, LONGEST_ANSWER),
            temperature=rng.choice((0.0, 1.0, -1.0, float("nan"), float("inf"), 1e-30)),
            top_p=rng.choice((1.0, 0.5, 2.0)),
            seed=rng.randrange(2**64),
            stop=["x"] * rng.choice((0, 0, 1, 100)),
        ),
        request_id=rng.choice(("", "", "same", "\0", "x" * 1000)),
    )
    data = request.SerializeToString()
    if rng.random() < 0.5:
        data = mutated(rng, [data, pb.GenerateRequest(text="hi").SerializeToString()])
    return data


HELLOS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("ffffff010400000001"),
    b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48),  # how a ZMQ peer begins
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(100),  # and a TLS one
]


def test_noise_on_every_port_of_ours(clusters: Clusters) -> None:
    cluster = clusters.get(VARIANT)
    rng = seeded("noise")
    canary = Canary(cluster)
    pids = [facts.pid for facts in cluster.cluster.workers()]
    found = listeners([cluster.cluster.router_pid, *pids])
    ports = sorted({one.port for one in found if one.protocol.startswith("tcp")})
    assert len(ports) >= 3 + 3 * len(pids)
    for number in range(FRAMES // 10):
        port = ports[number % len(ports)]
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            try:
                sock.sendall(mutated(rng, HELLOS))
                if number % 3 == 0:
                    sock.settimeout(0.02)
                    sock.recv(1000)
            except OSError:
                pass  # it closed the connection, or says nothing: both are its right
        if number % CANARY_EVERY == 0:
            canary.sing()
    canary.check()


def test_a_thousand_idle_connections_leave_room_for_a_request(clusters: Clusters) -> None:
    cluster = clusters.get(VARIANT)
    canary = Canary(cluster)
    host, port = cluster.http.removeprefix("http://").split(":")
    count = 1000 if LONG else 300
    held = [socket.create_connection((host, int(port)), 10) for _ in range(count)]
    for sock in held[::2]:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    began = time.monotonic()
    canary.sing()
    status = post(
        f"{host}:{port}", "/v1/completions", json.dumps(good_body("/v1/completions")).encode(), {}
    )
    assert status == 200
    assert time.monotonic() - began < 10
    for sock in held:
        sock.close()
    canary.check()
