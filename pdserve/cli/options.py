"""From a parsed command line to a Config, and to a running cluster's fronts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdserve.cluster import router_view
from pdserve.cluster.router_view import Access
from pdserve.cluster.run_dir import RunRecord, read_record, state_dir_of
from pdserve.config import Config, SecurityConfig
from pdserve.config_load import load_config
from pdserve.errors import ConfigError

# The named options of ``up`` and the keys that they set.
_KEYS = {
    "name": "name",
    "prefill": "pools.prefill",
    "decode": "pools.decode",
    "mixed": "pools.mixed",
    "gpus": "pools.gpus_per_worker",
    "ray_address": "pools.ray_address",
    "model": "model.path",
    "served_model_name": "model.served_name",
    "max_model_len": "model.max_model_len",
    "dtype": "model.dtype",
    "numerics": "model.numerics",
    "host": "router.host",
    "port": "router.http_port",
    "grpc_port": "router.grpc_port",
    "api_key_file": "security.api_key_files",
    "tls_cert": "security.tls_cert",
    "tls_key": "security.tls_key",
    "strict": "router.strict",
}


def config_from(parsed: argparse.Namespace) -> Config:
    """The configuration that ``pdserve up`` was asked for. ConfigError."""
    values: dict[str, Any] = {}
    for option, key in _KEYS.items():
        value = getattr(parsed, option, None)
        if value is not None:
            values[key] = tuple(value) if isinstance(value, list) else value
    if parsed.mixed and parsed.prefill is None and parsed.decode is None and not parsed.config:
        # Workers that do both phases were asked for, and nothing else was.
        values |= {"pools.prefill": 0, "pools.decode": 0}
    return load_config(parsed.config, parsed.set, values)


@dataclass(frozen=True, slots=True)
class Fronts:
    """A running cluster's fronts, as a command on this machine calls them."""

    http: Access
    grpc: str  # host:port


def find_fronts(parsed: argparse.Namespace) -> Fronts:
    """The named cluster's fronts, from what its run recorded. ConfigError when none runs."""
    given = {"name": parsed.name} if parsed.name else {}
    config = load_config(parsed.config, parsed.set, given)
    record = read_record(state_dir_of(config))
    http, grpc = getattr(parsed, "url", None), getattr(parsed, "address", None)
    access = access_of(record, parsed.api_key_file, parsed.ca_file)
    if http or grpc:
        return Fronts(replace(access, url=(http or "").rstrip("/")), grpc or "")
    alive = record is not None and Path(f"/proc/{record.pid}").exists()
    if record is None or not alive:
        raise ConfigError(f"no cluster {config.name!r} runs on this machine; start one: pdserve up")
    if not record.http:
        raise ConfigError(f"cluster {config.name!r} (pid {record.pid}) is still starting")
    return Fronts(access, record.grpc)


def access_of(
    record: RunRecord | None, api_key_file: str | None = None, ca_file: str | None = None
) -> Access:
    """How to call the HTTP front of a recorded run; what is given replaces what is recorded."""
    url, key_file, certificate = "", api_key_file or "", ca_file or ""
    if record is not None:
        url = record.http
        key_file, certificate = key_file or record.api_key_file, certificate or record.certificate
    key = router_view.first_api_key(SecurityConfig(api_key_files=(key_file,))) if key_file else ""
    return Access(url, key, certificate)
