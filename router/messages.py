"""Chat messages as clients send them, checked and reduced to what templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdserve.errors import InvalidRequest, Unsupported
from router import fields

MAX_MESSAGES = 4096
MAX_NAME_CHARS = 256

# The second name is what templates know the first by.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_READ = frozenset({"role", "content", "name"})
# Fields of answers that clients send back as they got them; empty ones say nothing.
_MUST_BE_EMPTY = frozenset(
    {
        "refusal",
        "audio",
        "function_call",
        "tool_calls",
        "tool_call_id",
        "annotations",
        "reasoning_content",
        "reasoning",
        "prefix",
    }
)


def check_messages(name: str, value: object) -> list[dict[str, str]]:
    """Raises InvalidRequest (Unsupported for tools, images and the like), naming the message."""
    if not isinstance(value, (list, tuple)):
        raise fields.refuse(name, value, "a list of messages")
    if not value:
        raise InvalidRequest(f"{name}: must not be empty", param=name)
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(
            f"{name}: {len(value)} messages are more than the {MAX_MESSAGES} allowed", param=name
        )
    return [_message(f"{name}[{at}]", item) for at, item in enumerate(value)]


def _message(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise fields.refuse(name, value, "an object with role and content")
    for key, item in value.items():
        if key in _MUST_BE_EMPTY:
            if item:
                raise Unsupported(f"{name}.{key}: is not supported", param=f"{name}.{key}")
        elif key not in _READ:
            raise InvalidRequest(
                f"{name}: {fields.show(key)} is not a field of a message", param=name
            )
    result = {
        "role": _role(f"{name}.role", value.get("role")),
        "content": _content(f"{name}.content", value.get("content")),
    }
    author = value.get("name")
    if author:
        result["name"] = fields.string(f"{name}.name", author, max_chars=MAX_NAME_CHARS)
    elif author is not None and author != "":
        raise fields.refuse(f"{name}.name", author, "a string")
    return result


def _role(name: str, value: object) -> str:
    if value in ("tool", "function"):
        raise Unsupported(f"{name}: tools are not supported", param=name)
    role = _ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise fields.refuse(name, value, "one of system, developer, user, assistant")
    return role


def _content(name: str, value: object) -> str:
    """A string, or a list of text parts, which become lines."""
    if not isinstance(value, (list, tuple)):
        return fields.string(name, value)
    if not value:
        raise InvalidRequest(f"{name}: must not be empty", param=name)
    return "\n".join(_part(f"{name}[{at}]", part) for at, part in enumerate(value))


def _part(name: str, value: object) -> str:
    if not isinstance(value, Mapping):
        raise fields.refuse(name, value, "an object with type and text")
    kind = value.get("type")
    if kind != "text":
        if isinstance(kind, str) and kind:
            raise Unsupported(
                f"{name}.type: {fields.show(kind)} is not supported, text is", param=f"{name}.type"
            )
        raise fields.refuse(f"{name}.type", kind, "'text'")
    return fields.string(f"{name}.text", value.get("text"))


def check_variables(name: str, value: object, reserved: frozenset[str]) -> dict[str, Any]:
    """chat_template_kwargs: plain values under names that templates may look at."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > 64:
        raise fields.refuse(name, value, "an object of at most 64 values")
    result: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str) or not key.isidentifier() or key in reserved:
            raise fields.refuse(
                f"{name}.{fields.show(key)}", key, "a name that a template may read"
            )
        if item is not None and not isinstance(item, (bool, int, float)):
            fields.string(f"{name}.{key}", item, max_chars=4096)
        result[key] = item
    return result
