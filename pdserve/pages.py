"""Large memory, and taking its pages from the system before a request needs them.

    memory = arena(rows, row_bytes)     address space; no page of it is taken yet
    take_pages(memory)                  in the background, a piece at a time, until all are taken

The first write to a page that the system has not given yet waits until it is found and zeroed. On a
virtual machine that was measured at 0.7 GB/s, which an engine's step or a tier's copy would pay
for (docs/performance.md). Taking pages changes no byte, so it may run while the memory is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_logger = logging.getLogger(__name__)

# Linux 5.14; Python has no name for it.
_MADV_POPULATE_WRITE = 23
_AGAIN = (errno.EINTR, errno.EAGAIN)
# The kernel holds the address space's lock for one piece; others may be waiting for it.
_PIECE_BYTES = 2**16
# Added to the process's: whoever computes goes first; memory is taken before they come, or beside.
_NICENESS = 10
_NICEST = 19


def arena(rows: int, row_bytes: int) -> Bytes:
    """[rows, row_bytes], private, zero until written. OSError when the system refuses it."""
    if rows == 0:
        return np.empty((0, row_bytes), dtype=np.uint8)
    memory = mmap.mmap(-1, rows * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8).reshape(rows, row_bytes)


def take_pages(memory: Bytes) -> threading.Thread:
    """Starts a thread that takes all pages of ``memory`` (contiguous) and ends.

    Where the system cannot, pages are taken as they are first written. The thread keeps the memory.
    """
    thread = threading.Thread(target=_take, args=(memory,), name="take-pages", daemon=True)
    thread.start()
    return thread


def _take(memory: Bytes) -> None:
    me = threading.get_native_id()
    with contextlib.suppress(OSError):  # as urgent as the others then
        wanted = min(_NICEST, os.getpriority(os.PRIO_PROCESS, me) + _NICENESS)
        os.setpriority(os.PRIO_PROCESS, me, wanted)
    # Unlike mmap.madvise it does not hold the GIL.
    advise = ctypes.CDLL(None, use_errno=True).madvise
    begin = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    end = memory.ctypes.data + memory.nbytes
    for piece in range(begin, end, _PIECE_BYTES):
        size = min(_PIECE_BYTES, end - piece)
        while advise(ctypes.c_void_p(piece), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            if error not in _AGAIN:
                left = (end - piece) >> 20
                _logger.info("pages come as they are used, %d MiB: %s", left, os.strerror(error))
                return
