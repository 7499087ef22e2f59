"""One moment of a cluster as rich draws it: readiness, rates, pools, workers, what is degraded.

Every line fits the width that is given: rates take fewer columns, tables leave out the columns
that matter least. A worker's state is never cut. Nothing that the router tells is read as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdserve.cli.snapshot import Now, Pool, Rates, Seconds, Tiers, Worker, not_there

_STATES = {"ready": "green", "starting": "cyan", "draining": "yellow"}
_HINT = "used, cached, total: KV blocks on the device. Ctrl-C ends this view"
_MB = 1e6
_GAP = 2  # characters between two columns


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    cells: Sequence[Text]
    leave_out: int = 0  # the lowest of all goes first; 0: stays on any terminal

    @property
    def width(self) -> int:
        return max([cell_len(self.name), *(cell.cell_len for cell in self.cells)])


def picture(now: Now, width: int, trouble: str = "") -> RenderableType:
    """``width``: of the terminal, characters. ``trouble``: why ``now`` is old; else empty."""
    # A low terminal shows no more than the first lines: what is wrong stands above the tables.
    parts: list[RenderableType] = [_head(now)]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    if now.ready:  # else the reason says so already
        parts += [Text(f"degraded: {text}", style="yellow") for text in now.shortfalls]
    parts += [Text(not_there(worker), style="cyan") for worker in now.missing]
    parts += [
        Text(f"{one.id} is degraded: {one.degraded}", style="yellow")
        for one in now.workers
        if one.degraded
    ]
    parts.append(_rates(now.headline, width))
    parts.append(_table(_of_pools([pool for pool in now.pools if pool.workers]), width))
    parts.append(_table(_of_workers(now.workers), width))
    parts.append(Text(_HINT, style="dim"))
    return Group(*parts)


def _head(now: Now) -> Text:
    head = Text(f"pdserve {now.version}  {now.model}  {now.numerics}  ")
    if now.ready:
        return head.append("ready", style="bold green")
    return head.append(f"not ready: {now.reason}", style="bold red")


def _rates(last: Rates, width: int) -> Table:
    facts = (
        f"in flight {last.in_flight}",
        f"finished {last.finished:.2f}/s",
        f"failed {last.failed:.2f}/s",
        f"refused {last.rejected:.2f}/s",
        f"prompt tokens {last.computed:.0f}/s computed",
        f"{last.device:.0f}/s from device",
        f"{last.host:.0f}/s from host",
        f"{last.redis:.0f}/s from Redis",
        f"generated {last.generated:.1f} tokens/s",
        f"KV {last.kv_bytes / _MB:.2f} MB/s",
        f"first token {_milliseconds(last.first_token)}",
        f"between tokens {_milliseconds(last.inter_token)}",
    )
    count = next((n for n in (4, 2) if _grid_width(facts, n) <= width), 1)
    grid = Table.grid(padding=(0, _GAP))
    for begin in range(0, len(facts), count):
        grid.add_row(*facts[begin : begin + count])
    return grid


def _grid_width(facts: Sequence[str], count: int) -> int:
    return sum(max(map(len, facts[i::count])) for i in range(count)) + _GAP * (count - 1)


def _milliseconds(quantiles: Seconds) -> str:
    if quantiles.p50 is None or quantiles.p95 is None:
        return "-"
    return f"{quantiles.p50 * 1000:.0f} ms, p95 {quantiles.p95 * 1000:.0f} ms"


def _of_pools(pools: Sequence[Pool]) -> list[Column]:
    return [
        Column("pool", _cells(pool.role for pool in pools)),
        Column("ready", _cells(f"{pool.ready}/{pool.workers}" for pool in pools)),
        *_load(pools),
    ]


def _of_workers(workers: Sequence[Worker]) -> list[Column]:
    states = [Text(one.state, style=_STATES.get(one.state, "bold red")) for one in workers]
    return [
        Column("worker", _cells(one.id for one in workers)),
        Column("state", states),
        Column("role", _cells(one.role for one in workers), leave_out=4),
        Column("pid", _cells(one.pid for one in workers), leave_out=6),
        Column("node", _cells(one.node for one in workers), leave_out=1),
        *_load(workers),
        Column("host", _cells(_host(one.tiers) for one in workers), leave_out=3),
        Column("Redis written", _cells(one.tiers.redis_written for one in workers), leave_out=2),
    ]


def _host(tiers: Tiers) -> str:
    return f"{tiers.host}/{tiers.host_total}"


def _load(of: Sequence[Pool] | Sequence[Worker]) -> list[Column]:
    return [
        Column("running", _cells(one.running for one in of), leave_out=10),
        Column("waiting", _cells(one.waiting for one in of), leave_out=9),
        Column("used", _cells(one.blocks.used for one in of), leave_out=8),
        Column("cached", _cells(one.blocks.cached for one in of), leave_out=7),
        Column("total", _cells(one.blocks.total for one in of), leave_out=5),
    ]


def _cells(values: Iterable[object]) -> list[Text]:
    return [Text(str(value)) for value in values]


def _table(columns: Sequence[Column], width: int) -> Table:
    """Where even those that always stay do not fit, the first column, the name, is cut."""
    kept = fitting(columns, width)
    room = max(1, width - _side_by_side(kept) + kept[0].width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for index, column in enumerate(kept):
        table.add_column(
            column.name, no_wrap=True, width=column.width if index else min(room, column.width)
        )
    for row in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*row)
    return table


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Those that fit side by side, in their order."""
    kept = list(columns)
    while _side_by_side(kept) > width:
        spare = [column for column in kept if column.leave_out]
        if not spare:
            break
        kept.remove(min(spare, key=lambda column: column.leave_out))
    return kept


def _side_by_side(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)
