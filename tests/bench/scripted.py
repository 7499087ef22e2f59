"""An OpenAI-compatible server that does what a script says, on a real socket in its own thread."""

from __future__ import annotations

import asyncio
import enum
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

FIRST_S = 0.06
GAP_S = 0.02


class Act(enum.Enum):
    ANSWER = "answer"  # the first token after FIRST_S, the others GAP_S apart
    TEXT_ONLY = "text only"  # neither token ids nor usage
    SHORT = "short"  # one token less than asked for
    REFUSE = "refuse"
    BREAK = "break"
    FAIL_LATE = "fail late"  # an error event after the first token
    CUT = "cut"  # ends well, but for [DONE]
    RESET = "reset"
    GARBAGE = "garbage"
    HANG = "hang"


@dataclass
class Scripted:
    """``acts`` are played in the order in which requests arrive, then ANSWER."""

    acts: list[Act] = field(default_factory=list)
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight_max: int = 0
    _in_flight: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted", "max_model_len": 4096}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        index = len(self.bodies)
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        self._in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self._in_flight)
        try:
            act = self.acts[index] if index < len(self.acts) else Act.ANSWER
            return await self._play(act, request, self.bodies[index])
        except ConnectionResetError:
            return web.Response()  # the client gave up, as some of the scripts make it
        finally:
            self._in_flight -= 1

    async def _play(
        self, act: Act, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        if act is Act.REFUSE:
            return web.json_response({"error": {"code": "queue_full"}}, status=429)
        if act is Act.BREAK:
            return web.Response(text="<html>", status=500)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if act is Act.GARBAGE:
            await response.write(b'data: {"choices": 3}\n\n')
            return response
        count = body["max_tokens"] - (act is Act.SHORT)
        for at in range(count):
            await asyncio.sleep(GAP_S if at else FIRST_S)
            choice: dict[str, Any] = {"text": f"t{at}"}
            if act is not Act.TEXT_ONLY:
                # Text may be held back; its token was there all the same.
                choice = {"text": "", "token_ids": [at]}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\r\n")
            await response.write(b"\r\n: note\r\n\r\n")
            if act is Act.FAIL_LATE:
                await response.write(b'data: {"error": {"code": "worker_lost"}}\n\n')
                return response
            if act is Act.RESET:
                assert request.transport is not None
                request.transport.abort()
                return response
            if act is Act.HANG:
                await asyncio.sleep(30)
        if act is not Act.TEXT_ONLY:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            await response.write(
                b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
            )
        if act is not Act.CUT:
            await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def serve(*acts: Act) -> Iterator[Scripted]:
    scripted = Scripted(list(acts))
    loop = asyncio.new_event_loop()
    started = threading.Event()
    app = web.Application()
    app.router.add_get("/v1/models", scripted.models)
    app.router.add_post("/v1/completions", scripted.complete)
    runner = web.AppRunner(app, shutdown_timeout=0)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()

    def live() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        assert started.wait(10)
        yield scripted
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
