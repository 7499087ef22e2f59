"""Recorded workloads: Mooncake's JSON lines and Azure's CSV, told apart by what the file holds.

Every field is checked before it is used; a line that is not as it should be stops the reading,
with its number. Small samples of both ship with the package: see samples/README.md.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from pdserve.bench.workload import Request
from pdserve.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
SAMPLES: Mapping[str, str] = {"mooncake": "mooncake_sample.jsonl", "azure": "azure_sample.csv"}
_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_TOKENS_MAX = 10_000_000

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=_TOKENS_MAX)]


class _Line(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # ms
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]]


def read(source: str, count: int | None) -> tuple[Request, ...]:
    """The first ``count`` requests of a file or of ``sample:NAME`` (None: all). ConfigError."""
    path = _path(source)
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            first = next(lines, "")
            parse = parse_mooncake if first.lstrip().startswith("{") else parse_azure
            found = tuple(itertools.islice(parse(itertools.chain([first], lines)), count))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {source} cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"the trace {source}: {error}") from error
    if not found:
        raise ConfigError(f"the trace {source} holds no request")
    return found


def _path(source: str) -> Path:
    if not source.startswith("sample:"):
        return Path(source).expanduser()
    name = source.removeprefix("sample:")
    if name not in SAMPLES:
        raise ConfigError(f"--trace {source}: the samples are {', '.join(sorted(SAMPLES))}")
    return Path(__file__).parent / "samples" / SAMPLES[name]


def parse_mooncake(lines: Iterable[str]) -> Iterator[Request]:
    """One JSON object a line; each of ``hash_ids`` names up to 512 tokens of the prompt."""
    decoder = msgspec.json.Decoder(_Line)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            raise ConfigError(f"line {number}: {error}") from error
        blocks = -(-line.input_length // MOONCAKE_BLOCK_TOKENS)
        if len(line.hash_ids) != blocks:
            raise ConfigError(
                f"line {number}: {len(line.hash_ids)} hash_ids for {line.input_length} tokens, "
                f"expected {blocks}"
            )
        yield Request(
            due_s=line.timestamp / 1000,
            prompt_tokens=max(1, line.input_length),
            output_tokens=max(1, line.output_length),
            blocks=tuple(line.hash_ids),
            block_tokens=MOONCAKE_BLOCK_TOKENS,
        )


def parse_azure(lines: Iterable[str]) -> Iterator[Request]:
    """``TIMESTAMP,ContextTokens,GeneratedTokens`` under that heading; nothing is shared."""
    rows = csv.reader(lines)
    if next(rows, None) != _AZURE_HEADER:
        raise ConfigError(
            "neither JSON lines (Mooncake) nor a CSV that begins with " + ",".join(_AZURE_HEADER)
        )
    start: float | None = None
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            when, prompt, output = row
            at = _seconds(when)
            tokens = msgspec.convert((int(prompt), int(output)), tuple[_Tokens, _Tokens])
        except (ValueError, msgspec.ValidationError) as error:
            raise ConfigError(f"line {number}: {error}") from error
        start = at if start is None else start
        if at < start:
            raise ConfigError(f"line {number}: {when} is before the first request")
        yield Request(at - start, max(1, tokens[0]), max(1, tokens[1]))


def _seconds(text: str) -> float:
    """Of ``2023-11-16 18:17:03.9799600``; digits beyond the microseconds count too."""
    whole, _, fraction = text.partition(".")
    if fraction and not fraction.isdecimal():
        raise ValueError(f"{text!r} is no time")
    at = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return at.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
