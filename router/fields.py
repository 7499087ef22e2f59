"""Checks of single request fields: an unchecked value in, a value of the right type out.

Values come from JSON or from protobuf, so they are None, bool, int, float, str, list or dict, in
any combination. Each check raises InvalidRequest with the field's name as ``param`` and a text that
names the field, the value and what is allowed. Nothing here knows which fields there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pdserve.errors import InvalidRequest

SHOWN = 60


def show(value: object) -> str:
    """The value as an error may quote it: short, on one line, printable everywhere."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"  # more digits than Python will print
    head = value[: SHOWN + 1] if isinstance(value, (str, list)) else value
    text = ascii(head)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def refuse(name: str, value: object, allowed: str) -> InvalidRequest:
    """The error for a field's value; the caller raises it."""
    return InvalidRequest(f"{name}: {show(value)} is not {allowed}", param=name)


def integer(name: str, value: object, low: int, high: int) -> int:
    """JSON has one kind of number, so 5.0 is an integer; true is not."""
    allowed = f"an integer from {low} to {high}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(name, value, allowed)
    return value


def digits(name: str, text: str, low: int, high: int) -> int:
    """A whole number in a query string: nothing but ASCII digits."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(high))):
        raise refuse(name, text, f"a whole number from {low} to {high}")
    return integer(name, int(text), low, high)


def number(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """``above``: the lower bound itself is not allowed."""
    bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    allowed = f"a number {bounds}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refuse(name, value, allowed)
    if not low <= value <= high or (above and value == low) or not math.isfinite(value):
        raise refuse(name, value, allowed)
    return float(value)


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "true or false")
    return value


def string(name: str, value: object, *, max_chars: int | None = None, empty: bool = True) -> str:
    """Text that is legal UTF-8 once encoded: JSON's escapes can spell lone surrogates."""
    if not isinstance(value, str):
        raise refuse(name, value, "a string")
    if not value and not empty:
        raise InvalidRequest(f"{name}: must not be empty", param=name)
    if max_chars is not None and len(value) > max_chars:
        raise InvalidRequest(
            f"{name}: {len(value)} characters are more than the {max_chars} allowed", param=name
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name}: not valid Unicode, a lone surrogate at character {error.start}", param=name
        ) from None
    return value


def printable_id(name: str, value: object, max_chars: int) -> str:
    """An identifier that logs, headers and metadata can carry as it is."""
    text = string(name, value, max_chars=max_chars, empty=False)
    if not text.isascii() or not text.isprintable() or " " in text:
        raise refuse(name, text, "made of printable ASCII without spaces")
    return text


def token_ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """A list of ids below ``vocab_size``; the error names the first one that is not."""
    if not isinstance(value, (list, tuple)):
        raise refuse(name, value, "a list of token ids")
    for item in value:
        # Exact type: bool is a subclass of int.
        if type(item) is not int or not 0 <= item < vocab_size:
            at = next(index for index, other in enumerate(value) if other is item)
            raise refuse(
                f"{name}[{at}]", item, f"a token id from 0 to {vocab_size - 1} of this model"
            )
    return tuple(value)


def string_list(name: str, value: object, *, max_items: int, max_chars: int) -> tuple[str, ...]:
    """One non-empty string or a list of them."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise refuse(name, value, "a string or a list of strings")
    if len(items) > max_items:
        raise InvalidRequest(
            f"{name}: {len(items)} strings are more than the {max_items} allowed", param=name
        )
    single = isinstance(value, str)
    return tuple(
        string(name if single else f"{name}[{at}]", item, max_chars=max_chars, empty=False)
        for at, item in enumerate(items)
    )


def bias(
    name: str, value: object, vocab_size: int, *, max_items: int, largest: float
) -> tuple[tuple[int, float], ...]:
    """A mapping of token ids (JSON spells them as strings) to numbers, sorted by id."""
    if not isinstance(value, Mapping):
        raise refuse(name, value, "an object of token ids and numbers")
    if len(value) > max_items:
        raise InvalidRequest(
            f"{name}: {len(value)} entries are more than the {max_items} allowed", param=name
        )
    result: dict[int, float] = {}
    for key, amount in value.items():
        token = _bias_key(name, key, vocab_size)
        if token in result:
            raise InvalidRequest(f"{name}: token id {token} is given twice", param=name)
        result[token] = number(f"{name}[{token}]", amount, -largest, largest)
    return tuple(sorted(result.items()))


def _bias_key(name: str, key: object, vocab_size: int) -> int:
    token = key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        token = int(key)
    if type(token) is not int or not 0 <= token < vocab_size:
        raise refuse(
            f"{name}[{show(key).strip(chr(39))}]",
            key,
            f"a token id from 0 to {vocab_size - 1} of this model",
        )
    return token
