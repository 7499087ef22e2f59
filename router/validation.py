"""The one validator of every front: a raw request in, jobs with everything resolved out.

check (no I/O, in the order of cost) -> tokenize -> check lengths -> jobs

What a request may hold is decided here and in sampling.py alone, so that both fronts refuse the
same with the same words. Errors are InvalidRequest and its kin, before anything was started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Callable

from pdserve.config import RouterConfig
from pdserve.errors import ContextTooLong, InvalidRequest, ModelNotFound
from pdserve.types import ModelFacts, RequestId, Sampling
from router import fields
from router.api import Job, Principal
from router.messages import check_messages, check_variables
from router.requests import (
    Prepared,
    RawChat,
    RawIds,
    RawPrompt,
    RawRequest,
    RawText,
    TextOptions,
)
from router.sampling import Checked, Limits, check_sampling, child_seed, resolve_length
from router.tokens import TokenService

MAX_ID_CHARS = 128
MAX_SALT_CHARS = 512
MAX_PRIORITY = 2**31 - 1
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})


def combine_salt(principal: Principal, cache_salt: str) -> bytes:
    """Equal for equal pairs alone; empty for nobody in particular without a salt."""
    if not principal.salt and not cache_salt:
        return b""
    digest = hashlib.blake2b(digest_size=16, person=b"cache-salt")
    for part in (principal.salt, cache_salt.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


class Validator:
    """``facts``: what the workers found out about the model; None until one was seen."""

    def __init__(
        self, config: RouterConfig, tokens: TokenService, facts: Callable[[], ModelFacts | None]
    ) -> None:
        self._config = config
        self._tokens = tokens
        self._facts = facts

    def limits(self) -> Limits:
        """Workers know best; until one was seen, the model's files."""
        model = self._tokens.model
        facts = self._facts()
        return Limits(
            vocab_size=model.vocab_size if facts is None else facts.vocab_size,
            max_model_len=model.max_model_len if facts is None else facts.max_model_len,
            eos_ids=self._tokens.eos_ids,
            defaults=model.defaults,
        )

    async def prepare(self, raw: RawRequest, principal: Principal, deadline: float) -> Prepared:
        """``deadline``: seconds of time.monotonic()."""
        self.check_model(raw.fields.get("model"))
        limits = self.limits()
        checked = check_sampling(raw, limits, self._config)
        if checked.text.stop and self._tokens.pieces is None:
            raise InvalidRequest("stop: this model has no tokenizer to make text", param="stop")
        count = len(raw.prompts)
        identity = self._identity(raw, principal, deadline)
        generated = self._generated(raw, checked.n * count, limits)
        encoded = [await self._encode(prompt, limits) for prompt in raw.prompts]
        jobs: list[Job] = []
        for prompt, (ids, _) in zip(raw.prompts, encoded, strict=True):
            sampling = self._sampling(raw, prompt, checked, ids, generated, limits)
            for index in range(checked.n):
                jobs.append(
                    dataclasses.replace(
                        identity,
                        request_id=_child_id(identity.request_id, len(jobs), checked.n * count),
                        prompt=ids,
                        sampling=dataclasses.replace(
                            sampling, seed=child_seed(sampling.seed, index)
                        ),
                        generated=generated,
                    )
                )
        return Prepared(
            jobs=tuple(jobs),
            text=_with_context(checked.text, raw.prompts),
            n=checked.n,
            request_id=identity.request_id,
            prompt_texts=tuple(text for _, text in encoded),
        )

    def check_model(self, value: object) -> None:
        """Absent and empty accept the served model."""
        name = fields.string("model", value) if value is not None else ""
        served = self._tokens.model.name
        if name and name != served:
            raise ModelNotFound(
                f"model: {fields.show(name)} is not served here; {served!r} is", param="model"
            )

    async def encode(self, prompt: RawPrompt) -> tuple[int, ...]:
        """The prompt's token ids, for clients that ask for nothing else."""
        return (await self._encode(prompt, self.limits()))[0]

    def token_ids(self, name: str, value: object) -> tuple[int, ...]:
        return fields.token_ids(name, value, self.limits().vocab_size)

    def _identity(self, raw: RawRequest, principal: Principal, deadline: float) -> Job:
        """A job without a prompt: all that every choice of the request has in common."""
        given = raw.fields.get("request_id")
        request_id = (
            uuid.uuid4().hex
            if given is None or given == ""
            else fields.printable_id(raw.label("request_id"), given, MAX_ID_CHARS)
        )
        salt = raw.fields.get("cache_salt")
        cache_salt = (
            "" if salt is None else fields.string("cache_salt", salt, max_chars=MAX_SALT_CHARS)
        )
        priority = raw.fields.get("priority")
        resume = raw.fields.get("resume")
        return Job(
            request_id=RequestId(request_id),
            principal=principal,
            prompt=(),
            sampling=Sampling(max_tokens=0),
            deadline=deadline,
            salt=combine_salt(principal, cache_salt),
            priority=0
            if priority is None
            else fields.integer("priority", priority, -MAX_PRIORITY, MAX_PRIORITY),
            resume=False if resume is None else fields.boolean("resume", resume),
        )

    def _generated(self, raw: RawRequest, choices: int, limits: Limits) -> tuple[int, ...]:
        value = raw.fields.get("generated_token_ids")
        name = "generated_token_ids"
        generated = () if value is None else fields.token_ids(name, value, limits.vocab_size)
        resume = raw.fields.get("resume")
        if choices > 1 and (generated or resume):
            raise InvalidRequest(
                f"{name if generated else 'resume'}: only a request for one sequence can be "
                f"resumed, this one is for {choices}",
                param=name if generated else "resume",
            )
        return generated

    def _sampling(
        self,
        raw: RawRequest,
        prompt: RawPrompt,
        checked: Checked,
        ids: tuple[int, ...],
        generated: tuple[int, ...],
        limits: Limits,
    ) -> Sampling:
        length = resolve_length(checked, len(ids), limits, raw, prompt.name)
        if len(ids) + len(generated) > limits.max_model_len:
            raise ContextTooLong(
                f"generated_token_ids: {len(generated)} tokens after a prompt of {len(ids)} are "
                f"more than the model's context of {limits.max_model_len}",
                param="generated_token_ids",
            )
        return dataclasses.replace(checked.base, max_tokens=length)

    async def _encode(
        self, prompt: RawPrompt, limits: Limits
    ) -> tuple[tuple[int, ...], str | None]:
        """Ids, and the text they came from."""
        if isinstance(prompt, RawIds):
            _check_count(prompt, limits)
            ids = fields.token_ids(prompt.name, prompt.ids, limits.vocab_size)
            text = None
        else:
            text, special = await self._text(prompt)
            ids = await self._tokens.encode(
                prompt.name, text, add_special_tokens=special, limit=limits.max_model_len
            )
            self._check_vocabulary(prompt.name, ids, limits)
        if not ids:
            raise InvalidRequest(f"{prompt.name}: must not be empty", param=prompt.name)
        return ids, text

    @staticmethod
    def _check_vocabulary(name: str, ids: tuple[int, ...], limits: Limits) -> None:
        """A tokenizer may know more pieces than the model has embeddings for."""
        if ids and max(ids) >= limits.vocab_size:
            raise InvalidRequest(
                f"{name}: its tokenizer made token {max(ids)}, which is outside the model's "
                f"vocabulary of {limits.vocab_size}",
                param=name,
            )

    async def _text(self, prompt: RawText | RawChat) -> tuple[str, bool]:
        """The prompt's text, and whether special tokens are to be added to it."""
        special = prompt.add_special_tokens
        if isinstance(prompt, RawText):
            text = fields.string(prompt.name, prompt.text, empty=False)
            return text, True if special is None else fields.boolean("add_special_tokens", special)
        messages = check_messages(prompt.name, prompt.messages)
        goes_on = _flag("continue_final_message", prompt.continue_final_message, False)
        opens = _flag("add_generation_prompt", prompt.add_generation_prompt, not goes_on)
        if goes_on and opens:
            raise InvalidRequest(
                "continue_final_message: cannot be combined with add_generation_prompt",
                param="continue_final_message",
            )
        text = await self._tokens.render(
            prompt.name,
            messages,
            add_generation_prompt=opens,
            continue_final_message=goes_on,
            variables=check_variables("chat_template_kwargs", prompt.template_kwargs, _RESERVED),
        )
        return text, _flag("add_special_tokens", special, False)


def _check_count(prompt: RawIds, limits: Limits) -> None:
    """Before a list is walked through: it may be as long as the longest body."""
    if isinstance(prompt.ids, (list, tuple)) and len(prompt.ids) > limits.max_model_len:
        raise ContextTooLong(
            f"{prompt.name}: {len(prompt.ids)} tokens are more than the model's context of "
            f"{limits.max_model_len} tokens",
            param=prompt.name,
        )


def _flag(name: str, value: object, default: bool) -> bool:
    return default if value is None else fields.boolean(name, value)


def _child_id(request_id: str, index: int, choices: int) -> RequestId:
    return RequestId(request_id if choices == 1 else f"{request_id}-{index}")


def _with_context(options: TextOptions, prompts: tuple[RawPrompt, ...]) -> TextOptions:
    """A chat's answer is a text of its own, unless it continues the final message."""
    return dataclasses.replace(
        options,
        continues=any(
            not isinstance(prompt, RawChat) or bool(prompt.continue_final_message)
            for prompt in prompts
        ),
    )
