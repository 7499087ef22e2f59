"""docs/api.md and the table of metrics say what the code does: each row, and no row too few."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry

from pdserve.errors import BY_CODE, ConfigError, IllegalTransition, TierError
from pdserve.telemetry import metrics
from pdserve.types import Usage
from router.counters import Counters
from router.openai_fields import READ
from router.openai_shapes import how_made
from router.placement import Skip

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text("utf-8")
OBSERVABILITY = (ROOT / "docs" / "observability.md").read_text("utf-8")
# Of a start, of a part that costs no request, and a name for our own bugs.
NOT_ANSWERED = (ConfigError, TierError, IllegalTransition)


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the tables between that heading and the next one, without their heads."""
    _, _, rest = page.partition(f"## {heading}\n")
    assert rest, f"there is no heading {heading!r}"
    part = rest.partition("\n## ")[0]
    lines = [line for line in part.split("\n") if line.startswith("|")]
    found = []
    for before, line in pairwise(lines):
        if not before.startswith("|---") and line.startswith("|---"):
            continue  # ``before`` is a head, ``line`` its rule
        if not line.startswith("|---"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return [row for row in found if "`" in row[0]]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_error_that_a_client_may_get_has_its_row() -> None:
    told = {named(row[0])[0]: row[1:] for row in rows(API, "Errors")}
    expected = {
        code: [str(kind.http_status), kind.grpc_status.name, "yes" if kind.retryable else "no"]
        for code, kind in BY_CODE.items()
        if not issubclass(kind, NOT_ANSWERED)
    }
    assert told == expected


def test_every_route_has_its_row() -> None:
    told = {route for row in rows(API, "HTTP") for route in named(row[0]) if " /" in route}
    source = (ROOT / "router" / "http_front.py").read_text("utf-8")
    routes = re.findall(r"web\.(get|post)\(\"([^\"]+)\"", source)
    expected = {f"{method.upper()} {path.replace(':.+', '')}" for method, path in routes}
    assert told == expected | {"GET /"}


def test_the_fields_that_are_told_are_read() -> None:
    fields = [name for row in rows(API, "HTTP") for name in named(row[0]) if " /" not in name]
    read = frozenset().union(*READ.values())
    assert len(fields) > 10
    assert set(fields) <= read, set(fields) - read


def test_how_an_answer_was_made_is_told_field_by_field() -> None:
    told = {name for row in rows(API, "How an answer was made") for name in named(row[0])}
    reasons = {skip.value for skip in Skip}
    facts = (ROOT / "decode_worker" / "facts.py").read_text("utf-8")
    reasons |= set(re.findall(r"skip_reason = (?:self\.skip_reason or )?\"(\w+)\"", facts))
    assert {"all_blocks_local", "ended_at_first_token"} <= reasons
    assert told == reasons | set(how_made(Usage(1, 1), 0))


def test_every_series_has_its_row() -> None:
    made = metrics.RouterMetrics(CollectorRegistry(), "m")
    made.watch_workers(lambda: [])
    made.watch_shortfalls(dict)
    made.watch_counters(Counters().read)
    registry = cast(Any, made)._registry
    served = {family.name for family in registry.collect()}
    ours = {name.removeprefix("pdserve:") for name in served if name.startswith("pdserve:")}
    told = {name for row in rows(OBSERVABILITY, "Metrics") for name in named(row[0])}
    exported = {"router_traces_exported", "router_traces_dropped", "router_traces_failed"}
    assert told - exported == ours
