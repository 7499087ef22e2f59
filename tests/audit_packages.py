"""Asks pip-audit for known vulnerabilities of what is installed; part of ``make check``.

Ends with 1 when there are some. Where its data cannot be had, or has nothing on our packages (an
index that mirrors packages without advisories), says so loudly and ends with 0: nothing was proved.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

TIMEOUT_S = 300


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        print("SKIPPED pip-audit: its data cannot be reached", file=sys.stderr)
        return 0
    text, code = verdict(report)
    print(text, file=sys.stderr if code or text.startswith("SKIPPED") else sys.stdout)
    return code


def verdict(report: Mapping[str, Any]) -> tuple[str, int]:
    """What a report says, in words, and the exit status."""
    packages = report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    bad = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    if bad:
        return "pip-audit found known vulnerabilities:\n" + "\n".join(bad), 1
    if not audited:
        return f"SKIPPED pip-audit: no advisories for any of {len(packages)} packages here", 0
    left = len(packages) - len(audited)
    return f"pip-audit: {len(audited)} packages have no known vulnerability, {left} unknown", 0


if __name__ == "__main__":
    sys.exit(main())
