"""What every front offers, once: validation, tokens, metrics and the dispatcher behind one face.

with accepting(): parse, prepare      a request is refused, and counted, or accepted
async for delta in stream(job, ...)   it is timed, and ends exactly once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

from pdserve.config import RouterConfig
from pdserve.errors import Cancelled, DeadlineExceeded, InternalError, PdserveError
from pdserve.telemetry.metrics import RequestTimer, RouterMetrics
from pdserve.telemetry.trace_context import TraceContext, new_trace
from router.api import Dispatcher, Job, Principal
from router.requests import Prepared, RawRequest, TextOptions
from router.text import TextDelta, stream_text
from router.timelines import Timelines
from router.tokens import TokenService
from router.validation import Validator

log = logging.getLogger(__name__)


class Service:
    def __init__(
        self,
        config: RouterConfig,
        tokens: TokenService,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        timelines: Timelines,
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.timelines = timelines
        self.validator = Validator(config, tokens, dispatcher.model)
        self._preparing = 0  # requests that may soon take a place

    @contextlib.contextmanager
    def accepting(self) -> Iterator[None]:
        """Around all that happens before a request is accepted."""
        started = time.monotonic()
        try:
            yield
        except PdserveError as error:
            self.metrics.rejected(error.code, time.monotonic() - started)
            raise

    async def prepare(
        self,
        raw: RawRequest,
        principal: Principal,
        deadline: float,
        trace: TraceContext | None = None,
    ) -> Prepared:
        """Raises InvalidRequest and its kin; starts nothing. ``trace`` None begins a new one.

        A request that would find no place is refused before anything is tokenized for it; one that
        takes over another needs none.
        """
        if not raw.fields.get("resume"):
            self.dispatcher.check_room(max(1, len(raw.prompts)), self._preparing)
        begun, trace = time.monotonic(), trace or new_trace()
        self._preparing += 1
        try:
            async with asyncio.timeout_at(_loop_time(deadline)) as scope:
                prepared = await self.validator.prepare(raw, principal, deadline)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded("the deadline passed before the prompt was read") from None
        finally:
            self._preparing -= 1
        jobs = tuple(replace(job, begun=begun, trace=trace) for job in prepared.jobs)
        return replace(prepared, jobs=jobs)

    async def stream(self, job: Job, options: TextOptions) -> AsyncGenerator[TextDelta, None]:
        """One job's text; closing the generator cancels the job."""
        timer = self.metrics.request_started()
        extra = {"request_id": job.request_id}
        timeline = self.timelines.open(job)
        deltas = stream_text(job, options, self.dispatcher, self.tokens, timeline)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    _measure(timer, delta)
                    if delta.finish is not None:
                        timeline.finish(delta.finish, delta.usage)
                        log.info(
                            "finished: %s, %s", delta.finish.value, _figures(delta), extra=extra
                        )
                    yield delta
        except PdserveError as error:
            timer.failed(error.code)
            timeline.fail(error.code)
            log.warning("failed: %s: %s", error.code, error, extra=extra)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            timer.failed(Cancelled.code)
            timeline.cancel()
            raise
        except Exception:
            timer.failed(InternalError.code)
            timeline.fail(InternalError.code)
            raise
        finally:
            self.timelines.close(timeline)


def _loop_time(deadline: float) -> float:
    """A moment of time.monotonic() on the event loop's clock."""
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


def _measure(timer: RequestTimer, delta: TextDelta) -> None:
    timer.tokens(len(delta.tokens))
    if delta.finish is not None:
        timer.finished(delta.finish, delta.usage)


def _figures(delta: TextDelta) -> str:
    usage = delta.usage
    return (
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens.total} cached), "
        f"{usage.completion_tokens} answered by {usage.decode_worker or 'nobody'}"
    )
