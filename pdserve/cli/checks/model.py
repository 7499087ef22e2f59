"""Whether the model is where it should be and whole: every file that serving reads is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdserve.cli.checks.check import Check
from pdserve.config import Config
from pdserve.engine.embedded import find_embedded
from pdserve.engine.resolve import cache_folder, is_hub_id
from pdserve.engine.weights import read_shards
from pdserve.errors import ModelRefused


def model(config: Config) -> Check:
    path = config.model.path
    embedded = find_embedded(path)
    if embedded is not None:
        ready = sorted(cache_folder(config).glob(f"{embedded.name}-*/config.json"))
        if not ready:
            return Check("model", True, f"{path}: will be converted once, on first use")
        advice = f"remove {ready[-1].parent}: it is converted again on the next start"
        return _folder(ready[-1].parent, path, advice)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _folder(folder, path, "copy or download it again")
    if is_hub_id(path):
        text = f"{path} is no folder here; it would be downloaded from the model hub"
        advice = "where there is no way to the hub, set model.path to a folder"
        return Check("model", False, text, fatal=False, remedy=advice)
    return Check("model", False, f"there is no model folder {path}", remedy="set model.path")


def _folder(folder: Path, name: str, advice: str) -> Check:
    try:
        kind = _json(folder / "config.json").get("model_type")
        _json(folder / "tokenizer.json")
        shards = read_shards(folder)
    except (ModelRefused, ValueError) as error:
        return Check("model", False, f"{folder} is damaged: {error}", remedy=advice)
    except OSError as error:
        text = f"{folder} is damaged: {error.filename}: {error.strerror}"
        return Check("model", False, text, remedy=advice)
    size = sum(shard.size for shard in shards)
    tensors = sum(len(shard.tensors) for shard in shards)
    return Check("model", True, f"{name}: {kind}, {tensors} tensors, {size / 2**20:.0f} MiB")


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is no JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return data
