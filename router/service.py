"""What every front offers, once: validation, tokens and the dispatcher behind one small face."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pdserve.config import RouterConfig
from router.api import Dispatcher, Job, Principal
from router.requests import Prepared, RawRequest, TextOptions
from router.text import TextDelta, stream_text
from router.tokens import TokenService
from router.validation import Validator


class Service:
    def __init__(self, config: RouterConfig, tokens: TokenService, dispatcher: Dispatcher) -> None:
        self.config = config
        self.tokens = tokens
        self.dispatcher = dispatcher
        self.validator = Validator(config, tokens, dispatcher.model)

    async def prepare(self, raw: RawRequest, principal: Principal, deadline: float) -> Prepared:
        """Raises InvalidRequest and its kin; starts nothing."""
        return await self.validator.prepare(raw, principal, deadline)

    def stream(self, job: Job, options: TextOptions) -> AsyncGenerator[TextDelta, None]:
        """One job's text; closing the generator cancels the job."""
        return stream_text(job, options, self.dispatcher, self.tokens)
