"""The live page's files and ``/live.json``: headers, who may see them, and figures that add up."""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from fronts_world import World, running_world
from http_talk import call, post
from prometheus_client import CollectorRegistry

import router
from pdserve.config import SecurityConfig
from pdserve.telemetry.metrics import RouterMetrics
from pdserve.telemetry.totals import Buckets
from pdserve.types import CachedTokens, FinishReason, Usage
from router import http_requests
from router.http_page import NAMES, load_page
from router.recent import HISTORY_S, LATENCY_S, Recent

PAGE = Path(router.__file__).parent / "page"
KEY = "a-long-enough-key"


# ---- files --------------------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_and_no_other() -> None:
    assert sorted(NAMES) == sorted(path.name for path in PAGE.iterdir())


@pytest.mark.parametrize("file", load_page(), ids=lambda file: file.path)
def test_a_file_comes_with_its_type_and_a_strict_policy(world: World, file) -> None:
    reply = call(world.http, "GET", file.path)
    assert reply.status == 200
    assert reply.body == file.body
    kind = {"": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    expected = kind[Path(file.path).suffix] + "; charset=utf-8"
    assert reply.headers["content-type"] == expected
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-cache"
    again = call(world.http, "GET", file.path, headers={"If-None-Match": reply.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert again.headers["etag"] == reply.headers["etag"]
    other = call(world.http, "GET", file.path, headers={"If-None-Match": '"something-else"'})
    assert other.status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/page/nothing.js",
        "/page/../http_page.py",
        "/page/..%2fhttp_page.py",
        "/page/%2e%2e/http_page.py",
        "/page//etc/passwd",
        "/page/style.css%00.js",
        "/index.html",
        "/favicon.ico",
    ],
)
def test_other_paths_are_404_with_the_usual_body(world: World, path: str) -> None:
    reply = call(world.http, "GET", path)
    assert reply.status == 404
    assert reply.json["error"]["code"] == "not_found"


def test_the_page_takes_nothing_from_elsewhere_and_puts_no_text_into_markup() -> None:
    for file in load_page():
        text = file.body.decode()
        found = re.findall(r"https?://[^\"'\s)]+", text)
        assert set(found) <= {"http://www.w3.org/2000/svg"}, file.path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)
        assert not re.search(r"\beval\b|new Function|\bstyle=|\bon[a-z]+=\"", text), file.path


# ---- live.json ----------------------------------------------------------------------------------


def test_the_snapshot_tells_pools_workers_and_blocks_by_tier(world: World) -> None:
    reply = call(world.http, "GET", "/live.json")
    assert reply.status == 200
    now = reply.json["now"]
    assert now["ready"] is True
    assert now["model"] == "tiny"
    (worker,) = now["workers"]
    assert worker["id"] == "decode-0"
    assert worker["blocks"] == {"used": 5, "cached": 7, "total": 64}
    assert worker["tiers"] == {"host": 0, "host_total": 0, "redis_written": 0}
    pools = {pool["role"]: pool for pool in now["pools"]}
    assert pools["decode"]["blocks"] == worker["blocks"]
    assert (pools["decode"]["ready"], pools["decode"]["running"]) == (1, 2)
    assert pools["prefill"]["workers"] == 0


def test_a_viewer_gets_only_what_it_lacks(world: World) -> None:
    post(world.http, "/v1/completions", {"prompt": "a fox", "max_tokens": 4})
    first = _after(world, 0, "")
    assert [s["sequence"] for s in first["history"]] == list(range(1, first["sequence"] + 1))
    again = _after(world, first["sequence"], first["epoch"])
    assert [s["sequence"] for s in again["history"]] == list(
        range(first["sequence"] + 1, again["sequence"] + 1)
    )
    other_router = call(world.http, "GET", f"/live.json?since={again['sequence']}&epoch=other")
    assert len(other_router.json["history"]) >= again["sequence"]
    assert again["now"]["headline"]["generated"] > 0
    assert again["now"]["headline"]["first_token"]["p50"] > 0


def _after(world: World, sequence: int, epoch: str):
    end = time.monotonic() + 10
    while True:
        found = call(world.http, "GET", f"/live.json?since={sequence}&epoch={epoch}").json
        if found["sequence"] > sequence:
            return found
        assert time.monotonic() < end, "no tick"
        time.sleep(0.1)


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "9" * 40, "\u0661", ""])
def test_a_sequence_number_is_checked(world: World, since: str) -> None:
    reply = call(world.http, "GET", f"/live.json?since={quote(since)}")
    assert reply.status == 400
    assert reply.json["error"]["param"] == "since"


