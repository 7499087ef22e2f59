"""What the router reads of a model: sampling defaults, stop ids, sizes, special tokens, template.

Only JSON and Jinja text out of the model's folder, read once at start; no code of the model runs.
A file that is there but wrong is a ConfigError that names it; a file that is absent is no error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.config import Config
from pdserve.errors import ConfigError, InvalidRequest, ModelRefused
from router import fields

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The model's generation_config, where it says something; else the neutral value."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    vocab_size: int
    max_model_len: int
    defaults: SamplingDefaults
    eos_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_template: str | None
    tokenizer_file: Path | None
    loaded_at: int  # seconds since 1970


def load_model(folder: str, served_name: str, config: Config) -> ServedModel:
    """Raises ConfigError (ModelRefused where the model itself is at fault)."""
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"the model's folder {folder} does not exist")
    model = _text_config(_read(root / "config.json"))
    generation = _read(root / "generation_config.json")
    tokenizer = _read(root / "tokenizer_config.json")
    special = _special_tokens(root, tokenizer)
    tokenizer_file = root / "tokenizer.json"
    vocab_size = _positive(model, "vocab_size", root)
    return ServedModel(
        name=served_name,
        vocab_size=vocab_size,
        max_model_len=_length(model, config.model.max_model_len, root),
        defaults=_defaults(generation, root),
        eos_ids=_eos_ids(generation, model, vocab_size),
        special_tokens=special,
        chat_template=_template(root, tokenizer, config.model.chat_template),
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None,
        loaded_at=int(time.time()),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelRefused(f"{path}: holds no JSON object")
    return value


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Models of several kinds of input keep the language model's part in a section of its own."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _positive(config: dict[str, Any], name: str, root: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelRefused(f"{root / 'config.json'}: {name} is {value!r}, not a positive integer")
    return value


def _length(config: dict[str, Any], configured: int, root: Path) -> int:
    own = config.get("max_position_embeddings")
    if own is None and configured:
        return configured
    length = _positive(config, "max_position_embeddings", root)
    return min(length, configured) if configured else length


def _defaults(generation: dict[str, Any], root: Path) -> SamplingDefaults:
    """Out-of-range values are refused at start, not at each request."""

    def pick(name: str, low: float, high: float, neutral: float, *, above: bool = False) -> float:
        value = generation.get(name)
        return neutral if value is None else fields.number(name, value, low, high, above=above)

    neutral = SamplingDefaults()
    try:
        top_k = generation.get("top_k")
        return SamplingDefaults(
            temperature=pick("temperature", 0, 100, neutral.temperature),
            top_k=neutral.top_k if top_k is None else fields.integer("top_k", top_k, 0, 2**31 - 1),
            top_p=pick("top_p", 0, 1, neutral.top_p, above=True),
            min_p=pick("min_p", 0, 1, neutral.min_p),
            repetition_penalty=pick(
                "repetition_penalty", 0, 100, neutral.repetition_penalty, above=True
            ),
        )
    except InvalidRequest as error:
        raise ModelRefused(f"{root / 'generation_config.json'}: {error}") from error


def _eos_ids(generation: dict[str, Any], model: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The first file that names any: a model run alone stops at the same."""
    for source in (generation, model):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        known = tuple(sorted({i for i in ids if type(i) is int and 0 <= i < vocab_size}))
        if known:
            return known
    return ()


def _special_tokens(root: Path, tokenizer: dict[str, Any]) -> dict[str, str]:
    """Names that templates know special tokens by, e.g. bos_token, and their text."""
    merged = {**_read(root / "special_tokens_map.json"), **tokenizer}
    extra = merged.get("extra_special_tokens")
    named = {**extra, **merged} if isinstance(extra, dict) else merged
    names = (*_SPECIAL_NAMES, *(extra if isinstance(extra, dict) else ()))
    result = {}
    for name in names:
        value = named.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            result[name] = text
    return result


def _template(root: Path, tokenizer: dict[str, Any], configured: str) -> str | None:
    if configured:
        return _read_text(Path(configured).expanduser())
    own = root / "chat_template.jinja"
    if own.is_file():
        return _read_text(own)
    value = tokenizer.get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in value if _is_named(entry)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from error
