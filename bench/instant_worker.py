"""Workers without an engine, for measuring a router alone; each is a process of its own.

    python -m bench.instant_worker grpc STEP_S    reads {"token", "model"} on standard input; speaks
                                                  the cluster's own protocol as one mixed worker
    python -m bench.instant_worker http STEP_S    an OpenAI-compatible server, for other routers

Both answer every request at once with the tokens that it asks for: one token for each running
request every STEP_S seconds (0: as fast as they are taken), all of a step in one message where the
protocol can do that. The first line on standard output is JSON and says where they listen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from aiohttp import web

from pdserve.rpc import convert
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, mint
from pdserve.types import (
    Fingerprint,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    Role,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import inference_pb2, kv_pb2, worker_pb2, worker_pb2_grpc

_TOKENS = (1520, 2340, 3105, 4417, 5521, 6230, 7718, 8802)  # ordinary words, in turn
_BLOCKS = 1_000_000


class GrpcWorker(worker_pb2_grpc.WorkerServicer, worker_pb2_grpc.DecodeServicer):
    def __init__(self, model: str, step_s: float) -> None:
        self.facts = WorkerFacts(
            id=WorkerId("instant"),
            incarnation=Incarnation(os.urandom(16)),
            role=Role.MIXED,
            pid=os.getpid(),
            node="here",
            address="",
            model=ModelFacts(model, 8192, 49152, 16, "bf16", Numerics.FAST, Fingerprint(b"f" * 32)),
            blocks_total=_BLOCKS,
        )
        self._step_s = step_s

    async def Watch(self, _request: object, _context: object) -> AsyncIterator[Any]:
        while True:
            yield convert.heartbeat_to_proto(self.facts.incarnation, Load(blocks_total=_BLOCKS))
            await asyncio.sleep(0.5)

    async def Session(self, requests: AsyncIterator[Any], _context: object) -> AsyncIterator[Any]:
        running: dict[bytes, list[int]] = {}  # attempt -> written, asked for
        woken = asyncio.Event()
        reader = asyncio.create_task(_listen(requests, running, woken))
        incarnation = self.facts.incarnation
        try:
            yield worker_pb2.DecodeToRouter(incarnation=incarnation)
            while True:
                if not running:
                    woken.clear()
                    await woken.wait()
                events = [_event(attempt, count) for attempt, count in running.items()]
                for attempt in [a for a, (written, asked) in running.items() if written == asked]:
                    del running[attempt]
                yield worker_pb2.DecodeToRouter(incarnation=incarnation, events=events)
                await asyncio.sleep(self._step_s)
        finally:
            reader.cancel()


async def _listen(
    requests: AsyncIterator[Any], running: dict[bytes, list[int]], woken: asyncio.Event
) -> None:
    async for message in requests:
        kind = message.WhichOneof("message")
        if kind == "start":
            running[message.start.attempt_id] = [0, message.start.sampling.max_tokens]
            woken.set()
        elif kind == "cancel":
            running.pop(message.cancel.attempt_id, None)


def _event(attempt: bytes, count: list[int]) -> worker_pb2.AttemptEvent:
    """The next token of an attempt; raises its count."""
    offset, asked = count
    count[0] += 1
    event = worker_pb2.AttemptEvent(
        attempt_id=attempt,
        offset=offset,
        tokens=[kv_pb2.TokenOut(token_id=_TOKENS[offset % len(_TOKENS)])],
    )
    if offset == 0:
        event.facts.kv_skipped_reason = "mixed_worker"
    if offset + 1 == asked:
        event.finish_reason = inference_pb2.FINISH_REASON_LENGTH
    return event


async def _serve_grpc(step_s: float) -> None:
    told = json.loads(sys.stdin.readline())
    worker = GrpcWorker(told["model"], step_s)
    server: grpc.aio.Server = make_server(mint(told["token"], Caller.DECODE))
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
    worker_pb2_grpc.add_DecodeServicer_to_server(worker, server)
    port = bind(server, "127.0.0.1:0")
    await server.start()
    facts = convert.worker_facts_to_proto(worker.facts)
    facts.address = f"127.0.0.1:{port}"
    print(json.dumps({"facts": facts.SerializeToString().hex()}), flush=True)
    await server.wait_for_termination()


class HttpWorker:
    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = int((await request.json())["max_tokens"])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for i in range(asked):
            finish = '"length"' if i + 1 == asked else "null"
            await response.write(
                b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"stub",'
                b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%b}]}\n\n'
                % finish.encode()
            )
            await asyncio.sleep(self._step_s)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def anything(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "model_path": "stub", "data": []})


async def _serve_http(step_s: float) -> None:
    # Routers look for HTTP/2 first; that they are refused needs no traceback.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    worker = HttpWorker(step_s)
    app = web.Application()
    app.add_routes(
        [
            web.post("/v1/completions", worker.complete),
            web.route("*", "/{path:.*}", worker.anything),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run((_serve_grpc if sys.argv[1] == "grpc" else _serve_http)(float(sys.argv[2])))
