"""``pdserve doctor``: one line for each thing that a cluster needs. Status 1 if one is missing."""

from __future__ import annotations

import argparse

from pdserve.cli.checks import all_checks
from pdserve.config_load import load_config


def run(parsed: argparse.Namespace) -> int:
    given = {"name": parsed.name} if parsed.name else {}
    broken = False
    for check in all_checks(load_config(parsed.config, parsed.set, given)):
        verdict = "ok" if check.good else "BAD" if check.fatal else "note"
        print(f"{verdict:<5}{check.name:<15}{check.text}")
        broken = broken or (check.fatal and not check.good)
    return 1 if broken else 0
