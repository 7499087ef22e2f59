"""Tokens to text to its end: stop tokens, stop strings, resumes, deadlines. No sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest
from fronts_world import SERVED, ScriptedDispatcher, World

from pdserve.config import Config
from pdserve.errors import DeadlineExceeded, InternalError
from pdserve.types import FinishReason, RequestId, Sampling
from router.api import ANONYMOUS, Job
from router.model_files import load_model
from router.requests import TextOptions
from router.text import Assembler, TextDelta, stream_text
from router.tokens import TokenService


@pytest.fixture(scope="module")
def tokens(model_folder):
    service = TokenService(load_model(str(model_folder), SERVED, Config()), 1)
    yield service
    service.close()


def job(ids: list[int], *, generated: tuple[int, ...] = (), **sampling) -> Job:
    sampling.setdefault("max_tokens", len(ids))
    return Job(
        RequestId("r"),
        ANONYMOUS,
        (5, 6),
        Sampling(**sampling),
        time.monotonic() + 30,
        generated=generated,
    )


def play(
    tokens: TokenService, made: Job, ids: list[int], options: TextOptions, *, per_delta: int = 1
) -> list[TextDelta]:
    dispatcher = ScriptedDispatcher(lambda _: ids, 400, 2)
    dispatcher.per_delta = per_delta

    async def run() -> list[TextDelta]:
        return [delta async for delta in stream_text(made, options, dispatcher, tokens)]

    return asyncio.run(run())


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def encode(tokens: TokenService, text: str) -> list[int]:
    return list(tokens.pieces.encode(text, add_special_tokens=False))


def test_text_does_not_depend_on_batching_or_on_a_resume(tokens: TokenService) -> None:
    """Any cut of any stream, with stop strings and broken characters, gives the same whole."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    stops = 0
    for _ in range(150):
        text = "".join(
            rng.choice(["the ", "fox", "END", "EN", "東", "👍🏽", "ü"]) for _ in range(12)
        )
        ids = encode(tokens, text) + [rng.randrange(3, 300) for _ in range(5)]
        options = TextOptions(
            stop=tuple(rng.sample(["END", "xEN", "東👍", "the f"], rng.randrange(3))),
            include_stop=rng.random() < 0.3,
        )
        minimum = rng.choice([0, 0, 10])
        whole = play(tokens, job(ids, min_tokens=minimum), ids, options)
        batched = play(
            tokens, job(ids, min_tokens=minimum), ids, options, per_delta=rng.randrange(2, 9)
        )
        assert text_of(batched) == text_of(whole)
        assert batched[-1].stop_string == whole[-1].stop_string
        count = whole[-1].usage.completion_tokens
        assert batched[-1].usage.completion_tokens == count
        assert sum(len(delta.tokens) for delta in batched) == count
        stops += whole[-1].stop_string is not None
        # Cut the stream after any token; resume with what had been sent by then.
        cut = rng.randrange(count)
        sent = text_of([delta for delta in whole if delta.offset < cut])
        made = job(ids, generated=tuple(ids[:cut]), min_tokens=minimum)
        rest = play(tokens, made, ids, options)
        assert sent + text_of(rest) == text_of(whole), (ids, options, cut)
        assert rest[-1].usage.completion_tokens == count
    assert stops > 10


def test_the_token_that_ends_a_sequence_has_no_text(tokens: TokenService) -> None:
    ids = encode(tokens, "the dog")
    stop = encode(tokens, " fox")
    script = [*ids, *stop]
    shown = play(tokens, job(script, stop_token_ids=(stop[0],)), script, TextOptions())
    assert text_of(shown) == "the dog"
    assert shown[-1].finish is FinishReason.STOP
    included = TextOptions(include_stop=True)
    shown = play(tokens, job(script, stop_token_ids=(stop[0],)), script, included)
    assert text_of(shown) == "the dog" + tokens.text_of(stop[0])
    raw = TextOptions(skip_special_tokens=False)
    script = [*ids, 0, 2]
    shown = play(tokens, job(script, stop_token_ids=(2,)), script, raw)
    assert text_of(shown) == "the dog<|endoftext|>"


def test_what_is_held_back_comes_with_the_end(tokens: TokenService) -> None:
    ids = encode(tokens, "the EN")
    shown = play(tokens, job(ids), ids, TextOptions(stop=("END",)))
    assert text_of(shown) == "the EN"
    assert shown[-1].finish is FinishReason.LENGTH
    broken = encode(tokens, "the 👍")[:-1]
    assert text_of(play(tokens, job(broken), broken, TextOptions())).startswith("the \ufffd")


def test_min_tokens_put_off_stop_strings(tokens: TokenService) -> None:
    ids = encode(tokens, "END one END two")
    late = len(encode(tokens, "END one"))
    shown = play(tokens, job(ids, min_tokens=late), ids, TextOptions(stop=("END",)))
    assert text_of(shown) == "END one "
    assert shown[-1].usage.completion_tokens >= late


def test_a_long_resume_does_not_hold_up_the_event_loop(tokens: TokenService) -> None:
    ids = encode(tokens, "the quick brown fox " * 1500)
    made = job(ids, generated=tuple(ids[:-1]), max_tokens=len(ids))
    start = time.perf_counter()
    shown = play(tokens, made, ids, TextOptions(stop=("nowhere",)))
    took = time.perf_counter() - start
    print(len(ids), "tokens replayed in", took)
    assert len(shown) == 1
    assert shown[0].offset == len(ids) - 1


class Broken:
    """A dispatcher of which the stream hangs, or ends without a finish."""

    def __init__(self, hang: bool) -> None:
        self.hang = hang
        self.closed = False

    async def generate(self, _: Job, timeline=None):
        try:
            if self.hang:
                await asyncio.sleep(60)
            return
            yield
        finally:
            self.closed = True


@pytest.mark.parametrize(("hang", "error"), [(True, DeadlineExceeded), (False, InternalError)])
def test_a_stream_always_ends(tokens: TokenService, monkeypatch, hang: bool, error: type) -> None:
    monkeypatch.setattr("router.text.GRACE_S", 0.1)
    broken = Broken(hang)
    made = Job(RequestId("r"), ANONYMOUS, (5,), Sampling(max_tokens=2), time.monotonic() + 0.1)

    async def run() -> None:
        stream = stream_text(made, TextOptions(), broken, tokens)
        async with contextlib.aclosing(stream):
            await anext(stream)

    start = time.monotonic()
    with pytest.raises(error):
        asyncio.run(run())
    assert time.monotonic() - start < 1.0
    assert broken.closed


def test_closing_the_text_cancels_the_job(tokens: TokenService) -> None:
    dispatcher = ScriptedDispatcher(lambda _: [5] * 50, 400, 2)

    async def run() -> None:
        stream = stream_text(job([5] * 50), TextOptions(), dispatcher, tokens)
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert (dispatcher.open, dispatcher.cancelled) == (0, 1)


def test_an_assembler_counts_what_became_part_of_the_answer(tokens: TokenService) -> None:
    ids = encode(tokens, "one END two")
    assembler = Assembler(job(ids), TextOptions(stop=("END",)), tokens)
    assert assembler.replay(tuple(ids)) == "END"
    assert assembler.count == len(encode(tokens, "one END"))


def test_the_world_is_whole(world: World) -> None:
    """The tokenizer spells what the tests above rely on."""
    assert world.tokenizer.decode(world.ids("東京👍🏽 END")) == "東京👍🏽 END"
