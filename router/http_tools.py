"""The HTTP front's smaller endpoints: tokens, the model, the cluster's state and health."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from pdserve.errors import InvalidRequest, ModelNotFound, NoWorker
from router import fields
from router.api import WorkerView
from router.auth import KeyRing
from router.http_body import read_object
from router.http_errors import json_response
from router.openai_fields import chat_prompt, check_names
from router.requests import RawPrompt, RawText
from router.service import Service

_TOKENIZE = frozenset(
    {
        "model",
        "prompt",
        "messages",
        "add_special_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "return_token_strs",
    }
)
_DETOKENIZE = frozenset({"model", "tokens"})


def version() -> str:
    try:
        return importlib.metadata.version("pdserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def worker_object(view: WorkerView) -> dict[str, Any]:
    """One entry of ``/workers``."""
    facts, load = view.facts, view.load
    return {
        "id": facts.id,
        "incarnation": facts.incarnation.hex(),
        "role": facts.role.value,
        "pid": facts.pid,
        "node": facts.node,
        "address": facts.address,
        "state": view.state.value,
        "blocks": {
            "used": load.blocks_used,
            "cached": load.blocks_cached,
            "total": load.blocks_total or facts.blocks_total,
        },
        "running": load.running,
        "waiting": load.waiting,
        "degraded": load.degraded,
        "late_events": load.late_events,
        "late_kv_reads": load.late_kv_reads,
        "turn_wait_s": load.turn_wait_s,
        "turns_forced": load.turns_forced,
        "redis_unsent": load.tiers.redis_unsent,
        "redis_rejected": load.tiers.redis_rejected,
    }


class ToolHandlers:
    def __init__(self, service: Service, keys: KeyRing) -> None:
        self._service = service
        self._keys = keys

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, _TOKENIZE)
        ids = await self._service.validator.encode(_tokenize_prompt(body))
        wants_strings = body.get("return_token_strs")
        strings = None
        if wants_strings is not None and fields.boolean("return_token_strs", wants_strings):
            strings = [self._service.tokens.text_of(token) for token in ids]
        return json_response(
            {
                "count": len(ids),
                "max_model_len": self._service.validator.limits().max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, _DETOKENIZE)
        if body.get("tokens") is None:
            raise InvalidRequest("tokens: is required", param="tokens")
        ids = self._service.validator.token_ids("tokens", body["tokens"])
        return json_response({"prompt": await self._service.tokens.decode("tokens", ids)})

    async def models(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        name = request.match_info["name"]
        if name != self._service.tokens.model.name:
            raise ModelNotFound(f"model: {fields.show(name)} is not served here", param="model")
        return json_response(self._model())

    async def health(self, _: web.Request) -> web.Response:
        """The process answers; says nothing about workers."""
        return json_response({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        ready, reason = self._service.dispatcher.ready()
        if not ready:
            raise NoWorker(f"not ready: {reason}")
        return json_response({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self._service.metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": version()})

    async def workers(self, request: web.Request) -> web.Response:
        self._authenticate(request)
        views = self._service.dispatcher.workers()
        return json_response({"workers": [worker_object(view) for view in views]})

    def _authenticate(self, request: web.Request) -> None:
        self._keys.principal(request.headers.get("Authorization"))

    async def _body(self, request: web.Request, names: frozenset[str]) -> Mapping[str, object]:
        self._authenticate(request)
        config = self._service.config
        body = await read_object(request, config.max_body_bytes, config.request_timeout_s)
        check_names(body, names)
        self._service.validator.check_model(body.get("model"))
        return body

    def _model(self) -> dict[str, Any]:
        model = self._service.tokens.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.loaded_at,
            "owned_by": "pdserve",
            "root": model.name,
            "parent": None,
            "max_model_len": self._service.validator.limits().max_model_len,
        }


def _tokenize_prompt(body: Mapping[str, object]) -> RawPrompt:
    if body.get("messages") is not None:
        if body.get("prompt") is not None:
            raise InvalidRequest("prompt: cannot be combined with messages", param="prompt")
        return chat_prompt(body)
    if body.get("prompt") is None:
        raise InvalidRequest("prompt: is required, or messages", param="prompt")
    return RawText("prompt", body["prompt"], body.get("add_special_tokens"))
