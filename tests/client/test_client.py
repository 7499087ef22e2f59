"""The Python client, sync and async, against the router's real front, also while it restarts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from fronts_world import CONTEXT, SERVED, ScriptedDispatcher, default_script, running_world

from pdserve.client import AsyncClient, Client, ClientOptions, Message
from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    Overloaded,
    ProtocolError,
    WorkerLost,
)
from pdserve.types import FinishReason, Numerics
from tests.standstill import watched


@pytest.fixture(scope="module")
def world(model_folder):
    with running_world(model_folder) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(world):
    world.dispatcher.__dict__.update(ScriptedDispatcher(default_script, 400, 2).__dict__)
    world.says("the quick brown fox")
    yield
    assert world.idle()


@pytest.fixture
def client(world):
    with Client(world.grpc) as made:
        yield made


def test_one_answer(world, client: Client) -> None:
    answer = client.generate("the dog", logprobs=1, prompt_logprobs=0, seed=5)
    assert answer.text == "the quick brown fox"
    assert list(answer.token_ids) == [*world.ids(answer.text), world.dispatcher.eos]
    assert answer.finish is FinishReason.STOP
    assert answer.usage.kv_transport == "shm"
    assert answer.usage.cached_tokens.total == 3
    assert len(answer.logprobs) == len(answer.token_ids)
    assert len(answer.prompt_logprobs) == len(world.ids("the dog"))
    assert answer.seed == 5


def test_prompts_of_three_kinds(world, client: Client) -> None:
    ids = world.ids("the dog")
    client.generate("the dog")
    client.generate(ids)
    client.generate([Message("user", "the dog")])
    text, tokens, chat = world.dispatcher.jobs
    assert list(text.prompt) == list(tokens.prompt) == ids
    assert list(chat.prompt) == list(client.tokenize([Message("user", "the dog")]))
    assert list(client.tokenize("the dog")) == ids
    assert client.model().name == SERVED
    assert client.model().max_model_len == CONTEXT
    assert client.model().numerics is Numerics.EXACT


def test_the_client_mints_id_and_seed(world, client: Client) -> None:
    for _ in range(2):
        client.generate("x")
    one, two = world.dispatcher.jobs
    assert one.request_id != two.request_id
    assert one.sampling.seed != two.sampling.seed
    assert not one.resume


def test_options_reach_the_job(world, client: Client) -> None:
    client.generate(
        "x",
        request_id="mine",
        priority=-3,
        cache_salt="s",
        timeout_s=20,
        max_tokens=9,
        temperature=0.5,
        logit_bias={5: 1.5},
        stop=["never"],
        stop_token_ids=[7],
        ignore_eos=True,
    )
    job = world.dispatcher.jobs[0]
    assert (job.request_id, job.priority) == ("mine", -3)
    assert job.salt != b""
    assert job.sampling.max_tokens == 9
    assert job.sampling.logit_bias == ((5, 1.5),)
    assert job.sampling.stop_token_ids == (7,)


def test_errors_are_the_servers_own(world, client: Client) -> None:
    with pytest.raises(InvalidRequest, match="temperature") as caught:
        client.generate("x", temperature=-1.0)
    assert caught.value.param == "temperature"
    with pytest.raises(ModelNotFound):
        client.generate("x", model="other")
    with pytest.raises(InvalidRequest):
        client.generate("x", max_tokens=-1)
    with pytest.raises(InvalidRequest):
        client.generate("")
    world.dispatcher.fail_after = {0: Overloaded("full", retry_after_s=1.5)}
    with pytest.raises(Overloaded) as limited:
        client.generate("x")
    assert limited.value.retry_after_s == 1.5
    assert len(world.dispatcher.jobs) == 1
    with pytest.raises(ConfigError):
        Client("no-port")
    with pytest.raises(TypeError):
        client.generate(["a", "b"])


def test_a_lost_stream_goes_on_without_gap_or_repeat(world, client: Client) -> None:
    text = "Grüße 東京 👍🏽 and the fox"
    world.says(text)
    cuts = {1: NoWorker("a"), 5: WorkerLost("b"), 6: WorkerLost("c")}
    world.dispatcher.fail_after = dict(cuts)
    chunks = list(client.stream("x", seed=3))
    assert [t for c in chunks for t in c.token_ids] == [*world.ids(text), world.dispatcher.eos]
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.offset for chunk in chunks] == list(range(len(chunks)))
    first, *resumed = world.dispatcher.jobs
    assert not first.resume
    assert [len(job.generated) for job in resumed] == [1, 5, 6]
    assert all(job.resume for job in resumed)
    assert {job.request_id for job in resumed} == {first.request_id}
    assert {job.sampling.seed for job in resumed} == {3}


def test_closing_a_stream_cancels_the_request(world, client: Client) -> None:
    world.dispatcher.pause_s = 0.02
    stream = client.stream("x")
    next(stream)
    stream.close()
    assert world.idle(2.0)
    assert world.dispatcher.cancelled == 1


def test_a_request_ends_at_its_deadline(world, client: Client) -> None:
    world.dispatcher.pause_s = 0.2
    with watched() as still:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            list(client.stream("x", timeout_s=0.5))
        assert time.monotonic() - start < 1.5 + still.seconds


def test_workers_that_keep_dying_do_not_outlast_the_deadline(world, client: Client) -> None:
    world.dispatcher.fail_after = {1: WorkerLost("first")}
    stream = client.stream("x", timeout_s=2.0)
    next(stream)
    world.dispatcher.fail_after = Endless()
    with watched() as still:
        start = time.monotonic()
        with pytest.raises((WorkerLost, DeadlineExceeded)):
            list(stream)
        assert time.monotonic() - start < 3.0 + still.seconds
    assert len(world.dispatcher.jobs) < 20, "no pause between attempts"


class Endless(dict):
    """Fails every attempt that gets anywhere."""

    def __iter__(self):
        return iter([0])

    def pop(self, _):
        return WorkerLost("again")


def test_nobody_listening_is_told_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = ClientOptions(connect_timeout_s=0.5)
    start = time.monotonic()
    with Client(f"127.0.0.1:{port}", options) as client, pytest.raises(WorkerLost):
        client.generate("x")
    assert time.monotonic() - start < 3.0


def test_a_stream_outlives_a_restart_of_the_router(model_folder) -> None:
    """The front goes away in mid-stream and comes back on the same port, knowing nothing."""
    got, done = [], threading.Event()

    def read(address: str) -> None:
        with Client(address) as client:
            got.extend(client.stream("x", seed=1, timeout_s=30))
        done.set()

    with running_world(model_folder) as first:
        text = "the quick brown fox jumps over the lazy dog"
        first.says(text)
        ids, eos = first.ids(text), first.dispatcher.eos
        first.dispatcher.pause_s = 0.25  # longer in all than the front waits when it closes
        reader = threading.Thread(target=read, args=(first.grpc,), daemon=True)
        reader.start()
        while len(got) < 2:
            time.sleep(0.01)
    cut = len(got)
    assert not done.is_set()
    time.sleep(0.3)
    with running_world(model_folder, grpc_port=int(first.grpc.split(":")[1])) as second:
        second.says(text)
        assert done.wait(20)
        job = second.dispatcher.jobs[0]
    assert job.resume
    assert len(job.generated) >= cut
    assert [token for chunk in got for token in chunk.token_ids] == [*ids, eos]
    assert "".join(chunk.text for chunk in got) == text


def test_a_server_that_skips_a_token_is_found_out(world, client: Client) -> None:
    honest = world.dispatcher._deltas

    async def skipping(job):
        async for delta in honest(job):
            if delta.offset != 2:
                yield delta

    world.dispatcher._deltas = skipping
    with pytest.raises(ProtocolError, match="token 3 came where token 2 was due"):
        client.generate("x")
    world.dispatcher._deltas = honest


def test_the_async_client_does_the_same(world) -> None:
    text = "the quick brown fox"
    world.dispatcher.fail_after = {2: WorkerLost("gone")}

    async def run():
        async with AsyncClient(world.grpc) as client:
            chunks = [chunk async for chunk in client.stream("x", seed=1)]
            answers = await asyncio.gather(*(client.generate("x") for _ in range(5)))
            tokens = await client.tokenize("the dog")
            model = await client.model()
            with pytest.raises(InvalidRequest):
                await client.generate("x", top_p=2.0)
            world.dispatcher.pause_s = 0.02
            async with contextlib.aclosing(client.stream("x")) as stream:
                await anext(stream)
        return chunks, answers, tokens, model

    chunks, answers, tokens, model = asyncio.run(run())
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.offset for chunk in chunks] == list(range(len(chunks)))
    assert {answer.text for answer in answers} == {text}
    assert list(tokens) == world.ids("the dog")
    assert model.name == SERVED
    assert world.idle(2.0)


def test_the_client_is_thin() -> None:
    code = (
        "import sys, pdserve.client\n"
        "heavy = {'torch', 'transformers', 'ray', 'tokenizers', 'router', 'numpy'}\n"
        "sys.exit(' '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
