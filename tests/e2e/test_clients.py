"""Clients that cancel, vanish, or run out of time in each phase of a request; and their ids.

Whatever a client does, its request ends once, by its deadline, with a typed ending; every block
comes back; and the requests beside it stay what the model alone would have written.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pdserve.client import Client
from pdserve.errors import Cancelled, DuplicateRequest
from pdserve.rpc.status import CODE
from tests.e2e.ask import Caller, request
from tests.e2e.clients import (
    CLIENTS,
    HTTP_DEADLINE_S,
    LONG,
    HttpClient,
    Phase,
    Survivors,
    all_given_back,
    fresh,
    hold,
    in_flight,
    metric,
)
from tests.e2e.clusters import Clusters, Running, Variant
from tests.standstill import watched

pytestmark = pytest.mark.cluster

# An ending may come so long after the deadline.
LATE_S = 1.0


@pytest.fixture
def cluster(clusters: Clusters) -> Running:
    running = clusters.get(CLIENTS)
    running.wait_whole()
    return running


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
def test_clients_that_leave_take_nothing_with_them(
    clusters: Clusters, cluster: Running, phase: Phase
) -> None:
    survivors = Survivors(clusters, cluster, f"leave-{phase.value}")
    with all_given_back(cluster), ThreadPoolExecutor(1) as pool:
        held = hold(cluster, phase)
        if phase is Phase.QUEUED:
            first = pool.submit(survivors.check)  # what the others queue behind
            held.wait()
        prompts = [fresh(f"left-{phase.value}-{i}", 150) for i in range(4)]
        asked = [request(prompt, LONG, ignore_eos=True) for prompt in prompts[:2]]
        call = cluster.caller.stub.Generate(asked[0], timeout=60)
        other = Caller(cluster.cluster.addresses.grpc)
        kept = other.stub.Generate(asked[1], timeout=60)  # one that nobody keeps is cancelled
        browsers = [HttpClient(cluster, prompts[2]), HttpClient(cluster, prompts[3], stream=False)]
        if phase is Phase.QUEUED:
            cluster.wait(lambda: in_flight(cluster) == len(survivors.prompts) + len(prompts), 1.5)
        else:
            held.wait()
            cluster.wait(lambda: in_flight(cluster) == len(prompts), 1.5)
            first = pool.submit(survivors.check)
        assert kept.is_active()
        call.cancel()
        other.close()
        for browser in browsers:
            browser.vanish()
        # The router lets go of them at once; their workers' blocks follow.
        cluster.wait(lambda: in_flight(cluster) <= len(survivors.prompts), 1.0)
        first.result()
    survivors.check()


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
def test_a_deadline_ends_a_request_in_any_phase(
    clusters: Clusters, cluster: Running, phase: Phase
) -> None:
    survivors = Survivors(clusters, cluster, f"late-{phase.value}")
    before = metric(cluster, "requests_failed_total", code="deadline_exceeded")
    with all_given_back(cluster), ThreadPoolExecutor(8) as pool, watched() as still:
        held = hold(cluster, phase, seconds=HTTP_DEADLINE_S + 2.5)
        if phase is Phase.QUEUED:
            first = pool.submit(survivors.check)
            held.wait()
        prompts = [fresh(f"late-{phase.value}-{i}", 150) for i in range(3)]
        began = time.monotonic()
        whole = HttpClient(cluster, prompts[0], stream=False)
        streamed = HttpClient(cluster, prompts[1])
        call = cluster.caller.stub.Generate(
            request(prompts[2], LONG, ignore_eos=True), timeout=HTTP_DEADLINE_S
        )
        replies = [pool.submit(whole.answer), pool.submit(streamed.answer)]
        with pytest.raises(grpc.RpcError) as late:
            for _ in call:
                pass
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        cluster.wait(lambda: in_flight(cluster) <= len(survivors.prompts), LATE_S)
        (status, body, took), (stream_status, stream, stream_took) = (r.result() for r in replies)
        assert status == 504
        assert json.loads(body)["error"]["code"] == "deadline_exceeded"
        if stream_status == 200:
            last = stream.decode().rstrip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "deadline_exceeded"
            assert b"[DONE]" not in stream
        else:
            assert stream_status == 504
        assert max(took, stream_took) < HTTP_DEADLINE_S + LATE_S + still.seconds
        assert time.monotonic() - began < HTTP_DEADLINE_S + 2 * LATE_S + still.seconds
        failed = metric(cluster, "requests_failed_total", code="deadline_exceeded") - before
        assert failed >= 2, "the router itself ended them"
        if phase is Phase.QUEUED:
            first.result()
    survivors.check()


def test_an_abort_while_blocks_are_written_gives_them_to_nobody_too_early(
    clusters: Clusters,
) -> None:
    """The decode pool holds one such prompt: the second waits for the first one's blocks."""
    tight = Variant("llama", "tcp", "tight", settings=CLIENTS.settings)
    cluster = clusters.get(tight)
    cluster.wait_whole()
    oracle = clusters.oracle("llama")
    with all_given_back(cluster), ThreadPoolExecutor(4) as pool:
        for turn in range(3):
            prompts = [fresh(f"abort-{turn}-{i}", 400) for i in range(3)]
            held = hold(cluster, Phase.TRANSFERRING, seconds=1.0)
            call = cluster.caller.stub.Generate(request(prompts[0], 40), timeout=60)
            held.wait()
            others = [pool.submit(cluster.caller.ask, prompt, 8) for prompt in prompts[1:]]
            time.sleep(0.1 * turn)
            call.cancel()
            for prompt, other in zip(prompts[1:], others, strict=True):
                assert other.result().tokens == oracle.greedy(prompt, 8).tokens


