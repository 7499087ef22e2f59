"""A job's tokens as text: detokenized, cut at stop strings, ended exactly once. For every front.

replay(generated) -> [Delta -> TextDelta]* -> finish

The text after k tokens is a function of those k token ids and the options alone: not of how they
were batched, nor of whether a resume lies between them. So a resumed stream replays the earlier
tokens silently and goes on with the very next character. At a stop string the dispatcher's iterator
is closed, which cancels the job on its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import cast

from pdserve.errors import DeadlineExceeded, InternalError
from pdserve.types import FinishReason, TokenLogprob, TokenOut, Usage
from router.api import Delta, Dispatcher, Job
from router.detokenize import CONTEXT_IDS
from router.requests import TextOptions
from router.stop import Shown, StopMatcher
from router.timelines import Timeline
from router.tokens import TokenService

# The dispatcher ends a job at its deadline with a reason; this is how long it may take to do so.
GRACE_S = 1.0
# Longer replays run on the tokenizer's threads.
LONG_REPLAY = 256
# Special tokens between the prompt's text and its end, e.g. those that a template closes with.
_CONTEXT_WINDOW = 4 * CONTEXT_IDS


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Like Delta, with the text that became certain; the last one alone has ``finish``."""

    offset: int
    tokens: tuple[TokenOut, ...]
    text: str
    usage: Usage
    finish: FinishReason | None = None
    stop_string: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class Assembler:
    """One sequence's text so far. Synchronous and free of I/O."""

    def __init__(self, job: Job, options: TextOptions, tokens: TokenService) -> None:
        self._sampling = job.sampling
        self._include_stop = options.include_stop
        context = job.prompt[-_CONTEXT_WINDOW:] if options.continues else ()
        self._decoder = tokens.detokenizer(
            skip_special=options.skip_special_tokens, context=context
        )
        self._matcher = StopMatcher(options.stop, include=options.include_stop)
        self._count = 0

    @property
    def count(self) -> int:
        """Generated tokens that became part of the answer."""
        return self._count

    def replay(self, generated: tuple[int, ...]) -> str | None:
        """Takes tokens whose text the client has; the stop string that they end with, if any."""
        for token in generated:
            stop = self._token(token).stop
            if stop is not None:
                return stop
        return None

    def feed(self, delta: Delta) -> TextDelta:
        pieces: list[str] = []
        for at, token in enumerate(delta.tokens, 1):
            last = delta.finish is FinishReason.STOP and at == len(delta.tokens)
            if last and not self._include_stop and token.token_id in self._sampling.stop_token_ids:
                self._count += 1  # the token that ends the sequence has no text
                continue
            shown = self._token(token.token_id)
            pieces.append(shown.text)
            if shown.stop is not None:
                return self._stopped(delta, at, "".join(pieces), shown.stop)
        if delta.finish is not None:
            rest = self._end()
            pieces.append(rest.text)
            if rest.stop is not None:
                return self._stopped(delta, len(delta.tokens), "".join(pieces), rest.stop)
            pieces.append(self._matcher.flush())
        return TextDelta(
            offset=delta.offset,
            tokens=delta.tokens,
            text="".join(pieces),
            usage=delta.usage,
            finish=delta.finish,
            prompt_logprobs=delta.prompt_logprobs,
        )

    def _token(self, token: int) -> Shown:
        self._count += 1
        text = "" if self._decoder is None else self._decoder.feed(token)
        return self._matcher.feed(text, may_stop=self._may_stop())

    def _end(self) -> Shown:
        text = "" if self._decoder is None else self._decoder.flush()
        return self._matcher.feed(text, may_stop=self._may_stop())

    def _may_stop(self) -> bool:
        return self._count >= self._sampling.min_tokens

    def _stopped(self, delta: Delta, tokens: int, text: str, stop: str) -> TextDelta:
        return TextDelta(
            offset=delta.offset,
            tokens=delta.tokens[:tokens],
            text=text,
            usage=dataclasses.replace(delta.usage, completion_tokens=self._count),
            finish=FinishReason.STOP,
            stop_string=stop,
            prompt_logprobs=delta.prompt_logprobs,
        )


async def stream_text(
    job: Job,
    options: TextOptions,
    dispatcher: Dispatcher,
    tokens: TokenService,
    timeline: Timeline | None = None,
) -> AsyncGenerator[TextDelta, None]:
    """Raises PdserveError before or between deltas; closing the iterator cancels the job."""
    assembler = Assembler(job, options, tokens)
    if len(job.generated) > LONG_REPLAY:
        stop = await tokens.run(assembler.replay, job.generated)
    else:
        stop = assembler.replay(job.generated)
    if stop is not None:
        usage = Usage(prompt_tokens=len(job.prompt), completion_tokens=assembler.count)
        yield TextDelta(len(job.generated), (), "", usage, FinishReason.STOP, stop)
        return
    deltas = cast(AsyncGenerator[Delta, None], dispatcher.generate(job, timeline))
    async with contextlib.aclosing(deltas):
        while True:
            delta = await _next(deltas, job)
            result = assembler.feed(delta)
            yield result
            if result.finish is not None:
                return


async def _next(deltas: AsyncGenerator[Delta, None], job: Job) -> Delta:
    """Never waits past the deadline, whatever became of the parts below."""
    end = asyncio.get_running_loop().time() + (job.deadline - time.monotonic()) + GRACE_S
    try:
        async with asyncio.timeout_at(end) as scope:
            return await anext(deltas)
    except StopAsyncIteration:
        raise InternalError("the stream of tokens ended without a finish reason") from None
    except TimeoutError:
        if not scope.expired():
            raise
        raise DeadlineExceeded("the request's deadline passed") from None
