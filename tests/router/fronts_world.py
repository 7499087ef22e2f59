"""A small world for the fronts: a real tokenizer, model files, a scripted dispatcher, real sockets.

The dispatcher answers each job with a fixed function of its prompt and seed, so that an answer can
be told apart from every other and a resumed one can be compared with the whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pdserve.config import (
    Config,
    ModelConfig,
    RouterConfig,
    SecurityConfig,
    TelemetryConfig,
)
from pdserve.errors import Overloaded, PdserveError
from pdserve.rpc.identity import Caller, mint
from pdserve.types import (
    CachedTokens,
    Fingerprint,
    FinishReason,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    Role,
    TierBlocks,
    TokenLogprob,
    TokenOut,
    TopLogprob,
    Usage,
    WorkerFacts,
    WorkerId,
    WorkerState,
)
from router.api import Delta, Job, WorkerView
from router.boot import RouterBoot
from router.fronts import start_fronts
from router.separation import Shortfall
from router.timelines import Timeline
from tests.standstill import watched

SERVED = "tiny"
CONTEXT = 256
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog jumps over the fox",
    "once upon a time there was a small town by the sea, where it rained every day",
    "Grüße aus Köln, schöne Straße; naïve café; 東京は大きい都市です; Привет, мир! 👍🏽 😀",
    "one two three four five six seven eight nine ten END of the list",
]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentence_piece_tokenizer() -> Tokenizer:
    """Spaces as part of pieces, unknown characters as byte tokens, one special token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({char for line in CORPUS[:2] for char in line if char.isascii()})
    pieces += ["\u2581", *(char for char in letters if char != " ")]
    pieces += ["\u2581the", "\u2581dog", "th", "he", "\u2581f", "ox"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("h", "e"), ("o", "x")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


def write_model(folder: Path, **generation: object) -> Path:
    """A model folder as far as the router reads one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, **generation}))
    special = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "chat_template": TEMPLATE})
    )
    return folder


Script = Callable[[Job], list[int]]


class ScriptedDispatcher:
    """Implements router.api.Dispatcher. ``script`` gives all the tokens that a job would make."""

    def __init__(self, script: Script, vocab_size: int, eos: int) -> None:
        self.script = script
        self.per_delta = 1
        self.pause_s = 0.0
        self.stop_ids_end = True
        self.fail_after: dict[int, PdserveError] = {}  # tokens made -> error, each used once
        self.is_ready: tuple[bool, str] = (True, "")
        self.absent: tuple[WorkerId, ...] = ()
        self.lacks: tuple[Shortfall, ...] = ()
        self.places: int | None = None
        self.facts: ModelFacts | None = ModelFacts(
            path="tiny",
            max_model_len=CONTEXT,
            vocab_size=vocab_size,
            block_size=16,
            dtype="float32",
            numerics=Numerics.EXACT,
            fingerprint=Fingerprint(bytes(range(32))),
        )
        self.eos = eos
        self.jobs: list[Job] = []
        self.open = 0
        self.cancelled = 0
        self.finished = 0

    def model(self) -> ModelFacts | None:
        return self.facts

    def check_room(self, coming: int, prepared: int) -> None:
        if self.places is not None and self.open + prepared + coming > self.places:
            raise Overloaded("full", retry_after_s=1.5)

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def missing(self) -> tuple[WorkerId, ...]:
        return self.absent

    def shortfalls(self) -> tuple[Shortfall, ...]:
        return self.lacks

    def workers(self) -> tuple[WorkerView, ...]:
        assert self.facts is not None
        facts = WorkerFacts(
            id=WorkerId("decode-0"),
            incarnation=Incarnation(bytes(range(16))),
            role=Role.DECODE,
            pid=4711,
            node="here",
            address="127.0.0.1:4000",
            model=self.facts,
            blocks_total=64,
        )
        load = Load(
            running=2,
            waiting=1,
            blocks_used=5,
            blocks_cached=7,
            blocks_total=64,
            late_events=3,
            late_kv_reads=1,
            turn_wait_s=0.5,
            turns_forced=2,
            tiers=TierBlocks(redis_unsent=4, redis_rejected=6),
        )
        return (WorkerView(facts, WorkerState.READY, load),)

    async def generate(self, job: Job, timeline: Timeline | None = None) -> AsyncIterator[Delta]:
        self.jobs.append(job)
        self.open += 1
        try:
            async for delta in self._deltas(job):
                yield delta
            self.finished += 1
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _deltas(self, job: Job) -> AsyncIterator[Delta]:
        tokens, finish = self._ending(job)
        made = len(job.generated)
        prompt_logprobs = self._prompt_logprobs(job)
        while True:
            await asyncio.sleep(self.pause_s)
            for limit in [limit for limit in self.fail_after if limit <= made]:
                raise self.fail_after.pop(limit)
            ids = tokens[made : made + self.per_delta]
            last = made + len(ids) >= len(tokens)
            yield Delta(
                offset=made,
                tokens=tuple(self._token(job, made + at, token) for at, token in enumerate(ids)),
                usage=self._usage(job, made + len(ids)),
                finish=finish if last else None,
                prompt_logprobs=prompt_logprobs,
            )
            prompt_logprobs = ()
            made += len(ids)
            if last:
                return

    def _ending(self, job: Job) -> tuple[list[int], FinishReason]:
        tokens = self.script(job)[: job.sampling.max_tokens]
        for at, token in enumerate(tokens):
            if token in job.sampling.stop_token_ids and at + 1 >= job.sampling.min_tokens:
                return tokens[: at + 1], FinishReason.STOP
        assert len(tokens) == job.sampling.max_tokens, "the script is too short"
        return tokens, FinishReason.LENGTH

    def _usage(self, job: Job, made: int) -> Usage:
        return Usage(
            prompt_tokens=len(job.prompt),
            completion_tokens=made,
            cached_tokens=CachedTokens(device=2, host=1),
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            kv_bytes_transferred=1234,
            kv_transport="shm",
        )

    @staticmethod
    def _token(job: Job, at: int, token: int) -> TokenOut:
        count = job.sampling.logprobs
        if count is None:
            return TokenOut(token)
        top = tuple(TopLogprob(token + rank, -0.5 * rank - at, rank + 1) for rank in range(count))
        return TokenOut(token, TokenLogprob(token, -0.25 - at, top))

    @staticmethod
    def _prompt_logprobs(job: Job) -> tuple[TokenLogprob | None, ...]:
        if job.sampling.prompt_logprobs is None:
            return ()
        return (None, *(TokenLogprob(token, float("-inf")) for token in job.prompt[1:]))


@dataclasses.dataclass
class World:
    """Fronts on real sockets, in a thread with an event loop of its own."""

    http: str
    grpc: str
    tokenizer: Tokenizer
    dispatcher: ScriptedDispatcher
    folder: Path
    loop: asyncio.AbstractEventLoop
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def says(self, text: str, *, end: bool = True) -> None:
        """From now on every job is answered with this text (and the end token, over and over)."""
        tokens = self.ids(text)
        tail = [self.dispatcher.eos] * CONTEXT if end else self.ids(" dog") * CONTEXT
        self.dispatcher.script = lambda job: tokens + tail

    def idle(self, seconds: float = 3.0) -> bool:
        """Whether no job is running, after a while at most (what this machine stands still is
        not counted)."""
        with watched() as still:
            end = time.monotonic() + seconds
            while self.dispatcher.open and time.monotonic() < end + still.seconds:
                time.sleep(0.01)
        return self.dispatcher.open == 0

    def busy(self, seconds: float = 3.0) -> bool:
        """Whether a job is running, after a while at most."""
        end = time.monotonic() + seconds
        while not self.dispatcher.open and time.monotonic() < end:
            time.sleep(0.01)
        return self.dispatcher.open > 0


def default_script(job: Job) -> list[int]:
    """Different for every prompt and seed."""
    start = sum(job.prompt) + job.sampling.seed
    return [10 + (start + 7 * at) % 300 for at in range(CONTEXT)]


@contextlib.contextmanager
def running_world(
    folder: Path,
    *,
    router: RouterConfig | None = None,
    security: SecurityConfig | None = None,
    model: ModelConfig | None = None,
    telemetry: TelemetryConfig | None = None,
    grpc_port: int = 0,
    dispatcher: ScriptedDispatcher | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[World]:
    """``tokenizer``: the world's own; the fronts read theirs from the folder."""
    tokenizer = tokenizer or Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    if dispatcher is None:
        dispatcher = ScriptedDispatcher(default_script, tokenizer.get_vocab_size(), eos)
    ports = {"http_port": 0, "grpc_port": grpc_port}
    config = Config(
        router=dataclasses.replace(router or RouterConfig(), **ports),
        security=security or SecurityConfig(),
        model=model or ModelConfig(),
        telemetry=telemetry or TelemetryConfig(),
    )
    boot = RouterBoot(
        config, str(folder), SERVED, mint("token", Caller.ROUTER), b"k" * 32, str(folder)
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    try:
        fronts = call(start_fronts(boot, dispatcher))
        try:
            yield World(
                fronts.http_address, fronts.grpc_address, tokenizer, dispatcher, folder, loop
            )
        finally:
            call(fronts.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
