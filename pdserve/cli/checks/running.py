"""The cluster of this name that runs already, if one does, and the ports that it would take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pdserve.cli.checks.check import Check
from pdserve.cli.options import access_of
from pdserve.cluster import router_view
from pdserve.cluster.orphans import mark_of, mark_value
from pdserve.cluster.ports import check_free, owner_of
from pdserve.cluster.run_dir import RunRecord, read_record, state_dir_of
from pdserve.config import Config
from pdserve.config_load import keys
from pdserve.errors import ConfigError


def running_record(config: Config) -> RunRecord | None:
    """What the live run of this cluster recorded."""
    record = read_record(state_dir_of(config))
    alive = record is not None and Path(f"/proc/{record.pid}").exists()
    return record if alive else None


def cluster(config: Config) -> Check:
    record = running_record(config)
    if record is None:
        return Check("cluster", True, f"none called {config.name!r} runs on this machine")
    who = f"{config.name!r} runs (pid {record.pid})"
    logs = f"see pdserve status and the logs in {state_dir_of(config) / 'logs'}"
    if not record.http:
        return Check("cluster", False, f"{who} and is still starting", fatal=False, remedy=logs)
    access = access_of(record)
    status, body = router_view.get(access, "/ready")
    if status != 200:
        return Check("cluster", False, f"{who} and is not ready: {_reason(body)}", remedy=logs)
    workers = router_view.workers(access)
    worse = [f"{one['id']}: {one['degraded']}" for one in workers if one.get("degraded")]
    worse += [f"{one['id']} is {one['state']}" for one in workers if one.get("state") != "ready"]
    if worse:
        text = f"{who} and answers, but {', '.join(worse)}"
        return Check("cluster", False, text, fatal=False, remedy=logs)
    return Check("cluster", True, f"{who} with {len(workers)} workers, all ready, at {record.http}")


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "it does not say why"


def ports(config: Config) -> Check:
    record = running_record(config)
    mark = mark_value(state_dir_of(config), record.run_id) if record is not None else ""
    seen, taken = [], []
    for key, host, port in _wanted(config):
        try:
            check_free(host, port, key)
            seen.append(f"{port} is free" if port else f"{key} takes any")
        except ConfigError as error:
            owner = owner_of(port)
            if mark and owner is not None and mark_of(owner) == mark:
                seen.append(f"{port} is this cluster's own (process {owner})")
            else:
                taken.append(str(error))
    if taken:
        advice = "end that program, or set another port"
        return Check("ports", False, "; ".join(taken), remedy=advice)
    return Check("ports", True, ", ".join(seen))


def _wanted(config: Config) -> Iterator[tuple[str, str, int]]:
    """Key, host and number of each port that the configuration names."""
    for key in keys():
        section, _, name = key.rpartition(".")
        if name == "port" or name.endswith("_port"):
            place = getattr(config, section)
            yield key, getattr(place, "host", config.router.host), getattr(place, name)
