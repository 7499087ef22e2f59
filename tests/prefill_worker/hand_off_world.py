"""One hand-off at a prefill worker's service: the peer and the engine are played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import prefill_worker.service as service
from kv_transfer.base import BlockOffer, Endpoint
from pdserve.engine import api
from pdserve.errors import PdserveError
from pdserve.types import PROTOCOL_VERSION
from pdserve.v1 import kv_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS as FACTS

SEQ = api.SeqId(b"a" * 16)
KEYS = (api.BlockKey(b"j" * 16), api.BlockKey(b"k" * 16))
START = kv_pb2.StartPrefill(
    attempt_id=SEQ,
    tokens=kv_pb2.AttemptTokens(
        token_ids=range(1, 10), prompt_len=9, key_root=b"r" * 16, block_keys=b"".join(KEYS)
    ),
    sampling=kv_pb2.EngineSampling(max_tokens=4, temperature=0, top_p=1.0, repetition_penalty=1.0),
    remaining_ms=60_000,
    expected_incarnation=FACTS.incarnation,
    layout_fingerprint=FACTS.model.fingerprint,
    protocol_version=PROTOCOL_VERSION,
)
ENDPOINT = Endpoint(
    FACTS.incarnation, FACTS.model.fingerprint, 10, 64, "h", 1, 0, "", "", b"", 0, ()
)


def denouncing(*blocks: int) -> kv_pb2.DecodeToPrefill:
    cancel = kv_pb2.CancelPrefill(reason="blocks arrived damaged", suspect_blocks=blocks)
    return kv_pb2.DecodeToPrefill(cancel=cancel)


class Exporter:
    """Hashes blocks at once, or waits for ``go_on`` first."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()

    def endpoint(self) -> Endpoint:
        return ENDPOINT

    def offers(self, wanted: Sequence[tuple[int, int]]) -> tuple[BlockOffer, ...]:
        assert self.go_on.wait(10)
        return tuple(BlockOffer(index, block, 0, 0) for index, block in wanted)


class HandOff:
    """``async with HandOff() as it``: the peer has sent its start; it reads by ``it.hear()``.

    ``posted``: what the engine was told. ``it.ended`` is why the service ended the stream.
    """

    def __init__(self, lease_s: float = 5.0, start: kv_pb2.StartPrefill = START) -> None:
        self.posted: list[api.Command] = []
        self.exporter = Exporter()
        self.bridge = EngineBridge()
        self.ended: PdserveError | None = None
        exporter: Any = self.exporter
        self.service = service.PrefillService(
            self.bridge, exporter, lambda: FACTS, lease_s, lambda: False
        )
        self._start = start
        self._wire: asyncio.Queue[kv_pb2.DecodeToPrefill | None] = asyncio.Queue()
        self._heard: asyncio.Queue[kv_pb2.PrefillToDecode | None] = asyncio.Queue(maxsize=1)

    async def __aenter__(self) -> HandOff:
        self.bridge.attach(asyncio.get_running_loop(), self.posted.append, None, None)
        self.say(kv_pb2.DecodeToPrefill(start=self._start))
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.hang_up()
        self.exporter.go_on.set()
        self.service.close()

    def say(self, message: kv_pb2.DecodeToPrefill) -> None:
        self._wire.put_nowait(message)

    def close(self) -> None:
        """The peer ends its side of the stream."""
        self._wire.put_nowait(None)

    def happens(self, *events: api.Event) -> None:
        """The engine tells; the attempt hears it in the loop's next round."""
        self.bridge.sink(events)

    async def hear(self) -> str:
        """Which message comes next; empty once the stream is over."""
        message = await asyncio.wait_for(self._heard.get(), 10)
        return "" if message is None else str(message.WhichOneof("message"))

    async def over(self) -> bool:
        """Once the stream has ended; what came before is passed over."""
        while await self.hear():
            pass
        return True

    async def hang_up(self) -> None:
        """What the server does when the peer cancels the call."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def forgotten(self) -> list[api.BlockKey]:
        return [k for each in self.posted if isinstance(each, api.Forget) for k in each.keys]

    def gave_back(self) -> bool:
        return any(isinstance(command, api.Release) for command in self.posted)

    async def _requests(self) -> AsyncIterator[kv_pb2.DecodeToPrefill]:
        while (message := await self._wire.get()) is not None:
            yield message

    async def _run(self) -> None:
        context: Any = None
        try:
            async with contextlib.aclosing(self.service.Run(self._requests(), context)) as stream:
                async for message in stream:
                    await self._heard.put(message)
        except PdserveError as error:
            self.ended = error
        await self._heard.put(None)
