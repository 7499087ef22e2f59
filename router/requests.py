"""A request before and after validation, the same for every front.

front:      bytes -> RawRequest     (openai_fields, grpc_requests: which field means what)
validation: RawRequest -> Prepared  (limits, defaults, tokens)
front:      Prepared -> one stream of text for each job

A raw value is whatever JSON or protobuf held; nothing about it may be taken for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from router.api import Job


@dataclass(frozen=True, slots=True)
class RawText:
    name: str  # the field as the client knows it, e.g. prompt[2]
    text: object
    add_special_tokens: object = None  # None: true


@dataclass(frozen=True, slots=True)
class RawIds:
    name: str
    ids: object


@dataclass(frozen=True, slots=True)
class RawChat:
    name: str
    messages: object
    add_generation_prompt: object = None  # None: true, unless the final message is continued
    continue_final_message: object = None
    template_kwargs: object = None
    add_special_tokens: object = None  # None: false, templates write their own


RawPrompt = RawText | RawIds | RawChat


@dataclass(frozen=True, slots=True)
class RawRequest:
    """``fields`` holds sampling and identity by the names of the proto; absent and None are one."""

    prompts: tuple[RawPrompt, ...]
    fields: Mapping[str, object]
    # None: what is left of the context.
    default_max_tokens: int | None = None
    # Our names -> the client's, where they differ.
    labels: Mapping[str, str] = field(default_factory=dict)

    def label(self, name: str) -> str:
        return self.labels.get(name, name)


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text; a function of these and of the token ids alone."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    # The text goes on where the prompt's text ended (its first space counts); a chat's answer
    # starts a text of its own.
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """Jobs in the order of their choices: all of the first prompt, then all of the second."""

    jobs: tuple[Job, ...]
    text: TextOptions
    n: int
    request_id: str
    # The text of each prompt as it was given or rendered; None where token ids came.
    prompt_texts: tuple[str | None, ...]
