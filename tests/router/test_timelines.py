"""What GET /requests tells: every phase of a request, in order, to its principal, and no text."""

from __future__ import annotations

import itertools
import json

import pytest
from fronts_world import running_world
from http_talk import call, post
from router_harness import cluster, drive, prefill, settings
from scripted_worker import Fail, ScriptedWorker, Write, job

from pdserve.config import SecurityConfig
from pdserve.errors import InternalError, WorkerLost
from pdserve.telemetry.timeline import PhaseName
from pdserve.types import FinishReason, Usage
from router.timelines import State, Timeline, Timelines

PROMPT = (1, 2, 3, 4, 5)


def names(timeline: Timeline) -> list[str]:
    return [phase.name.value for phase in timeline.phases()]


def test_the_routers_phases_follow_each_other_through_a_recovery() -> None:
    async def story() -> None:
        losing = [[Write(3), Fail(WorkerLost("gone"))], [Write(5)]]
        worker, reader = ScriptedWorker("d0", scripts=losing), prefill()
        async with cluster(worker, reader, config=settings(skip_handoff_tokens=0)) as made:
            timelines = Timelines(8)
            one = job(prompt=PROMPT, tokens=8)
            timeline = timelines.open(one)
            deltas = [delta async for delta in made.dispatcher.generate(one, timeline)]
            timeline.finish(FinishReason.LENGTH, deltas[-1].usage)
            timelines.close(timeline)

            assert names(timeline) == ["prepare", "place", "attempt", "recover", "place", "attempt"]
            first, second = (p for p in timeline.phases() if p.name is PhaseName.ATTEMPT)
            assert (first.attempt, first.reason, first.tokens) == (1, "worker_lost", 3)
            assert (second.attempt, second.reason, second.tokens) == (2, "finished", 5)
            assert (first.prefill_worker, first.decode_worker) == ("p0", "d0")
            for before, after in itertools.pairwise(timeline.phases()):
                assert 0 <= after.start_ns - before.end_ns < 1e8
            assert timeline.phases()[-1].end_ns <= timeline.ended_ns
            assert timeline.usage().completion_tokens == 8
            assert next(timelines.newest(one.principal)) is timeline

    drive(story)


def test_a_request_that_runs_shows_how_far_it_is() -> None:
    async def story() -> None:
        async with cluster(ScriptedWorker("d0", token_delay_s=0.01)) as made:
            one = job(prompt=PROMPT, tokens=8)
            timeline = Timeline(one)
            stream = made.dispatcher.generate(one, timeline)
            sent = len((await anext(stream)).tokens)
            current = timeline.current()
            assert current is not None
            assert current.name is PhaseName.ATTEMPT
            assert current.duration_ns > 0
            assert timeline.usage().completion_tokens == sent
            assert timeline.state is State.RUNNING
            await stream.aclose()
            timeline.cancel()
            assert (timeline.state, timeline.current()) == (State.CANCELLED, None)

    drive(story)


def test_how_it_ended_is_said_once() -> None:
    timeline = Timeline(job())
    timeline.fail(InternalError.code)
    timeline.finish(FinishReason.STOP, Usage(1, 1))
    timeline.cancel()
    timeline.enter(PhaseName.PLACE)
    assert (timeline.state, timeline.error, names(timeline)) == (
        State.FAILED,
        "internal",
        ["prepare"],
    )


def test_the_last_ones_are_kept_and_no_more() -> None:
    timelines = Timelines(3)
    made = [timelines.open(job(f"r{i}")) for i in range(6)]
    for timeline in made[:5]:
        timelines.close(timeline)
        timelines.close(timeline)
    shown = [timeline.request_id for timeline in timelines.newest(made[0].principal)]
    assert shown == ["r5", "r4", "r3", "r2"]
    again = timelines.open(job("r4"))
    assert timelines.find("r4", again.principal) is again
    timelines.close(again)
    assert timelines.find("r1", again.principal) is None


@pytest.fixture(scope="module")
def locked(model_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("first-secret-key\nsecond-secret-key\n")
    with running_world(model_folder, security=SecurityConfig(api_key_files=(str(file),))) as world:
        world.says("the fox jumps")
        yield world


def ask(world, key: str, **body) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    reply = post(world.http, "/v1/completions", {"prompt": "the dog", **body}, headers)
    assert reply.status == 200, reply.body
    return json.loads(reply.body)["id"]


def get(world, path: str, key: str = ""):
    return call(world.http, "GET", path, None, {"Authorization": f"Bearer {key}"} if key else {})


def test_a_principal_sees_its_own_requests_alone(locked) -> None:
    ask(locked, "first-secret-key", request_id="mine")
    ask(locked, "second-secret-key", request_id="theirs")
    assert get(locked, "/requests").status == 401
    assert get(locked, "/requests/mine").status == 401
    listed = json.loads(get(locked, "/requests", "first-secret-key").body)["requests"]
    assert [each["request_id"] for each in listed] == ["mine"]
    reply = get(locked, "/requests/theirs", "first-secret-key")
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (404, "request_not_found")


def test_one_request_in_full_holds_its_figures_and_no_text(locked) -> None:
    ask(locked, "first-secret-key", request_id="full", stop=["jumps"])
    reply = get(locked, "/requests/full", "first-secret-key")
    shown = json.loads(reply.body)
    assert (shown["state"], shown["finish_reason"], shown["phase"]) == ("finished", "stop", "")
    assert len(shown["trace_id"]) == 32
    assert shown["usage"]["completion_tokens"] == shown["completion_tokens"] > 0
    assert shown["decode_worker"] == "decode-0"
    (prepare,) = shown["spans"]
    assert (prepare["name"], prepare["who"], prepare["start_ms"]) == ("prepare", "router", 0)
    assert 0 < prepare["duration_ms"] <= shown["duration_ms"]
    assert b"fox" not in reply.body
    assert b"dog" not in reply.body


def test_a_clock_that_is_set_back_makes_no_request_shorter_than_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeline = Timeline(job(prompt=PROMPT, tokens=8))
    hour = 3600 * 10**9
    monkeypatch.setattr("router.timelines.unix_ns", lambda moment: timeline.started_ns - hour)
    timeline.enter(PhaseName.PLACE)
    timeline.finish(FinishReason.LENGTH, Usage(5, 8))
    assert timeline.duration_ns() == 0
    assert all(phase.duration_ns == 0 for phase in timeline.phases())
