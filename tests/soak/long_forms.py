"""The tests that have a long form (PDSERVE_LONG=1), run as they are, and what each of them said.

Fuzzed frames and messages by the hundred thousand, generated requests by ten thousand on both
fronts, a thousand streams at once, four times what can be served for three minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

FILES = (
    "tests/kv_transfer/test_kv_hostile.py",
    "tests/cache_tiers/test_tier_hostile.py",
    "tests/e2e/test_hostile.py",
    "tests/e2e/test_client_crowds.py",
)
# Of one test; the longest has three minutes of load and what comes before and after it.
TIMEOUT_S = 1800
SAID_SHOWN = 600


@dataclass(frozen=True)
class LongForm:
    name: str
    seconds: float
    ending: str  # passed, failed or skipped
    said: str  # what it printed: its seed and figures; or why it failed


def run_long_forms(seed: int) -> list[LongForm]:
    with tempfile.TemporaryDirectory(prefix="pds-l") as folder:
        report = Path(folder) / "report.xml"
        options = ["-o", "junit_logging=system-out", f"--junitxml={report}"]
        subprocess.run(
            [sys.executable, "-m", "pytest", f"--timeout={TIMEOUT_S}", *options, *FILES],
            env={**os.environ, "PDSERVE_LONG": "1", "PDSERVE_SEED": str(seed)},
            check=False,
        )
        return [_read(case) for case in ET.parse(report).iter("testcase")]


def _read(case: ET.Element) -> LongForm:
    ending, said = "passed", case.findtext("system-out", "")
    for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            ending, said = word, found.get("message", "")
    return LongForm(
        name=case.get("name", "?"),
        seconds=float(case.get("time", "0")),
        ending=ending,
        said=_figures(said),
    )


def _figures(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("---", "seed "))]
    return "; ".join(kept)[:SAID_SHOWN]