def test_the_page_is_open_and_its_data_needs_the_key(model_folder, tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY + "\n")
    security = SecurityConfig(api_key_files=(str(file),))
    with running_world(model_folder, security=security) as locked:
        assert call(locked.http, "GET", "/").status == 200
        assert call(locked.http, "GET", "/page/main.js").status == 200
        refused = call(locked.http, "GET", "/live.json")
        assert refused.status == 401
        assert refused.json["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": f"Bearer {KEY}"}
        assert call(locked.http, "GET", "/live.json", headers=headers).status == 200


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1e3", "9" * 30])
def test_the_list_of_requests_can_be_cut(world: World, limit: str) -> None:
    for _ in range(3):
        post(world.http, "/v1/completions", {"prompt": "a fox", "max_tokens": 2})
    every = call(world.http, "GET", "/requests").json["requests"]
    cut = call(world.http, "GET", "/requests?limit=2").json["requests"]
    assert [r["request_id"] for r in cut] == [r["request_id"] for r in every[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_requests, "USUAL", 2)
        usual = call(world.http, "GET", "/requests").json["requests"]
    assert [r["request_id"] for r in usual] == [r["request_id"] for r in every[:2]]
    refused = call(world.http, "GET", f"/requests?limit={limit}")
    assert (refused.status, refused.json["error"]["param"]) == (400, "limit")


# ---- the last minutes ---------------------------------------------------------------------------


def usage(prompt: int, **cached: int) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=4,
        cached_tokens=CachedTokens(**cached),
        kv_transport="shm",
        kv_bytes_transferred=1000,
    )


def test_samples_are_rates_of_their_second_and_latencies_of_some_more() -> None:
    metrics = RouterMetrics(CollectorRegistry(), "tiny")
    now = 100.0
    recent = Recent(metrics.totals, clock=lambda: now, wall=lambda: now + 1e9)
    timer = metrics.request_started()
    metrics.first_token(0.030, count=1)
    metrics.tokens(3, 0.3)
    timer.finished(FinishReason.STOP, usage(50, device=16, redis=32))
    metrics.rejected("overloaded", 0.001)
    still_running = metrics.request_started()
    now += 2.0
    recent.tick()
    (sample,) = recent.since(0)
    assert (sample.sequence, sample.in_flight, sample.at) == (1, 1, 1e9 + 102)
    assert (sample.generated, sample.finished, sample.rejected) == (2.0, 0.5, 0.5)
    assert (sample.computed, sample.device, sample.host, sample.redis) == (1.0, 8.0, 0.0, 16.0)
    assert sample.kv_bytes == 500.0
    assert sample.first_token.p50 is not None
    assert 0.02 < sample.first_token.p50 <= 0.04
    assert sample.inter_token.p95 is not None
    assert 0.075 < sample.inter_token.p95 <= 0.1
    still_running.failed("cancelled")
    for _ in range(LATENCY_S):
        now += 1.0
        recent.tick()
    last = recent.since(recent.sequence - 1)[0]
    assert (last.generated, last.in_flight) == (0.0, 0)
    assert last.first_token.p50 is None, "nothing was measured in these seconds"
    assert recent.headline().generated > 0


def test_the_history_is_bounded_and_strangers_get_all_of_it() -> None:
    metrics = RouterMetrics(CollectorRegistry(), "tiny")
    recent = Recent(metrics.totals)
    for _ in range(HISTORY_S + 40):
        recent.tick()
    assert len(recent.since(0)) == HISTORY_S
    assert recent.since(recent.sequence) == []
    assert len(recent.since(recent.sequence + 5)) == HISTORY_S
    assert recent.since(recent.sequence - 3)[0].sequence == recent.sequence - 2


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0, 0), 0.5, None),
        ((10, 10, 10, 10), 0.5, 0.5),
        ((0, 10, 10, 10), 0.5, 1.5),
        ((5, 10, 10, 10), 0.5, 1.0),
        ((5, 10, 10, 10), 0.75, 1.5),
        ((0, 0, 0, 10), 0.5, 4.0),
        ((0, 0, 10, 10), 1.0, 4.0),
    ],
)
def test_quantiles_are_read_off_buckets(counts, share, expected) -> None:
    bounds = (1.0, 2.0, 4.0, float("inf"))
    earlier = Buckets(bounds, (3, 7, 9, 11))
    later = Buckets(bounds, tuple(a + b for a, b in zip(counts, earlier.counts, strict=True)))
    assert later.quantile_since(earlier, share) == expected
