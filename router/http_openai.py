"""``/v1/chat/completions`` and ``/v1/completions``: from a body to an answer or a stream.

parse -> prepare -> ( stream: first events -> SSE | collect -> one JSON object )

The status line waits for the first event (or the first keep-alive), so that what fails before any
token fails with its own HTTP status.
"""

from __future__ import annotations

import time

from aiohttp import web

from pdserve.telemetry.trace_context import TRACEPARENT, TRACESTATE, read_context
from router import openai_fields
from router.auth import KeyRing
from router.fanout import Fanout
from router.http_body import read_object
from router.http_errors import REQUEST_ID, as_typed, json_response
from router.openai_fields import Ask, Kind
from router.openai_shapes import Answer
from router.requests import Prepared
from router.service import Service
from router.sse import EventStream, send_whole


class OpenAiHandlers:
    def __init__(self, service: Service, keys: KeyRing) -> None:
        self._service = service
        self._keys = keys
        self._config = service.config

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, Kind.CHAT)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, Kind.COMPLETION)

    async def _generate(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        deadline = time.monotonic() + self._config.request_timeout_s
        with self._service.accepting():
            ask, prepared = await self._accept(request, kind, deadline)
            echo_texts = await self._echo_texts(ask, prepared)
        request[REQUEST_ID] = prepared.request_id
        answer = Answer(ask, prepared, self._service.tokens, echo_texts)
        streams = [self._service.stream(job, prepared.text) for job in prepared.jobs]
        async with Fanout(streams) as fanout:
            if ask.stream:
                events = EventStream(request, deadline)
                return await self._stream(events, ask, answer, fanout)
            while not fanout.done:
                for event in await fanout.next():
                    if event.delta is not None:
                        answer.take(event.index, event.delta)
        return await send_whole(request, json_response(answer.whole()), deadline)

    async def _accept(
        self, request: web.Request, kind: Kind, deadline: float
    ) -> tuple[Ask, Prepared]:
        principal = self._keys.principal(request.headers.get("Authorization"))
        body = await read_object(
            request, self._config.max_body_bytes, self._config.request_timeout_s
        )
        if body.get("request_id") is None:
            body = {**body, "request_id": request[REQUEST_ID]}
        ask = openai_fields.parse(kind, body, max_prompts=self._config.max_prompts)
        headers = request.headers
        trace = read_context(headers.getall(TRACEPARENT, ()), headers.getall(TRACESTATE, ()))
        return ask, await self._service.prepare(ask.raw, principal, deadline, trace)

    async def _stream(
        self, events: EventStream, ask: Ask, answer: Answer, fanout: Fanout
    ) -> web.StreamResponse:
        try:
            while not fanout.done:
                batch = await fanout.next(self._config.sse_keep_alive_s)
                if not batch:
                    await events.keep_alive()
                    continue
                chunks = [
                    chunk
                    for event in batch
                    if event.delta is not None
                    and (chunk := answer.chunk(event.index, event.delta)) is not None
                ]
                if chunks:
                    await events.events(chunks)
            if ask.include_usage:
                await events.events([answer.last_usage()])
            return await events.done()
        except ConnectionResetError:
            return events.abort()  # nobody is left to tell; leaving the fan-out cancels the jobs
        except Exception as error:
            if not events.begun:
                raise
            return await events.fail(as_typed(error, events.request_id))

    async def _echo_texts(self, ask: Ask, prepared: Prepared) -> tuple[str, ...]:
        if not ask.echo:
            return ()
        texts = []
        for at, text in enumerate(prepared.prompt_texts):
            ids = prepared.jobs[at * prepared.n].prompt
            texts.append(await self._service.tokens.decode("echo", ids) if text is None else text)
        return tuple(texts)
