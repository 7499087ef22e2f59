"""Keeps transformers' progress bars and advice out of a log that is ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as _library_logging

# Its functions carry no types.
_library: Any = _library_logging


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
