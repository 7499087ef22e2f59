"""Limits that belong to no field: connections, headers, bodies, metadata. See docs/security.md."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

import grpc
import pytest
from fronts_world import running_world
from http_talk import call, post

from pdserve.config import RouterConfig
from pdserve.errors import Overloaded
from pdserve.rpc.status import from_rpc_error
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc

COMPLETE = "/v1/completions"
ROOM = 5


@pytest.fixture(scope="module")
def narrow(model_folder):
    with running_world(
        model_folder, router=RouterConfig(max_connections=ROOM, max_body_bytes=4096)
    ) as world:
        world.says("the fox")
        yield world


def connect(world) -> socket.socket:
    host, port = world.http.split(":")
    return socket.create_connection((host, int(port)), 5)


def is_closed(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def answers(world) -> bool:
    try:
        return call(world.http, "GET", "/health").status == 200
    except OSError:
        return False


def test_a_connection_too_many_is_closed_and_room_comes_back(narrow) -> None:
    held = [connect(narrow) for _ in range(ROOM)]
    assert not any(is_closed(sock) for sock in held)
    one_more = connect(narrow)
    assert is_closed(one_more)
    assert not answers(narrow)
    # Those that are in go on as before.
    held[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    held[0].settimeout(5)
    assert held[0].recv(100).startswith(b"HTTP/1.1 200")
    for sock in (*held, one_more):
        sock.close()
    end = time.monotonic() + 5
    while not answers(narrow):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_headers_and_bodies_have_a_longest(narrow) -> None:
    assert call(narrow.http, "GET", "/health", headers={"X-Long": "x" * 15_000}).status == 200
    assert call(narrow.http, "GET", "/health", headers={"X-Long": "x" * 20_000}).status == 400
    assert call(narrow.http, "GET", "/" + "x" * 20_000).status == 400
    assert post(narrow.http, COMPLETE, {"prompt": "x", "user": "u" * 5000}).status == 413


def test_grpc_has_a_longest_message_and_most_metadata(narrow) -> None:
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=1))
    with grpc.insecure_channel(narrow.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        assert list(stub.Generate(request, timeout=10, metadata=(("x-some", "x" * 8_000),)))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=10, metadata=(("x-much", "x" * 100_000),)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="x" * 5000), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert list(stub.Generate(request, timeout=10))


def _outcome(call: Iterable[pb.GenerateResponse]) -> str:
    """``tokens`` or ``refused``; nothing else may become of a stream."""
    try:
        tokens = sum(len(message.token_ids) for message in call)
    except grpc.RpcError as raised:
        refusal = from_rpc_error(raised)
    else:
        assert tokens == 2
        return "tokens"
    assert isinstance(refusal, Overloaded), refusal
    assert refusal.retry_after_s, "a refusal says when to come back"
    return "refused"


def test_streams_above_the_limit_of_a_connection_are_refused_and_never_run(narrow) -> None:
    """Every stream of three times the limit is answered at once: by tokens, or by a typed no."""
    narrow.dispatcher.pause_s = 0.3
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=2))
    most = 0
    own = [("grpc.use_local_subchannel_pool", 1)]
    try:
        with (
            grpc.insecure_channel(narrow.grpc, own) as channel,
            grpc.insecure_channel(narrow.grpc, own) as neighbour,
        ):
            stub = pb_grpc.InferenceStub(channel)
            began = time.monotonic()
            calls = [stub.Generate(request, timeout=20) for _ in range(3 * ROOM)]
            while time.monotonic() < began + 0.3:
                most = max(most, narrow.dispatcher.open)
                time.sleep(0.01)
            # The limit is each connection's own.
            assert _outcome(pb_grpc.InferenceStub(neighbour).Generate(request)) == "tokens"
            outcomes = [_outcome(one) for one in calls]
            assert time.monotonic() - began < 5, "nothing waited for a deadline"
            # Their places are free again, all of them.
            assert narrow.idle()
            again = [_outcome(one) for one in [stub.Generate(request) for _ in range(ROOM)]]
    finally:
        narrow.dispatcher.pause_s = 0.0
    assert most == ROOM
    assert outcomes.count("tokens") >= ROOM
    assert outcomes.count("refused") >= ROOM
    assert again == ["tokens"] * ROOM
