"""The router's start file on disk: written by the owner of the cluster, read once by the router.

One JSON object. It holds secrets, so it is never readable by others, not even while it is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pdserve.config_load import config_from_dict, config_to_dict
from pdserve.errors import ConfigError
from pdserve.rpc.identity import identity_from_dict, identity_to_dict
from router.boot import RouterBoot

_TEXTS = ("model_path", "served_name", "run_dir", "internal_address")


def write_boot(path: str | Path, boot: RouterBoot) -> None:
    """Replaces ``path`` in one step. OSError when the disk refuses."""
    data = {name: getattr(boot, name) for name in _TEXTS}
    data["identity"] = identity_to_dict(boot.identity)
    data["hash_key"] = boot.hash_key.hex()
    data["config"] = config_to_dict(boot.config)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(data, file)
    draft.replace(target)


def read_boot(path: str | Path) -> RouterBoot:
    """ConfigError, which names the file and the key, for anything that is not a start file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the router's start file {path}: {error}") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    expected = {*_TEXTS, "identity", "hash_key", "config"}
    if not isinstance(data, dict) or set(data) != expected:
        raise ConfigError(f"{path}: expected an object with exactly {sorted(expected)}")
    return _parse(data, str(path))


def _parse(data: dict[str, Any], path: str) -> RouterBoot:
    for name in (*_TEXTS, "hash_key"):
        if not isinstance(data[name], str):
            raise ConfigError(f"{path}: {name} must be a string")
    if not isinstance(data["config"], dict):
        raise ConfigError(f"{path}: config must be an object")
    try:
        hash_key = bytes.fromhex(data["hash_key"])
    except ValueError as error:
        raise ConfigError(f"{path}: hash_key is not hex") from error
    if not 16 <= len(hash_key) <= 64:
        raise ConfigError(f"{path}: hash_key has {len(hash_key)} bytes, not 16 to 64")
    return RouterBoot(
        config=config_from_dict(data["config"]),
        identity=identity_from_dict(data["identity"]),
        hash_key=hash_key,
        **{name: data[name] for name in _TEXTS},
    )
