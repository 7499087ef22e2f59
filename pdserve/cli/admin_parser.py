"""The command line of ``pdserve admin``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

AddCommon = Callable[[argparse.ArgumentParser], None]

ROLES = ("prefill", "decode", "mixed")
TIERS = ("device", "host", "redis")
LEVELS = ("debug", "info", "warning", "error")


def add_admin(parser: argparse.ArgumentParser, add_config: AddCommon) -> None:
    """Every action takes the common options behind its name."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text, description=text.capitalize() + ".")
        add_config(made)
        made.add_argument(
            "--address", metavar="HOST:PORT", help="of the admin service; default: as recorded"
        )
        made.add_argument(
            "--token-file",
            metavar="FILE",
            help="admin.json, or the secret of admin.token_file; default: in the cluster's folder",
        )
        made.add_argument("--json", action="store_true", help="the answer as JSON")
        return made

    action("pools", "show the pools, their bounds and who is drained")
    for name, text in (
        ("drain", "give a worker no new work; returns when nothing runs there"),
        ("remove", "drain a worker, end it and make its pool smaller"),
    ):
        drain = action(name, text)
        drain.add_argument("worker", metavar="WORKER", help="as pdserve status names it")
        _add_drain_s(drain)
    action("undrain", "give a drained worker work again").add_argument("worker", metavar="WORKER")
    add = action("add", "add workers; returns when they take work")
    add.add_argument("role", choices=ROLES, metavar="ROLE", help=", ".join(ROLES))
    add.add_argument("count", type=int, nargs="?", default=1, metavar="N")
    resize = action("resize", "change the pools to these sizes")
    resize.add_argument("sizes", nargs="+", metavar="ROLE=N", help="for example prefill=2 decode=3")
    _add_drain_s(resize)
    flush = action("flush", "empty cache tiers; blocks in use stay")
    flush.add_argument(
        "tiers", nargs="+", choices=(*TIERS, "all"), metavar="TIER", help=f"{', '.join(TIERS)}, all"
    )
    level = action("log-level", "change how much is logged, until the process ends")
    level.add_argument("level", choices=LEVELS, metavar="LEVEL", help=", ".join(LEVELS))
    level.add_argument(
        "--worker", default="", metavar="W", help="a worker's id, or router; default: all"
    )


def _add_drain_s(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drain-s",
        type=float,
        metavar="S",
        help="what runs longer goes on elsewhere; default: timers.drain_s",
    )
