"""Chats to text: the model's Jinja template in a sandbox, as transformers would render it.

compile once -> render(messages) on a thread of the tokenizer's pool -> text, or InvalidRequest

Templates come with models and see text of clients, so both are kept small: only plain JSON values
go in; attributes that lead into the interpreter are closed; repetition, ranges, output and time are
limited. Whatever a template raises becomes InvalidRequest.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from pdserve.errors import ConfigError, InvalidRequest

MAX_SECONDS = 5.0
MAX_RANGE_ITEMS = 100_000
MAX_POWER = 64
# Of one template value, and of the whole text beside what the messages themselves are long.
MAX_CHARS = 1 << 20
# What the end of a continued message is marked by; no template has a reason to write it.
_MARK = "\x00pdserve-continue\x00"

# A width of %-formatting that is long, or that is an argument.
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)")

_ranges_left: ContextVar[int] = ContextVar("ranges_left", default=MAX_RANGE_ITEMS)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` without names that reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """``dict()`` as a function only: the class itself would open its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            _check_repeat(left, right)
        elif operator == "**" and abs(right) > MAX_POWER:
            raise jinja2.exceptions.SecurityError(f"the exponent {right} is too large")
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise jinja2.exceptions.SecurityError("a formatted value would be too long")
        return super().call_binop(context, operator, left, right)


def _check_repeat(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if (
            isinstance(text, (str, list, tuple))
            and isinstance(times, int)
            and len(text) * times > MAX_CHARS
        ):
            raise jinja2.exceptions.SecurityError("a repeated value would be too long")


def _limited_range(*args: int) -> range:
    """All ranges of one rendering share one budget, so that nested loops end as well."""
    result = range(*args)
    left = _ranges_left.get() - len(result)
    if left < 0:
        raise jinja2.exceptions.SecurityError("the template's ranges are too long")
    _ranges_left.set(left)
    return result


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, escapes nothing for HTML: models were not trained on that."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as models expect it


def _environment() -> jinja2.Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # the output is a prompt, not a page
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        namespace=_Namespace,
        dict=_Dict(),
        range=_limited_range,
    )
    return environment


class ChatTemplate:
    """One compiled template; ``render`` is safe to call from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """``variables``: plain JSON values under names that the template may look at."""
        if continue_final_message:
            messages = [*messages[:-1], _marked(messages[-1])]
        text = self._run(
            {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **variables,
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
            },
            limit=MAX_CHARS + 4 * sum(len(message["content"]) for message in messages),
        )
        return _before_mark(text) if continue_final_message else text

    def _run(self, values: dict[str, Any], limit: int) -> str:
        pieces: list[str] = []
        length = 0
        end = time.monotonic() + MAX_SECONDS
        with _template_errors():
            for piece in self._template.generate(values):
                pieces.append(piece)
                length += len(piece)
                if length > limit or time.monotonic() > end:
                    raise InvalidRequest(
                        "messages: the chat template wrote too much or ran too long",
                        param="messages",
                    )
        return "".join(pieces)


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    token = _ranges_left.set(MAX_RANGE_ITEMS)
    try:
        yield
    except InvalidRequest:
        raise
    except jinja2.TemplateError as error:
        # Templates explain themselves, e.g. "roles must alternate".
        raise InvalidRequest(
            f"messages: the model's chat template refuses them: {str(error)[:300]}",
            param="messages",
        ) from error
    except Exception as error:
        raise InvalidRequest(
            f"messages: the model's chat template fails on them ({type(error).__name__})",
            param="messages",
        ) from error
    finally:
        _ranges_left.reset(token)


def _marked(message: dict[str, str]) -> dict[str, str]:
    return {**message, "content": message["content"] + _MARK}


def _before_mark(text: str) -> str:
    at = text.rfind(_MARK)
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not keep the end of the "
            "final message",
            param="continue_final_message",
        )
    return text[:at]
