"""Reads a Config from defaults, a YAML file, the command line and ``--set``; the last one wins.

Everything here walks the dataclasses of pdserve/config.py, so a new key needs no code. Values are
checked twice: each against its own type, bounds and choices, then all together in
pdserve/config_rules.py. Every error is a ConfigError that names the key, the value and what is
allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from pdserve.config import Config
from pdserve.config_rules import check_rules
from pdserve.errors import ConfigError

T = TypeVar("T")

_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One setting: where it is, what it may be, what it is for."""

    path: str  # "router.http_port"
    type: Any
    default: Any
    doc: str
    low: float | None
    high: float | None
    choices: tuple[Any, ...]

    @property
    def is_tuple(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def element(self) -> Any:
        """The type of one value; of each element where the key holds several."""
        return get_args(self.type)[0] if self.is_tuple else self.type

    def allowed(self) -> str:
        """What a value may be, in words."""
        words = _TYPE_NAMES[self.element]
        if self.choices:
            words = "one of " + ", ".join(str(choice) for choice in self.choices)
        elif self.low is not None and self.high is not None:
            words += f" from {_number(self.low)} to {_number(self.high)}"
        elif self.low is not None:
            words += f" of at least {_number(self.low)}"
        elif self.high is not None:
            words += f" of at most {_number(self.high)}"
        return f"a list, each {words}" if self.is_tuple else words


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


def walk(cls: type[Any] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in the order of the source."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from walk(kind, path + ".")
        else:
            meta = field.metadata
            choices = tuple(meta["choices"] or ())
            yield Key(path, kind, field.default, meta["doc"], meta["low"], meta["high"], choices)


@functools.cache
def keys() -> dict[str, Key]:
    return {key.path: key for key in walk()}


def load_config(
    yaml_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    cli_values: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in force: defaults < YAML file < ``cli_values`` < ``overrides``.

    ``cli_values`` maps dotted keys to values of the key's own type; ``overrides`` are texts
    ``a.b=c`` as ``--set`` takes them. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values.update(_flatten(_read_yaml(Path(yaml_path)), origin=str(yaml_path)))
    for path, value in (cli_values or {}).items():
        values[path] = _check(_find(path, "the command line"), value)
    for text in overrides:
        path, equals, raw = text.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {text}: write it as key=value, for example router.strict=true"
            )
        key = _find(path.strip(), "--set")
        values[key.path] = _check(key, _parse(key, raw.strip()))
    config = _build(Config, values, "")
    check_rules(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and scalars that JSON and YAML can hold."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = config_to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        out[field.name] = value
    return out


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """The inverse of config_to_dict, with every check of a file. Raises ConfigError."""
    config = _build(Config, _flatten(data, origin="the configuration"), "")
    check_rules(config)
    return config


class _Loader(yaml.SafeLoader):
    """Plain data alone; a key that stands twice is an error instead of the last one's victory."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        made: dict[Any, Any] = super().construct_mapping(node, deep)  # refuses what is no mapping
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value in seen:
                text = f"the key {name.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, text, name.start_mark)
            seen.add(name.value if isinstance(name, yaml.ScalarNode) else id(name))
        return made


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        data = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration file {path} is not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"configuration file {path}{where}: {problem}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {path}: expected keys and values at the top")
    return data


def _flatten(data: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """Dotted keys and checked values of a nested mapping; an empty section is allowed."""
    out: dict[str, Any] = {}
    sections = _sections()

    def visit(node: Mapping[Any, Any], prefix: str) -> None:
        for name, value in node.items():
            path = f"{prefix}{name}"
            if path in sections:
                if value is not None and not isinstance(value, Mapping):
                    raise ConfigError(
                        f"{path} in {origin} is a section: expected keys below it, got {value!r}"
                    )
                visit(value or {}, path + ".")
            else:
                if path in out:
                    raise ConfigError(f"{path} stands twice in {origin}: {out[path]!r}, {value!r}")
                out[path] = _check(_find(path, origin, isinstance(value, Mapping)), value)

    visit(data, "")
    return out


@functools.cache
def _sections() -> frozenset[str]:
    parents: set[str] = set()
    for path in keys():
        parts = path.split(".")[:-1]
        parents.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return frozenset(parents)


def _find(path: str, origin: str, section: bool = False) -> Key:
    """The key of that name. ConfigError names the nearest; of sections, if it has keys below it."""
    key = keys().get(path)
    if key is not None:
        return key
    if path in _sections():
        raise ConfigError(f"{path} in {origin} is a section, not a key")
    depth = path.count(".")
    sections = sorted(name for name in _sections() if name.count(".") == depth)
    near = _nearest(path, sections if section else list(keys()))
    if not near:  # perhaps the right name in the wrong section
        last = path.rpartition(".")[2]
        near = [p for p in keys() if p.rpartition(".")[2] == last][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"unknown key {path or '(empty)'} in {origin}{hint}")


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    """The one that was probably meant, if any; capitals do not count."""
    return difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)


def _parse(key: Key, raw: str) -> Any:
    """The value that a ``--set`` text means; ``_check`` judges it."""
    if key.is_tuple:
        inner = raw.removeprefix("[").removesuffix("]")
        return [_parse_one(key.element, part.strip()) for part in inner.split(",") if part.strip()]
    return _parse_one(key.element, raw)


def _parse_one(kind: Any, raw: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(raw.lower(), raw)
    if kind is str:
        return raw
    try:
        return int(raw) if kind is int else float(raw)
    except ValueError:
        return raw


def _check(key: Key, value: Any) -> Any:
    """``value`` as the key's own type. Raises ConfigError."""
    if key.is_tuple:
        if not isinstance(value, list | tuple):
            raise _refusal(key, value)
        return tuple(_check_one(key, item, value) for item in value)
    return _check_one(key, value, value)


def _check_one(key: Key, value: Any, whole: Any) -> Any:
    kind = key.element
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and value is False and "off" in key.choices:
        value = "off"  # which YAML reads as false, unless it stands in quotes
    # bool is an int to Python, but not to a reader of a configuration.
    if type(value) is not kind:
        raise _refusal(key, whole)
    if isinstance(value, float) and not math.isfinite(value):
        raise _refusal(key, whole)
    if isinstance(value, str) and "\0" in value:
        raise _refusal(key, whole)
    if key.choices and value not in key.choices:
        raise _refusal(key, whole)
    if (key.low is not None and value < key.low) or (key.high is not None and value > key.high):
        raise _refusal(key, whole)
    return value


def _refusal(key: Key, value: Any) -> ConfigError:
    near = ""
    if key.choices and isinstance(value, str):
        close = _nearest(value, [str(choice) for choice in key.choices])
        near = f"; did you mean {close[0]}?" if close else ""
    shown = list(value) if isinstance(value, tuple) else value
    return ConfigError(f"{key.path} = {shown!r}: expected {key.allowed()}{near}", param=key.path)


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            arguments[field.name] = _build(kind, values, path + ".")
        elif path in values:
            arguments[field.name] = values[path]
    return cls(**arguments)
