"""What must hold between several settings at once; each rule is one small function.

A rule returns what is wrong, or an empty text. Rules see values that are already of the right
type and within their own bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from pdserve.config import Config
from pdserve.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_REDIS_SCHEMES = ("redis", "rediss", "unix")


def check_rules(config: Config) -> None:
    """Raises ConfigError with the first rule that does not hold."""
    for rule in RULES:
        problem = rule(config)
        if problem:
            raise ConfigError(problem)


def _name(config: Config) -> str:
    if _NAME.fullmatch(config.name):
        return ""
    return (
        f"name = {config.name!r}: expected letters, digits, '_', '.' and '-', "
        "not starting with a sign, 64 at most"
    )


def _somebody_answers(config: Config) -> str:
    if config.pools.decode + config.pools.mixed > 0:
        return ""
    return "pools.decode = 0 and pools.mixed = 0: somebody must write the answers; ask for one"


def _exact_is_wide(config: Config) -> str:
    model = config.model
    if model.numerics != "exact" or model.dtype in ("auto", "float32", "float64"):
        return ""
    return f"model.numerics = 'exact' needs model.dtype float32 or float64, not {model.dtype!r}"


def _tls_pair(config: Config) -> str:
    security = config.security
    if bool(security.tls_cert) == bool(security.tls_key):
        return ""
    have, lack = ("tls_cert", "tls_key") if security.tls_cert else ("tls_key", "tls_cert")
    return f"security.{have} is set and security.{lack} is not: TLS needs both"


def _internal_tls(config: Config) -> str:
    security = config.security
    keys = ("internal_ca", "internal_cert", "internal_key")
    lacking = [key for key in keys if not getattr(security, key)]
    if len(lacking) == len(keys):
        return ""
    if lacking:
        return f"security.{lacking[0]} is not set: mutual TLS needs internal_ca, _cert and _key"
    return "" if security.internal_name else "security.internal_name is empty: mutual TLS needs it"


def _redis_url(config: Config) -> str:
    redis = config.cache.redis
    if redis.ca_file and urlsplit(redis.url).scheme != "rediss":
        return "cache.redis.ca_file is set but cache.redis.url is no rediss:// one"
    if redis.mode != "url" and (redis.username or redis.password_file):
        return (
            "cache.redis.username and cache.redis.password_file are for cache.redis.mode url, "
            f"not {redis.mode!r}"
        )
    if redis.mode == "url":
        if urlsplit(redis.url).scheme in _REDIS_SCHEMES:
            return ""
        return (
            "cache.redis.mode = 'url' needs cache.redis.url: a redis://, rediss:// or unix:// one"
        )
    if redis.url:
        return f"cache.redis.url is set but cache.redis.mode is {redis.mode!r}: set the mode to url"
    return ""


def _redis_reachable(config: Config) -> str:
    if config.pools.ray_address == "local" or config.cache.redis.mode != "local":
        return ""
    return (
        "cache.redis.mode = 'local' listens on a unix socket, which workers of a joined Ray "
        "cluster cannot reach: set cache.redis.mode to url or off"
    )


def _ray_address(config: Config) -> str:
    address = config.pools.ray_address
    host, _, port = address.rpartition(":")
    if address in ("local", "auto") or (host and "/" not in host and port.isdecimal()):
        return ""
    return f"pools.ray_address = {address!r}: expected local, auto or host:port"


def _ports_differ(config: Config) -> str:
    router = config.router
    if router.http_port != router.grpc_port or router.http_port == 0:
        return ""
    return f"router.http_port and router.grpc_port are both {router.http_port}: take two ports"


def _timers_order(config: Config) -> str:
    timers = config.timers
    if timers.dead_after_s > timers.heartbeat_s:
        return ""
    return (
        f"timers.dead_after_s = {timers.dead_after_s:g} must exceed "
        f"timers.heartbeat_s = {timers.heartbeat_s:g}"
    )


def _pools_below_bounds(config: Config) -> str:
    pools = config.pools
    for name in ("prefill", "decode", "mixed"):
        size, most = getattr(pools, name), getattr(pools, f"{name}_max")
        if size > most:
            return f"pools.{name} = {size} exceeds pools.{name}_max = {most}"
    return ""


def _admin_is_guarded(config: Config) -> str:
    if config.admin.host in ("127.0.0.1", "::1", "localhost") or config.security.internal_ca:
        return ""
    return (
        f"admin.host = {config.admin.host!r} lets others call the admin service, which needs "
        "mutual TLS (security.internal_ca, _cert and _key): set these, or admin.host to 127.0.0.1"
    )


def _admin_port_differs(config: Config) -> str:
    port, router = config.admin.port, config.router
    if port == 0 or port not in (router.http_port, router.grpc_port):
        return ""
    return f"admin.port = {port} is one of the router's ports: take another one"


def _traces_endpoint(config: Config) -> str:
    endpoint = config.telemetry.traces.endpoint
    parts = urlsplit(endpoint)
    whole = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
    if not endpoint or whole:
        return ""
    return (
        f"telemetry.traces.endpoint = {endpoint!r}: expected http://host:port or "
        "https://host:port of an OTLP collector's gRPC port"
    )


def _strict_has_prefill(config: Config) -> str:
    if not config.router.strict or config.pools.prefill > 0 or config.pools.mixed > 0:
        return ""
    return "router.strict refuses every request when pools.prefill = 0: ask for a prefill worker"


def _minimum_fits(config: Config) -> str:
    pools = config.pools
    for role in ("prefill", "decode", "mixed"):
        least, most = getattr(pools, f"{role}_min"), getattr(pools, role)
        if least > most:
            return f"pools.{role}_min = {least} exceeds pools.{role} = {most}"
    return ""


RULES: tuple[Callable[[Config], str], ...] = (
    _name,
    _somebody_answers,
    _minimum_fits,
    _exact_is_wide,
    _tls_pair,
    _internal_tls,
    _redis_url,
    _ray_address,
    _redis_reachable,
    _ports_differ,
    _timers_order,
    _traces_endpoint,
    _strict_has_prefill,
    _pools_below_bounds,
    _admin_is_guarded,
    _admin_port_differs,
)
