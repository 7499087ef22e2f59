"""Workers of the router's own protocols, over real sockets, that do what a script says.

A scripted decode worker writes the tokens of ``expected``: a function of the prompt and the
position alone, as a real worker's are, so a resumed stream can be compared with an unbroken one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pdserve.errors import PdserveError, WorkerLost
from pdserve.rpc import convert
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, mint
from pdserve.types import (
    Fingerprint,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    RequestId,
    Role,
    Sampling,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import inference_pb2, kv_pb2, worker_pb2, worker_pb2_grpc
from router.api import ANONYMOUS, Job

TOKEN = "cluster-token"
VOCAB = 1000
BLOCK = 4
MODEL = ModelFacts(
    path="/model",
    max_model_len=512,
    vocab_size=VOCAB,
    block_size=BLOCK,
    dtype="float32",
    numerics=Numerics.EXACT,
    fingerprint=Fingerprint(b"f" * 32),
)


def expected(prompt: Sequence[int], position: int) -> int:
    return (sum(prompt) * 7 + 31 * position + 1) % VOCAB


def answer(prompt: Sequence[int], length: int) -> list[int]:
    return [expected(prompt, position) for position in range(length)]


def facts(
    name: str, role: Role = Role.DECODE, *, blocks: int = 100, model: ModelFacts = MODEL
) -> WorkerFacts:
    return WorkerFacts(
        id=WorkerId(name),
        incarnation=Incarnation(os.urandom(16)),
        role=role,
        pid=1,
        node="here",
        address="127.0.0.1:1",
        model=model,
        blocks_total=blocks,
    )


def job(
    name: str = "r", prompt: Sequence[int] = (1, 2, 3, 4, 5), tokens: int = 8, **other: object
) -> Job:
    sampling = Sampling(max_tokens=tokens, **other.pop("sampling", {}))  # type: ignore[arg-type]
    values = {"deadline": time.monotonic() + 20, "principal": ANONYMOUS, **other}
    return Job(RequestId(name), prompt=tuple(prompt), sampling=sampling, **values)  # type: ignore[arg-type]


# ---- what a script can do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """So many of the right tokens, one event each."""

    count: int


@dataclass(frozen=True)
class Shift:
    """A right token under an offset that is wrong by so many: a gap or a repeat."""

    by: int


@dataclass(frozen=True)
class Fail:
    """Ends the attempt with this error."""

    error: PdserveError
    suspect: str = ""


@dataclass(frozen=True)
class Hang:
    """Says nothing more about the attempt."""


@dataclass(frozen=True)
class Break:
    """Ends the session, and with it every attempt on it."""


@dataclass(frozen=True)
class Stranger:
    """An event of an attempt that nobody started."""


@dataclass(frozen=True)
class Raw:
    """Any event at all."""

    make: Callable[[worker_pb2.StartAttempt], worker_pb2.AttemptEvent]


Action = Write | Shift | Fail | Hang | Break | Stranger | Raw


@dataclass
class ScriptedWorker(worker_pb2_grpc.WorkerServicer, worker_pb2_grpc.DecodeServicer):
    """``scripts``: one list of actions for each attempt in turn; then every attempt succeeds."""

    name: str
    role: Role = Role.DECODE
    scripts: list[list[Action]] = field(default_factory=list)
    token_delay_s: float = 0.0
    model: ModelFacts = MODEL
    blocks: int = 100
    load: Load = Load()
    beating: bool = True
    moves_kv: bool = True
    port: int = 0
    starts: list[worker_pb2.StartAttempt] = field(default_factory=list)
    cancelled: list[bytes] = field(default_factory=list)
    keep_alives: int = 0
    peers_gone: list[bytes] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> WorkerFacts:
        self._beat = asyncio.Event()
        self.server = make_server(mint(TOKEN, Caller.DECODE))
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_DecodeServicer_to_server(self, self.server)
        self.port = bind(self.server, f"127.0.0.1:{self.port}")
        await self.server.start()
        plain = facts(self.name, self.role, blocks=self.blocks, model=self.model)
        self.facts = replace(plain, address=f"127.0.0.1:{self.port}")
        return self.facts

    async def kill(self) -> None:
        await self.server.stop(0)
        for task in self.running:
            task.cancel()

    async def Watch(self, _request: worker_pb2.WatchRequest, _context: object):
        while True:
            if self.beating:
                yield convert.heartbeat_to_proto(self.facts.incarnation, self.load)
            await asyncio.sleep(0.05)

    async def Session(self, requests, _context: object):
        outbox: asyncio.Queue[worker_pb2.AttemptEvent | None] = asyncio.Queue()
        reader = asyncio.create_task(self._receive(requests, outbox))
        try:
            while (event := await outbox.get()) is not None:
                yield worker_pb2.DecodeToRouter(incarnation=self.facts.incarnation, events=[event])
            raise WorkerLost("the script broke the session")
        finally:
            reader.cancel()

    async def _receive(self, requests, outbox: asyncio.Queue) -> None:
        tasks: dict[bytes, asyncio.Task[None]] = {}
        async for message in requests:
            kind = message.WhichOneof("message")
            if kind == "start":
                self.starts.append(message.start)
                actions = self.scripts.pop(0) if self.scripts else []
                task = asyncio.create_task(self._play(message.start, actions, outbox))
                tasks[message.start.attempt_id] = task
                self.running.add(task)
                task.add_done_callback(self.running.discard)
            elif kind == "cancel":
                self.cancelled.append(message.cancel.attempt_id)
                if message.cancel.attempt_id in tasks:
                    tasks[message.cancel.attempt_id].cancel()
            elif kind == "peer_gone":
                self.peers_gone.append(message.peer_gone.incarnation)
            else:
                self.keep_alives += 1

    async def _play(
        self, start: worker_pb2.StartAttempt, actions: list[Action], outbox: asyncio.Queue
    ) -> None:
        position = len(start.tokens.token_ids) - start.tokens.prompt_len
        for action in actions:
            if isinstance(action, Write):
                for _ in range(action.count):
                    if position >= start.sampling.max_tokens - 1:
                        break  # the last one carries the ending, below
                    await self._token(start, position, position, outbox)
                    position += 1
            elif isinstance(action, Shift):
                await self._token(start, position, max(0, position + action.by), outbox)
            elif isinstance(action, Fail):
                outbox.put_nowait(self._failure(start, action))
                return
            elif isinstance(action, Hang):
                await asyncio.Event().wait()
            elif isinstance(action, Break):
                outbox.put_nowait(None)
                return
            elif isinstance(action, Raw):
                outbox.put_nowait(action.make(start))
            else:
                stranger = worker_pb2.StartAttempt()
                stranger.CopyFrom(start)
                stranger.attempt_id = os.urandom(16)
                await self._token(stranger, position, position, outbox)
        while position < start.sampling.max_tokens:
            await self._token(start, position, position, outbox)
            position += 1

    async def _token(
        self, start: worker_pb2.StartAttempt, position: int, offset: int, outbox: asyncio.Queue
    ) -> None:
        await asyncio.sleep(self.token_delay_s)
        prompt = start.tokens.token_ids[: start.tokens.prompt_len]
        event = worker_pb2.AttemptEvent(
            attempt_id=start.attempt_id,
            offset=offset,
            tokens=[kv_pb2.TokenOut(token_id=expected(prompt, position))],
        )
        last = position == start.sampling.max_tokens - 1
        if last:
            event.finish_reason = inference_pb2.FINISH_REASON_LENGTH
        if last or position == len(start.tokens.token_ids) - start.tokens.prompt_len:
            event.facts.CopyFrom(self._facts(start))
        outbox.put_nowait(event)

    def _facts(self, start: worker_pb2.StartAttempt) -> worker_pb2.AttemptFacts:
        if start.HasField("prefill") and self.moves_kv:
            return worker_pb2.AttemptFacts(
                prefill_worker=start.prefill.worker_id, kv_bytes_transferred=100, kv_transport="shm"
            )
        reason = start.skip_reason or "no_transport"
        return worker_pb2.AttemptFacts(kv_skipped_reason=reason)

    def _failure(self, start: worker_pb2.StartAttempt, action: Fail) -> worker_pb2.AttemptEvent:
        error = action.error
        failure = worker_pb2.AttemptFailure(
            code=error.code,
            message=str(error),
            retryable=error.retryable,
            suspect_worker=action.suspect,
        )
        return worker_pb2.AttemptEvent(attempt_id=start.attempt_id, failure=failure)
