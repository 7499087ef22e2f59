"""Calling transformers without its bars and advice in our log, and what it raises as one line."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as _library_logging

# Its functions carry no types.
_library: Any = _library_logging

# All that reading a folder or a file can make the library raise: each means that it cannot be read.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    struct.error,
)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors are still logged. The settings are the process's, so not for two threads at once."""
    level, bars = _library.get_verbosity(), _library.is_progress_bar_enabled()
    _library.set_verbosity(logging.ERROR)
    _library.disable_progress_bar()
    try:
        yield
    finally:
        _library.set_verbosity(level)
        if bars:
            _library.enable_progress_bar()
