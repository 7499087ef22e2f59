"""Writes values.schema.json: ``python deploy/helm/make_schema.py``.

What stands in the chart's values.yaml may be set, nothing else; ``config`` takes the keys of
pdserve's own configuration with their types, bounds and choices, less those that the chart sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pdserve.config_load import Key, walk

CHART = Path(__file__).parent / "pdserve"
Schema = dict[str, Any]

# The chart knows these better: addresses, ports, pool sizes, folders, files of secrets.
OWNED = (
    *("name", "state_dir", "model_cache", "pools.prefill", "pools.decode", "pools.mixed"),
    *("pools.ray_address", "router.host", "router.http_port", "router.grpc_port"),
    *("cache.redis.mode", "cache.redis.url", "cache.redis.password_file", "cache.redis.bytes_max"),
    *("security.api_key_files", "security.tls_cert", "security.tls_key"),
    *("security.cluster_token_file", "security.hash_key_file"),
    *("admin.host", "admin.port", "admin.token_file"),
    *("security.internal_ca", "security.internal_cert", "security.internal_key"),
)
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _each(names: Iterable[str], schema: Schema) -> dict[str, Schema]:
    return dict.fromkeys(names, schema)


_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}

# Pieces of the Kubernetes API, which checks them itself, and free maps of texts.
_OPEN: dict[str, Schema] = {
    **_each(
        ("nodeSelector", "commonLabels", "podAnnotations", "serviceAnnotations", "labels"),
        _TEXTS,
    ),
    "prometheusNamespaceLabels": _TEXTS,
    "rayStartParams": _TEXTS,
    "affinity": {"type": "object"},
    **_each(
        ("tolerations", "topologySpreadConstraints", "clients", "extraEgress"),
        {"type": "array", "items": {"type": "object"}},
    ),
    "imagePullSecrets": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "containerEnv": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "value": {"type": "string"},
                "valueFrom": {"type": "object"},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "resources": {
        "type": "object",
        "properties": {
            part: {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
            for part in ("requests", "limits")
        },
        "required": ["requests", "limits"],
        "additionalProperties": False,
    },
}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1024}
# Narrower than the type of the default.
_NARROW: dict[str, Schema] = {
    **_each(("httpPort", "grpcPort", "metricsPort", "port"), _PORT),
    **_each(("replicas", "minReplicas", "prefill", "decode", "mixed"), _COUNT),
    **_each(("maxReplicas", "workersPerPod", "replicaCount"), _COUNT | {"minimum": 1}),
    "preStopSeconds": {"type": "integer", "minimum": 0, "maximum": 600},
    "startupSeconds": {"type": "integer", "minimum": 30},
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 1},
    "runAsUser": {"type": "integer", "minimum": 1},
    "runAsGroup": {"type": "integer", "minimum": 1},
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "upgradeStrategy": {"enum": ["Recreate", "None"]},
    "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    **_each(
        ("shmSize", "sizeLimit", "storage"),
        {"type": "string", "pattern": "^[0-9]+(Mi|Gi|Ti)$"},
    ),
    "maxmemory": {"type": "string", "pattern": "^[0-9]+(kb|mb|gb)$"},
    "externalUrl": {"type": "string", "pattern": "^(rediss?://.+)?$"},
    "externalAddress": {"type": "string", "pattern": "^([^/:]+:[0-9]+)?$"},
    "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
}


def of_default(name: str, default: Any) -> Schema:
    """What may replace ``default``: the same keys, and values of the same type."""
    if name in _OPEN:
        return _OPEN[name]
    if isinstance(default, dict):
        return closed({key: of_default(key, value) for key, value in default.items()})
    if name in _NARROW:
        return _NARROW[name]
    assert type(default) in _TYPES, f"{name}: say what it may hold"
    return {"type": _TYPES[type(default)]}


def closed(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def of_key(key: Key) -> Schema:
    one: Schema = {"type": _TYPES[key.element]}
    if key.choices:
        one = {"enum": list(key.choices)}
    if key.low is not None:
        one["minimum"] = key.low
    if key.high is not None:
        one["maximum"] = key.high
    return {"type": "array", "items": one} if key.is_tuple else one


def of_config() -> Schema:
    """The keys of a configuration file that are not the chart's."""
    root = closed({})
    for key in walk():
        if key.path in OWNED:
            continue
        *sections, name = key.path.split(".")
        at = root
        for section in sections:
            at = at["properties"].setdefault(section, closed({}))
        at["properties"][name] = of_key(key) | {"description": key.doc}
    return root


def schema() -> Schema:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    properties = {
        name: of_default(name, value) for name, value in values.items() if name != "config"
    }
    properties["config"] = of_config()
    # Every chart may be a subchart.
    properties["global"] = {"type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **closed(properties)}


def render() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (CHART / "values.schema.json").write_text(render(), encoding="utf-8")
