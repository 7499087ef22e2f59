"""The long form: ``python -m tests.soak --seed 1 --scale 0.1`` writes docs/reliability/.

At scale 1: 5,000 steady requests, 10 minutes of kills, 5 of hangs, 5,000 requests half of which are
cancelled, each worker drained and replaced; then the tests that have a long form, on clusters of
their own (``long``, whatever the scale). Exit status 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from pdserve.cluster.ray_node import LOCAL, start_ray
from pdserve.config import RedisTierConfig
from tests.e2e.clusters import Clusters, Variant
from tests.soak.cases import make_cases
from tests.soak.long_forms import run_long_forms
from tests.soak.phases import Result
from tests.soak.report import Run, counters, failures, row, write
from tests.soak.session import begin

CASES = 200
STREAMS = 64
LONG = "long"
PHASES = ("steady", "kills", "hangs", "aborts", "rolling", LONG)
# Silent for 2 s is suspect: with the 8 s that streams may pause, a hang of 12 s that nobody notices
# breaks the bound. Suspect workers are killed after 30 s, so that one that hangs so long wakes.
# A Redis that hangs is given up at once, as by default.
SETTINGS = (
    "timers.heartbeat_s=0.5",
    "timers.dead_after_s=2",
    "router.policy=round_robin",
    f"cache.redis.timeout_s={RedisTierConfig().timeout_s:g}",
)
VARIANT = Variant("llama", "shm", "roomy", prefill=2, decode=2, settings=SETTINGS)
DESCRIBED = (
    "2 prefill, 2 decode, tiny Llama (float64, random weights), {}, Redis, "
    "silent for 2 s is suspect"
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of lengths and counts")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--transport", default="shm", choices=("shm", "tcp"))
    parser.add_argument("--report", type=Path, default=Path("docs/reliability"))
    parser.add_argument("--name", default="soak")
    asked = parser.parse_args()
    # Whoever ends us ends the cluster as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    short = Path(tempfile.mkdtemp(prefix="pds-s"))
    node = start_ray(LOCAL, short / "ray", f"soak:{secrets.token_hex(8)}", threads=2)
    clusters = Clusters(short, node)
    phases = asked.phases.split(",")
    run = Run(f"python -m tests.soak {' '.join(sys.argv[1:])}", asked.seed, asked.scale)
    try:
        if phases != [LONG]:
            run = asyncio.run(soak(clusters, asked, run))
    finally:
        clusters.stop()
        node.stop()
        shutil.rmtree(short, ignore_errors=True)
    if LONG in phases:
        run = replace(run, long_forms=run_long_forms(asked.seed))
    print(f"report: {write(run, asked.report, asked.name)}")
    return int(not run.held)


async def soak(clusters: Clusters, asked: argparse.Namespace, run: Run) -> Run:
    variant = replace(VARIANT, transport=asked.transport)
    running = clusters.get(variant)
    cases = make_cases(asked.seed, CASES)
    scale, part = asked.scale, STREAMS
    async with begin(running, clusters.oracle("llama"), cases, asked.seed) as (ready, confirmed):
        steps: dict[str, Callable[[], Awaitable[Result]]] = {
            "steady": lambda: ready.steady(part, int(5000 * scale)),
            "kills": lambda: ready.kills(part, 600 * scale),
            "hangs": lambda: ready.hangs(part, 300 * scale, hang_s=12.0, every=20.0),
            "aborts": lambda: ready.aborts(max(200, int(5000 * scale)), 200),
            "rolling": lambda: ready.rolling(part),
        }
        for name in asked.phases.split(","):
            if name == LONG:
                continue
            result = await steps[name]()
            print(row(result), counters(result), *failures([result]), sep="\n", flush=True)
            # After each phase: one that is cut short leaves what was found until then.
            described = DESCRIBED.format(asked.transport)
            run = replace(run, cluster=described, cases=CASES, confirmed=confirmed)
            run = replace(run, results=tuple(ready.results))
            write(run, asked.report, asked.name)
    return run


if __name__ == "__main__":
    sys.exit(main())
