"""The stream to a prefill worker: one ``Prefill.Run`` call of one attempt, seen from its caller.

peer = PrefillPeer(stub, start, ...)    the call is open
peer.grant(...) / peer.done() / peer.drop()
async for message in peer.messages()    typed errors instead of RPC errors
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from pdserve.errors import WorkerLost
from pdserve.rpc.channels import make_channel
from pdserve.rpc.identity import Identity
from pdserve.rpc.status import from_rpc_error
from pdserve.v1 import kv_pb2, kv_pb2_grpc

FAREWELL_S = 2.0
# A worker that started anew has another address: what was open to the one before it goes after so
# long without a call.
UNUSED_S = 60.0
LEFT_OPEN_S = 5.0
_ALIVE = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.CONNECTING)
_BROKEN = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.CONNECTING)


class PrefillPeer:
    """Owns the call. ``keep_alive_s`` is well below the peer's lease."""

    def __init__(
        self, stub: kv_pb2_grpc.PrefillStub, start: kv_pb2.StartPrefill, keep_alive_s: float
    ) -> None:
        self._outbox: asyncio.Queue[kv_pb2.DecodeToPrefill | None] = asyncio.Queue()
        self._keep_alive_s = keep_alive_s
        self.dropped = False  # ended from this side, before its time
        self._outbox.put_nowait(kv_pb2.DecodeToPrefill(start=start))
        self._call = stub.Run(self._requests())

    def grant(self, block_indices: tuple[int, ...]) -> None:
        grant = kv_pb2.Grant(block_indices=block_indices)
        self._outbox.put_nowait(kv_pb2.DecodeToPrefill(grant=grant))

    def done(self) -> None:
        self._outbox.put_nowait(kv_pb2.DecodeToPrefill(done=kv_pb2.Done()))
        self._outbox.put_nowait(None)

    def drop(self) -> None:
        self.dropped = True
        self._call.cancel()

    def denounce(self, suspect: tuple[int, ...]) -> None:
        """Ends the call by saying which offered blocks arrived damaged."""
        self.dropped = True
        cancel = kv_pb2.CancelPrefill(reason="blocks arrived damaged", suspect_blocks=suspect)
        self._outbox.put_nowait(kv_pb2.DecodeToPrefill(cancel=cancel))
        self._outbox.put_nowait(None)
        # The peer closes the call when it has read this; one that does not is cut off.
        asyncio.get_running_loop().call_later(FAREWELL_S, self._call.cancel)

    async def messages(self) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        """Ends when the peer ended the call well; raises PdserveError when it did not."""
        try:
            async for message in self._call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            # grpc raises this for a call that drop() cancelled, as for a cancelled task.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost("the hand-off was dropped") from None

    async def _requests(self) -> AsyncIterator[kv_pb2.DecodeToPrefill]:
        while True:
            try:
                message = await asyncio.wait_for(self._outbox.get(), self._keep_alive_s)
            except TimeoutError:
                yield kv_pb2.DecodeToPrefill(keep_alive=kv_pb2.KeepAlive())
                continue
            if message is None:
                return
            yield message


class PeerStubs:
    """One channel per prefill address, opened when first used."""

    def __init__(self, identity: Identity, max_message_bytes: int) -> None:
        self._identity = identity
        self._max_message_bytes = max_message_bytes
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._used: dict[str, float] = {}  # time.monotonic() of the last call to it
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> kv_pb2_grpc.PrefillStub:
        channel = self._channels.get(address)
        self._used[address] = time.monotonic()
        if channel is None:
            self._drop_unused()
            channel = make_channel(
                address, self._identity, max_message_bytes=self._max_message_bytes
            )
            self._channels[address] = channel
        return kv_pb2_grpc.PrefillStub(channel)

    def renew(self) -> None:
        """Everybody is dialled anew by the next call. For a moment when the network may be back.

        A call to who could not be reached would fail until the pause between two tries is over, and
        a connection that outlived the cut stands still until TCP repeats itself, which it does the
        more rarely the longer the cut was. Calls that are open there are left some time.
        """
        for address, channel in list(self._channels.items()):
            self._drop(address, None if channel.get_state() in _BROKEN else LEFT_OPEN_S)

    def _drop_unused(self) -> None:
        limit = time.monotonic() - UNUSED_S
        for address, channel in list(self._channels.items()):
            if self._used[address] < limit and channel.get_state() not in _ALIVE:
                self._drop(address, None)

    def _drop(self, address: str, grace_s: float | None) -> None:
        del self._used[address]
        task = asyncio.get_running_loop().create_task(self._channels.pop(address).close(grace_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
