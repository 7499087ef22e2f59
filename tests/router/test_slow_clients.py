"""Clients that do not read, or do not finish their request: both fronts let go at the deadline."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator

import grpc
import pytest
from fronts_world import World, running_world
from http_talk import call, post

from pdserve.config import RouterConfig
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from tests.standstill import watched

DEADLINE_S = 1.0
LATE_S = 1.0
# Makes each token's part of an answer long, so that no buffer takes it all.
WIDE = {"logprobs": 20, "max_tokens": 230}


@pytest.fixture(scope="module")
def hurried(model_folder) -> Iterator[World]:
    with running_world(model_folder, router=RouterConfig(request_timeout_s=DEADLINE_S)) as world:
        yield world


def connect(world: World, receive_buffer: int = 0) -> socket.socket:
    host, _, port = world.http.rpartition(":")
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect((host, int(port)))
    return made


def send(connection: socket.socket, path: str, body: object) -> None:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)


def push(connection: socket.socket) -> None:
    for _ in range(100):
        connection.sendall(b"x" * 4096)
        time.sleep(0.01)


def test_a_grpc_client_that_reads_nothing_and_names_no_deadline(hurried: World) -> None:
    hurried.says("fox", end=False)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(hurried.grpc, options) as channel:
        stub = pb_grpc.InferenceStub(channel)
        sampling = pb.SamplingParams(**WIDE, ignore_eos=True)
        unread = stub.Generate(pb.GenerateRequest(text="dog", sampling=sampling))
        assert hurried.busy()
        assert hurried.idle(DEADLINE_S + LATE_S)
        # Whoever reads on at last learns how it ended; had all fitted into buffers, it ended well.
        with pytest.raises(grpc.RpcError) as late:
            for _ in unread:
                pass
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_http_client_that_reads_nothing_loses_its_connection(
    hurried: World, stream: bool
) -> None:
    hurried.says("fox", end=False)
    connection = connect(hurried, receive_buffer=1)
    more = {"logprobs": 20, "max_tokens": 230, "n": 16, "ignore_eos": True, "stream": stream}
    send(connection, "/v1/completions", {"prompt": "dog", **more})
    assert hurried.busy()
    assert hurried.idle(DEADLINE_S + LATE_S)
    time.sleep(0.7)  # the front's own patience
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        push(connection)
    connection.close()


def test_a_body_that_does_not_come_is_not_waited_for(hurried: World) -> None:
    connection = connect(hurried)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    connection.settimeout(10)
    with watched() as still:
        began = time.monotonic()
        assert connection.recv(4096).startswith(b"HTTP/1.1 504 ")
        assert time.monotonic() - began < DEADLINE_S + LATE_S + still.seconds
    connection.close()


def test_without_a_place_a_request_is_refused_before_it_is_read(world: World) -> None:
    """A prompt that could not be tokenized at all is refused for want of a place, and fast."""
    world.dispatcher.places = 0
    body = {"prompt": "dog " * 100_000}
    reply = post(world.http, "/v1/completions", body)
    assert reply.status == 429
    assert reply.headers["retry-after"] == "2"
    with grpc.insecure_channel(world.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(text="dog " * 100_000)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata())["pdserve-retry-after-ms"] == "1500"
        # One that takes a running request over needs no place of its own.
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(pb.GenerateRequest(text="dog " * 100_000, resume=True)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    world.dispatcher.places = None
    assert post(world.http, "/v1/completions", body).status == 400
    metrics = call(world.http, "GET", "/metrics").body.decode()
    counted = [line for line in metrics.splitlines() if "rejection_seconds_bucket" in line]
    assert any('le="0.05"' in line for line in counted)


def test_templates_that_fail_after_their_clients_left_harm_nobody(world: World) -> None:
    chat = {"messages": [{"role": "stranger", "content": "x" * 2000}]}
    for turn in range(40):
        connection = connect(world)
        send(connection, "/v1/chat/completions", chat)
        time.sleep(0.001 * (turn % 5))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert post(world.http, "/v1/chat/completions", chat).status == 400
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    reply = post(world.http, "/v1/chat/completions", hello)
    assert reply.json["choices"][0]["message"]["content"] == "the quick brown fox"
