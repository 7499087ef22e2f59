"""Keeps what a process makes while it starts out of the sight of Python's cyclic collector.

    with starting_up():  ...        what is made here is looked at once, at the end, and never again

Libraries leave some hundred thousand objects that live as long as the process. A full collection
looks at all of them, and every stream of the process stands still meanwhile. What is made
afterwards is collected as ever. For entry points of processes alone: whoever starts and stops parts
of ours in one process would keep their remains.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def starting_up() -> Iterator[None]:
    gc.disable()
    try:
        yield
        gc.collect()  # what is garbage by now would stay for ever
        gc.freeze()
    finally:
        gc.enable()
