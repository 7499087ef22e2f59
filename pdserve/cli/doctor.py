"""``pdserve doctor``: one line for each thing that a cluster needs. Status 1 if one is missing."""

from __future__ import annotations

import argparse
import json

from pdserve.cli.checks import all_checks
from pdserve.cli.checks.check import Verdict
from pdserve.config_load import load_config


def run(parsed: argparse.Namespace) -> int:
    given = {"name": parsed.name} if parsed.name else {}
    found = []
    for check in all_checks(load_config(parsed.config, parsed.set, given)):
        found.append(check)
        if not parsed.json:
            print(check.line, flush=True)
    healthy = all(check.verdict is not Verdict.BAD for check in found)
    if parsed.json:
        checks = [
            {
                "name": check.name,
                "verdict": check.verdict.value.lower(),
                "text": check.text,
                "remedy": "" if check.good else check.remedy,
            }
            for check in found
        ]
        print(json.dumps({"healthy": healthy, "checks": checks}, indent=2))
    return 0 if healthy else 1