def test_a_refusal_by_decode_leaves_no_block_of_prefill_behind(clusters: Clusters) -> None:
    """Decode has no place in its queue while prefill has read the prompt already."""
    narrow = Variant(
        "llama",
        "tcp",
        "roomy",
        settings=(*CLIENTS.settings, "engine.max_running=2", "engine.max_waiting=2"),
    )
    cluster = clusters.get(narrow)
    cluster.wait_whole()
    oracle = clusters.oracle("llama")
    prompts = [fresh(f"refused-{i}", 90) for i in range(24)]

    def one(prompt: tuple[int, ...]) -> str:
        try:
            answer = cluster.caller.ask(prompt, 30)
        except grpc.RpcError as error:
            return str(error.code().name)
        assert answer.tokens == oracle.greedy(prompt, 30).tokens
        return "answered"

    with all_given_back(cluster), ThreadPoolExecutor(len(prompts)) as pool:
        ends = list(pool.map(one, prompts))
    print(Counter(ends))
    assert set(ends) == {"answered", "RESOURCE_EXHAUSTED"}, "else this run proves nothing"


def test_one_id_is_one_request(cluster: Running) -> None:
    """A second one with the same id is refused on both fronts, and harms nobody."""
    prompt = fresh("twice", 40)
    whole = cluster.caller.ask(prompt, 100, ignore_eos=True, temperature=1.0, seed=5)
    with all_given_back(cluster):
        held = hold(cluster, Phase.DECODING, 1.0)  # so that the first one still runs
        again = request(prompt, 100, request_id="twin", ignore_eos=True, temperature=1.0, seed=5)
        first = cluster.caller.stub.Generate(again, timeout=60)
        got = list(next(first).token_ids)
        held.wait()
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                cluster.caller.stream(again)
            assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
        twin = HttpClient(cluster, prompt, stream=False, more={"request_id": "twin"})
        status, body, _ = twin.answer()
        assert status == 409
        assert json.loads(body)["error"]["code"] == "duplicate_request_id"
        for chunk in first:
            assert chunk.offset == len(got)
            got.extend(chunk.token_ids)
        assert tuple(got) == whole.tokens


def test_a_resume_takes_over_and_the_old_stream_says_so(cluster: Running) -> None:
    prompt = fresh("taken", 40)
    sampling = {"ignore_eos": True, "temperature": 1.0, "seed": 6}
    whole = cluster.caller.ask(prompt, 200, **sampling)
    with all_given_back(cluster), Client(cluster.cluster.addresses.grpc) as client:
        held = hold(cluster, Phase.DECODING, 1.0)  # so that the old stream still runs
        old = client.stream(prompt, request_id="heir", max_tokens=200, **sampling)
        got = list(next(old).token_ids)
        held.wait()
        resumed = request(prompt, 200, generated=got, request_id="heir", **sampling)
        resumed.resume = True
        rest = cluster.caller.stream(resumed)
        assert (*got, *rest.tokens) == whole.tokens
        with pytest.raises(Cancelled):
            for _ in old:
                pass


def test_ids_that_collide_in_a_crowd_end_once_each(clusters: Clusters, cluster: Running) -> None:
    """Twenty clients share four ids, start together and leave at random."""
    rng = random.Random(17)
    prompt = fresh("crowd", 60)
    oracle = clusters.oracle("llama").greedy(prompt, 40).tokens
    start = threading.Barrier(20)

    def one(index: int) -> str:
        asked = request(prompt, 40, request_id=f"shared-{index % 4}")
        asked.resume = index % 5 == 0
        got: list[int] = []
        start.wait()
        call = cluster.caller.stub.Generate(asked, timeout=30)
        leave = rng.choice((0, 3, 1000))
        try:
            for received, chunk in enumerate(call):
                assert chunk.offset == len(got)
                got.extend(chunk.token_ids)
                if received == leave:
                    call.cancel()
        except grpc.RpcError as error:
            assert tuple(got) == oracle[: len(got)]
            return str(dict(error.trailing_metadata() or ()).get(CODE, error.code().name))
        assert tuple(got) == oracle
        return "answered"

    with all_given_back(cluster), ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(one, range(20)))
    print(ends)
    assert set(ends) <= {"answered", "CANCELLED", Cancelled.code, DuplicateRequest.code}
    assert DuplicateRequest.code in ends


def test_a_prompt_that_cannot_be_made_ends_one_request(
    clusters: Clusters, cluster: Running
) -> None:
    """Chats whose template fails, sent by clients that are gone before it does."""
    survivors = Survivors(clusters, cluster, "template")
    chats = [
        [{"role": "user", "content": "long " * 20_000}],
        [{"role": "user", "content": "\ud800"}, {"role": "user"}],
        [],
    ]
    pid = cluster.cluster.router_pid
    with all_given_back(cluster):
        for turn in range(30):
            more = {"prompt": None, "return_token_ids": None, "messages": chats[turn % 3]}
            client = HttpClient(cluster, (), more=more, path="/v1/chat/completions")
            if turn % 2:
                client.vanish()
                continue
            status, body, _ = client.answer()
            assert status == 400, body
        survivors.check()
    assert cluster.cluster.router_pid == pid, "the router was started again"


def test_a_fault_while_a_client_leaves_costs_only_that_client(
    clusters: Clusters, cluster: Running
) -> None:
    """The hand-off fails in the prefill worker at the moment its client cancels."""
    survivors = Survivors(clusters, cluster, "both")
    with all_given_back(cluster):
        for turn in range(4):
            held = hold(cluster, Phase.TRANSFERRING, seconds=0.4)
            call = cluster.caller.stub.Generate(
                request(fresh(f"both-{turn}", 150), LONG), timeout=60
            )
            held.wait()
            call.cancel()
        survivors.check()
