"""``python -m bench [NAME...]``: runs measurements one after the other and keeps their results.

Without names all run, shortest first, each in a process of its own. None begins once ``--budget``
minutes are over; what was left out is said. A measurement that fails is told at the end, and the
others still run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.record import RESULTS, Record

# Each has a module here with ``run() -> Record``; in the order in which they run.
MEASUREMENTS = {
    "redis_values": "the Redis tier beside pipelined redis-py",
    "handoff": "KV blocks over shared memory and TCP, beside memcpy and a bare socket",
    "quality": "what quantized weights cost: perplexity and greedy agreement beside float32",
    "cached_prefix": "first token with a cached prefix, from each tier, beside recomputing it",
    "router_alone": "the router over workers that answer at once, beside sglang-router",
    "added": "what the way through the cluster adds to the bare engine",
    "growth": "how steps, the router, the prefix index and hand-offs grow",
    "load": "pdserve bench on a live cluster: latency against rate, a trace, one timeline",
    "loading": "reading weights, cold and warm, beside transformers, load_file and the disk",
    "mixed_load": "long prompts among running streams: two roles, one mixed worker, vLLM",
    "startup": "from the command to the first token: ours and vLLM's server",
    "servers": "the same shapes over HTTP, whole runs: ours and vLLM's server",
    "engines": "the bare engines: ours, vLLM, transformers, llama.cpp",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*MEASUREMENTS, []], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="tell what there is")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="MINUTES")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.list:
        for name, what in MEASUREMENTS.items():
            print(f"{name:16} {what}")
        return 0
    names = parsed.names or list(MEASUREMENTS)
    if parsed.in_process:
        for name in names:
            record: Record = importlib.import_module(f"bench.{name}").run()
            print(f"kept in {record.write()}", flush=True)
        return 0
    return _run_all(names, parsed.budget * 60)


def _run_all(names: Sequence[str], budget_s: float) -> int:
    end = time.monotonic() + budget_s
    failed, left, missed = [], [], []
    for name in names:
        if time.monotonic() >= end:
            left.append(name)
            continue
        print(f"== {name}: {MEASUREMENTS[name]}", flush=True)
        # What one leaves in memory must not count for the next.
        command = [sys.executable, "-m", "bench", "--in-process", name]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)  # the others do not depend on it
        else:
            missed += [f"{name}: {line}" for line in missed_lines(RESULTS / f"{name}.json")]
    for title, lines in (("missed", missed), ("failed", failed), ("no time left for", left)):
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
    return 1 if failed else 0


def missed_lines(result: Path) -> list[str]:
    """Of a result that was kept."""
    return [
        f"{line['name']}: {line['value']:.3g} {line['unit']}, goal {line['goal']}"
        for line in json.loads(result.read_text("utf-8"))["lines"]
        if line["missed"]
    ]


if __name__ == "__main__":
    sys.exit(main())
