"""What a stream promises beyond its greedy tokens: seeds, resumes, caches, tenants, overlap."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest

from pdserve.faults import Action, Step
from tests.e2e.ask import Caller, request
from tests.e2e.clusters import BLOCK, CHUNK, Clusters, Variant

pytestmark = pytest.mark.cluster

SEED = 7
ROOMY = Variant("llama", "shm", "roomy", settings=("testing.faults=true",))
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 60}


def fresh(seed: object, length: int) -> tuple[int, ...]:
    rng = random.Random(str(seed))
    print(f"seed {seed}")
    return tuple(rng.randrange(5, 512) for _ in range(length))


def test_seeded_sampling_ignores_batch_chunks_and_transport(clusters: Clusters) -> None:
    prompts = [fresh(f"sampled-{i}", 20 + 9 * i) for i in range(8)]
    streams: list[list[tuple[int, ...]]] = []
    for variant in (
        ROOMY,
        Variant("llama", "tcp", "roomy", chunk=24),
        Variant("llama", "tcp", "tight"),
    ):
        ask = partial(clusters.get(variant).caller.ask, max_tokens=24, seed=11, **SAMPLED)
        alone = [ask(prompt).tokens for prompt in prompts]
        with ThreadPoolExecutor(8) as pool:
            together = [answer.tokens for answer in pool.map(ask, prompts)]
        assert together == alone
        streams.append(alone)
    assert streams[0] == streams[1] == streams[2]
    other = clusters.get(ROOMY).caller.ask(prompts[0], 24, seed=12, **SAMPLED).tokens
    assert other != streams[0][0], "another seed writes another text"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 6, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.0, "repetition_penalty": 1.4, "min_tokens": 12},
    ],
    ids=["greedy", "seeded", "counted", "repetition"],
)
def test_a_resumed_request_continues_exactly(
    clusters: Clusters, sampling: dict[str, float]
) -> None:
    caller = clusters.get(ROOMY).caller
    prompt = fresh("resume", 3 * BLOCK + 2)
    whole = caller.ask(prompt, 30, **sampling)
    for cut in (1, BLOCK, 17, len(whole.tokens) - 1):
        rest = caller.ask(prompt, 30, generated=whole.tokens[:cut], **sampling)
        assert rest.tokens == whole.tokens[cut:], cut
        assert rest.usage.completion_tokens == whole.usage.completion_tokens
        assert rest.usage.prompt_tokens == len(prompt)
        assert rest.finish == whole.finish


def test_a_stop_id_below_min_tokens_that_a_client_sends_ends_nothing(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    prompt, stop = fresh("early-stop", 3 * BLOCK + 2), 5
    answer = cluster.caller.ask(
        prompt, 12, generated=(stop,), min_tokens=5, stop_token_ids=(stop,), ignore_eos=True
    )
    # Greedy, so the same tokens follow whether it belongs to the prompt or to the answer.
    whole = cluster.caller.ask(
        (*prompt, stop), 11, min_tokens=4, stop_token_ids=(stop,), ignore_eos=True
    )
    assert answer.tokens == whole.tokens
    assert len(answer.tokens) >= 4
    assert answer.usage.kv_bytes_transferred > 0
    assert answer.usage.resumes == 0, "a hand-off failed on the way"
    cluster.check_idle()


def test_the_seed_in_force_is_told_and_repeats_the_stream(clusters: Clusters) -> None:
    caller = clusters.get(ROOMY).caller
    prompt = fresh("minted", 12)
    first = caller.ask(prompt, 16, temperature=1.0)
    again = caller.ask(prompt, 16, temperature=1.0, seed=first.seed)
    assert again.tokens == first.tokens


def test_the_second_turn_finds_prompt_and_answer(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    prompt = fresh("turn", 2 * BLOCK + 5)
    first = cluster.caller.ask(prompt, 2 * BLOCK, ignore_eos=True)
    cluster.settle()
    # The next turn's prompt shares everything with the first turn; then come new words.
    second = (*prompt, *first.tokens, *fresh("turn-2", 9))
    answer = cluster.caller.ask(second, 4)
    known = len(prompt) + len(first.tokens) - 1  # the last token of an answer has no KV
    cached = answer.cached.device + answer.cached.host + answer.cached.redis
    assert cached == known // BLOCK * BLOCK


def test_chunks_move_while_the_next_one_is_computed(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    # Each chunk takes longer than a hand-off of the one before does on a busy machine.
    for nth in range(2, 7):
        cluster.arm("prefill", Step.ENGINE_STEP, Action.HANG, nth, 0.5)
    with cluster.writes_held():  # else the decode worker may find a finished chunk in Redis
        answer = cluster.caller.ask(fresh("overlap", 6 * CHUNK), 2)
    assert len(answer.tokens) == 2, "an answer that ends at its first token moves no last chunk"
    chunks = list(answer.usage.chunks)
    assert len(chunks) >= 4
    assert all(chunk.first_byte > 0 for chunk in chunks)
    for chunk, following in itertools.pairwise(chunks):
        assert chunk.compute_end <= chunk.first_byte, "bytes left before they were computed"
        assert chunk.first_byte < following.compute_end, "a chunk waited for the next one"


def test_tenants_never_share_a_block_and_one_salt_does(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    prompt = fresh("tenant", 4 * BLOCK + 1)

    def cached(salt: str) -> int:
        found = cluster.caller.ask(prompt, 2, cache_salt=salt).cached
        cluster.settle()
        return found.device + found.host + found.redis

    assert cached("red") == 0
    assert cached("blue") == 0
    assert cached("") == 0
    assert cached("red") == 4 * BLOCK
    assert cached("blue") == 4 * BLOCK


def test_redis_outlives_every_worker(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    prompt = fresh("redis", 5 * BLOCK + 3)
    first = cluster.caller.ask(prompt, 6)
    cluster.settle()
    before = {worker["pid"] for worker in cluster.workers()}
    cluster.restart_workers()
    after = {worker["pid"] for worker in cluster.workers()}
    assert before.isdisjoint(after)
    again = cluster.caller.ask(prompt, 6)
    assert again.tokens == first.tokens
    assert again.cached.redis == 5 * BLOCK


def test_every_block_is_free_or_cached_after_a_mix(clusters: Clusters) -> None:
    cluster = clusters.get(Variant("llama", "tcp", "tight"))
    rng = random.Random(SEED)

    def one(index: int) -> str:
        prompt = fresh(f"mix-{index}", rng.choice((1, 30, 80, 200, 400)))
        kind = index % 4
        if kind == 0:
            cluster.caller.ask(prompt, 20)
        elif kind == 1:
            call = cluster.caller.stub.Generate(request(prompt, 100, ignore_eos=True), timeout=60)
            for received, _ in enumerate(call):
                if received >= index % 7:
                    call.cancel()
                    break
        elif kind == 2:
            with pytest.raises(grpc.RpcError) as refused:
                cluster.caller.ask((*prompt, 100_000), 4)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        else:
            call = cluster.caller.stub.Generate(request(prompt, 100, ignore_eos=True), timeout=60)
            call.cancel()
        return "done"

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(one, range(48))) == {"done"}
    cluster.check_idle()


def test_preempted_streams_are_the_oracles(clusters: Clusters) -> None:
    """Together they outgrow the pool while they write: some have to step back and start over."""
    cluster = clusters.get(Variant("llama", "tcp", "tight"))
    oracle = clusters.oracle("llama")
    prompts = [fresh(f"crowd-{i}", 2 * BLOCK + i) for i in range(6)]
    answers = cluster.caller.ask_all(prompts, 8 * BLOCK)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == oracle.greedy(prompt, 8 * BLOCK).tokens
    assert sum(answer.usage.preemptions for answer in answers) > 0
    cluster.check_idle()


def test_logprobs_are_the_oracles(clusters: Clusters) -> None:
    caller: Caller = clusters.get(ROOMY).caller
    prompt = fresh("logprobs", CHUNK + 9)
    answer = caller.ask(prompt, 5, logprobs=3, prompt_logprobs=2)
    assert [entry.token_id for entry in answer.logprobs] == list(answer.tokens)
    for entry in answer.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0].rank == 1
        assert entry.logprob == pytest.approx(entry.top[0].logprob)  # greedy takes the best
    assert len(answer.prompt_logprobs) == len(prompt)
    expected = clusters.oracle("llama").prompt_logprobs(prompt)
    got = [entry.logprob for entry in answer.prompt_logprobs[1:]]
    assert [e.token_id for e in answer.prompt_logprobs[1:]] == list(prompt[1:])
    assert got == pytest.approx(expected, abs=1e-4)


def test_two_choices_of_workers_are_two_processes(clusters: Clusters) -> None:
    workers = clusters.get(ROOMY).workers()
    assert {worker["role"] for worker in workers} == {"prefill", "decode"}
    assert len({worker["pid"] for worker in workers}) == 2
    assert {worker["state"] for worker in workers} == {"ready"}


def test_workers_stand_behind_nobody_for_the_cores(clusters: Clusters) -> None:
    """Ray would start them with a niceness of 15."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for facts in clusters.get(ROOMY).cluster.workers():
        assert os.getpriority(os.PRIO_PROCESS, facts.pid) == ours


def test_a_first_token_that_ends_moves_nothing(clusters: Clusters) -> None:
    answer = clusters.get(ROOMY).caller.ask(fresh("short", 40), 1)
    assert len(answer.tokens) == 1
    assert answer.usage.kv_bytes_transferred == 0
    assert answer.usage.kv_skipped_reason == "ended_at_first_token"
    assert answer.finish == "length"


def test_a_prompt_beyond_the_context_is_refused_with_its_figures(clusters: Clusters) -> None:
    cluster = clusters.get(ROOMY)
    with pytest.raises(grpc.RpcError) as refused:
        cluster.caller.ask(fresh("long", cluster.context + 1), 4)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(cluster.context) in refused.value.details()
