"""What the disk itself gives: files read from front to back by one plain loop, nothing kept.

Measured faster here than reads past the page cache, four at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PIECE = 8 * 2**20


def read_through(files: Sequence[Path]) -> int:
    """Bytes read, in order."""
    buffer = bytearray(PIECE)
    count = 0
    for path in files:
        with path.open("rb", 0) as file:
            while read := file.readinto(buffer):
                count += read
    return count


def forget(files: Sequence[Path]) -> None:
    """Drops the files' pages from the page cache, those that nobody has mapped."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
