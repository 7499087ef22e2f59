"""``pdserve bench`` on a live cluster: latency against rate, a trace, and one request's timeline.

The command runs as its users run it, in a process of its own. Its result files stay beside this
record (``rates/``), the pictures are drawn from them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from bench.live import Live, prompt_ids, running_cluster, stream
from bench.record import RESULTS, Record
from pdserve.client.aio import AsyncClient

# Offered requests/s, and how many of them make one repeat.
RATES = {0.5: 12, 1.0: 24, 2.0: 40, 4.0: 60}
REPEATS = 3
_SHAPE = ("--input-tokens", "256", "--output-tokens", "32")
_SLO = ("--slo-ttft-ms", "1000", "--slo-itl-ms", "100")
_TRACE = ("--trace", "sample:mooncake", "--scale", "0.03", "--rate", "1", "--requests", "12")
_OTHER_SEED = ("--seed", "99")
TIMELINE_PROMPT, TIMELINE_TOKENS = 768, 8
_LIMIT_S = 170.0


def run() -> Record:
    record = Record("load")
    folder = RESULTS / "rates"
    folder.mkdir(parents=True, exist_ok=True)
    with running_cluster("router.skip_handoff_tokens=0", prefill=1, decode=1) as live:
        timeline = asyncio.run(_one_timeline(live))
        (RESULTS / "timeline.json").write_text(json.dumps(timeline, indent=1) + "\n", "utf-8")
        for seed, (rate, requests) in enumerate(RATES.items(), start=record.seed):
            what = ["--rate", f"{rate:g}", "--requests", str(requests), "--repeats", str(REPEATS)]
            # Prompts come of the seed: with one for all rates the first would fill the caches.
            what += ["--seed", str(seed)]
            path = folder / f"rate-{rate:g}.json"
            _tell(record, f"{rate:g}/s", _bench(live, path, *what, *_SHAPE, *_SLO))
        _tell(
            record,
            "trace",
            _bench(live, folder / "trace-mooncake.json", *_TRACE, *_OTHER_SEED, *_SLO),
        )
    return record


def _bench(live: Live, path: Path, *options: str) -> Any:
    """Runs the command; its result. CalledProcessError when no request was answered."""
    command = [sys.executable, "-m", "pdserve.cli.main", "bench", "--url", live.http]
    subprocess.run([*command, "--out", str(path), *options], check=True, timeout=_LIMIT_S)
    return json.loads(path.read_text("utf-8"))


def _tell(record: Record, name: str, result: Any) -> None:
    for latency in ("ttft", "itl"):
        for percent in ("p50", "p99"):
            found = result["latencies_ms"][latency][percent]
            record.value(f"{name}: {latency} {percent}", "ms", found["repeats"])
    found = result["rates"]["goodput_requests_per_s"]
    record.value(f"{name}: goodput", "requests/s", found["repeats"])
    record.notes[name] = result["outcomes"]


async def _one_timeline(live: Live) -> dict[str, Any]:
    """Of a prompt of several chunks, as the router tells it afterwards."""
    rng = np.random.default_rng(0)
    async with AsyncClient(live.grpc) as client:
        await stream(client, prompt_ids(TIMELINE_PROMPT, rng), 2)
        timed = await stream(client, prompt_ids(TIMELINE_PROMPT, rng), TIMELINE_TOKENS)
    url = f"{live.http}/requests/{timed.last.request_id}"
    told = await asyncio.to_thread(_get, url)
    spans = [
        {
            "name": span["name"],
            "where": span["who"],
            "start_ms": span["start_ms"],
            "end_ms": span["start_ms"] + span["duration_ms"],
        }
        for span in told["spans"]
    ]
    spans += [
        {"name": f"token {i}", "where": "client", "start_ms": 1e3 * at, "end_ms": 1e3 * at}
        for i, at in enumerate(timed.token_s)
    ]
    title = f"one request: {TIMELINE_PROMPT} tokens in, {TIMELINE_TOKENS} out"
    return {"title": title, "spans": spans}


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)
