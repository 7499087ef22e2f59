"""What a server says of itself before it is measured: its model, its limit, its version."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import aiohttp
import msgspec

from pdserve.bench.bodies import read_body
from pdserve.errors import ConfigError, WorkerLost

_QUESTION_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
_ANSWER_BYTES_MAX = 2**20


class _Model(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


class _Version(msgspec.Struct, frozen=True):
    version: str


@dataclass(frozen=True, slots=True)
class Served:
    """``context``: most tokens of prompt and answer; None where the server does not say."""

    model: str
    context: int | None
    version: str | None


def base_url(text: str) -> str:
    """A server's address, whether or not its user wrote ``/v1`` behind it. ConfigError."""
    url = text.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {text!r}: expected http://host:port or https://host:port")
    return url


def open_session(api_key: str, context: ssl.SSLContext | None) -> aiohttp.ClientSession:
    """As many connections as requests are in flight; each kept for the next request."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0, ssl=True if context is None else context)
    return aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
    )


async def ask(session: aiohttp.ClientSession, url: str, model: str | None) -> Served:
    """Raises WorkerLost when nobody answers, ConfigError when it does not serve ``model``."""
    status, body = await _get(session, f"{url}/v1/models")
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError as error:
        raise WorkerLost(f"GET {url}/v1/models answered {status}, not a list of models") from error
    chosen = next((one for one in models if model in (None, one.id)), None)
    if chosen is None:
        names = ", ".join(one.id for one in models) or "no model"
        raise ConfigError(f"--model {model}: {url} serves {names}")
    return Served(chosen.id, chosen.max_model_len, await _version(session, url))


async def _version(session: aiohttp.ClientSession, url: str) -> str | None:
    """Of servers that tell it; OpenAI's API has no place for it."""
    status, body = await _get(session, f"{url}/version")
    try:
        return msgspec.json.decode(body, type=_Version).version if status == 200 else None
    except msgspec.DecodeError:
        return None


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    try:
        async with session.get(url, timeout=_QUESTION_TIMEOUT) as response:
            return response.status, await read_body(response, _ANSWER_BYTES_MAX)
    except (aiohttp.ClientError, OSError) as error:  # time-outs are OSErrors
        raise WorkerLost(f"GET {url}: no answer: {error or type(error).__name__}") from error
