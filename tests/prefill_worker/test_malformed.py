"""Bytes that are no message end their hand-off at once, and nothing of it stays."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hand_off_world import START, HandOff

from pdserve.v1 import kv_pb2, kv_pb2_grpc


def test_bytes_that_are_no_message_end_the_hand_off() -> None:
    async def story() -> None:
        it = HandOff(lease_s=60.0)
        it.bridge.attach(asyncio.get_running_loop(), it.posted.append, None, None)
        server = grpc.aio.server()
        kv_pb2_grpc.add_PrefillServicer_to_server(it.service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.stream_stream("/pdserve.v1.Prefill/Run")()
                await call.write(kv_pb2.DecodeToPrefill(start=START).SerializeToString())
                await call.read()
                await call.write(b"\xff" * 4)
                with pytest.raises(grpc.aio.AioRpcError):
                    await asyncio.wait_for(call.read(), 10)
            assert it.gave_back()
            assert it.service.attempts == 0
        finally:
            await server.stop(0)
            it.service.close()

    asyncio.run(story())
