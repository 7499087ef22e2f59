"""A prefill worker that could not be reached is reached at once when the network is back."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from decode_worker import peer
from decode_worker.peer import PeerStubs, PrefillPeer
from pdserve.errors import PdserveError
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import kv_pb2, kv_pb2_grpc

TOKEN = secrets.token_hex(16)


class Prefill(kv_pb2_grpc.PrefillServicer):
    async def Run(self, requests: Any, context: Any) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        yield kv_pb2.PrefillToDecode(started=kv_pb2.Started())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def called(stubs: PeerStubs, address: str) -> list[str | None]:
    one = PrefillPeer(stubs.stub(address), kv_pb2.StartPrefill(), 1.0)
    try:
        return [message.WhichOneof("message") async for message in one.messages()]
    finally:
        one.drop()


def test_channels_of_workers_that_are_gone_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a prefill worker has another address."""
    monkeypatch.setattr(peer, "UNUSED_S", 0.2)

    async def story() -> list[int]:
        stubs = PeerStubs(mint(TOKEN, Caller.DECODE), 2**20)
        server = make_server(mint(TOKEN, Caller.PREFILL))
        kv_pb2_grpc.add_PrefillServicer_to_server(Prefill(), server)
        alive = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
        await server.start()
        assert await called(stubs, alive) == ["started"]
        counts = []
        for _ in range(6):
            with pytest.raises(PdserveError):
                await called(stubs, f"127.0.0.1:{free_port()}")
            counts.append(len(stubs._channels))
            await asyncio.sleep(0.3)
        assert await called(stubs, alive) == ["started"]
        await stubs.close()
        await server.stop(0)
        return counts

    assert asyncio.run(story())[-1] <= 3


class Lasting(kv_pb2_grpc.PrefillServicer):
    """Notes by which connection each call comes; a call ends when it is let go."""

    def __init__(self) -> None:
        self.connections: list[str] = []
        self.called = asyncio.Event()
        self.go_on = asyncio.Event()

    async def Run(self, requests: Any, context: Any) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        self.connections.append(context.peer())
        self.called.set()
        yield kv_pb2.PrefillToDecode(started=kv_pb2.Started())
        await self.go_on.wait()
        yield kv_pb2.PrefillToDecode(finished=kv_pb2.PrefillFinished())


def test_later_calls_take_a_new_connection_and_open_ones_keep_theirs() -> None:
    """The old one may stand still: TCP repeats itself rarely after a cut."""

    async def story() -> tuple[list[list[str | None]], list[str]]:
        stubs = PeerStubs(mint(TOKEN, Caller.DECODE), 2**20)
        service = Lasting()
        server = make_server(mint(TOKEN, Caller.PREFILL))
        kv_pb2_grpc.add_PrefillServicer_to_server(service, server)
        address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
        await server.start()
        calls = []
        for _ in range(2):
            calls.append(asyncio.create_task(called(stubs, address)))
            await service.called.wait()
            service.called.clear()
            stubs.renew()
        await asyncio.sleep(0.1)
        service.go_on.set()
        heard = await asyncio.wait_for(asyncio.gather(*calls), 5)
        await stubs.close()
        await server.stop(0)
        return heard, service.connections

    heard, connections = asyncio.run(story())
    assert heard == [["started", "finished"]] * 2
    assert len(set(connections)) == 2


def test_who_could_not_be_reached_is_dialled_anew() -> None:
    async def story() -> None:
        stubs = PeerStubs(mint(TOKEN, Caller.DECODE), 2**20)
        port = free_port()
        address = f"127.0.0.1:{port}"
        # Several times, so that the pause between two tries has grown.
        for _ in range(12):
            with pytest.raises(PdserveError):
                await called(stubs, address)
            await asyncio.sleep(0.25)
        server = make_server(mint(TOKEN, Caller.PREFILL))
        kv_pb2_grpc.add_PrefillServicer_to_server(Prefill(), server)
        bind(server, address)
        await server.start()
        stubs.renew()  # without it this call fails as well, unless a try falls into this moment
        assert await called(stubs, address) == ["started"]
        stubs.renew()
        assert await called(stubs, address) == ["started"]
        await stubs.close()
        await server.stop(0)

    asyncio.run(story())
