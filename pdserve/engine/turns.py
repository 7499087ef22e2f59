"""A place among the engines of this host that compute in turns (kernels/turns.h).

    open_turn(slice_s)  -> Turn         a place nobody else holds; or the reason for none
    turn.struct                         for the kernels, which take and give the turn
    turn.close()                        the place is free; so it is when the process ends

All engines of one user that compute on the same cores, in slices of the same length, share one
small file in memory, whatever cluster they belong to. It stays when they are gone. A place is held
by a lock of the open file, which dies with its holder, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from pathlib import Path

from pdserve.errors import ConfigError

PLACES = 64  # mirrored in kernels/turns.h, like what follows
_SIZE = 8 + 8 * PLACES
_VERSION = 1  # of what lies in the file; another one is another file
# Slices that somebody waits, for each who is before him, until he computes in spite of them.
PATIENCE = 5
_LOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class TurnStruct(ctypes.Structure):
    _fields_ = (
        ("turns", ctypes.c_void_p),
        ("place", ctypes.c_int64),
        ("slice", ctypes.c_int64),
        ("patience", ctypes.c_int64),
        ("began", ctypes.c_int64),
        ("waited", ctypes.c_int64),
        ("forced", ctypes.c_int64),
        ("given", ctypes.c_int64),
    )


class Turn:
    """One engine's place. Not to be closed while its engine computes."""

    def __init__(self, fd: int, place: int, slice_s: float) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, _SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory = ctypes.c_char.from_buffer(self._map)
        self._forget_the_dead(place)
        slice_ns = int(slice_s * 1e9)
        self.struct = TurnStruct(
            turns=ctypes.addressof(self._memory),
            place=place,
            slice=slice_ns,
            patience=PATIENCE * slice_ns,
        )

    @property
    def place(self) -> int:
        return int(self.struct.place)

    @property
    def is_taken(self) -> bool:
        """Whether somebody has the turn now. One who died in it does until another takes it.

        Who computes without it is not seen: engines that take no turns, on other cores, or that
        began by force.
        """
        (owner,) = struct.unpack_from("<I", self._map, 0)
        return bool(owner)

    @property
    def waited_s(self) -> float:
        """For others, all in all."""
        return float(self.struct.waited) / 1e9

    @property
    def forced(self) -> int:
        """How often nobody gave the turn in time, and it was taken."""
        return int(self.struct.forced)

    @property
    def given(self) -> int:
        """How often others were let in within a step."""
        return int(self.struct.given)

    def close(self) -> None:
        self.struct.turns = None
        del self._memory
        self._map.close()
        os.close(self._fd)

    def _forget_the_dead(self, place: int) -> None:
        """Whoever had this place before may have died in its turn, or while it waited."""
        struct.pack_into("<q", self._map, 8 + 8 * place, 0)
        (owner,) = struct.unpack_from("<I", self._map, 0)
        if owner == place + 1:
            struct.pack_into("<I", self._map, 0, 0)


def open_turn(slice_s: float, path: Path | None = None) -> Turn:
    """ConfigError says why there is none: the engine then computes whenever it has to."""
    path = path or _shared_path(slice_s)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ConfigError(f"{path} is not this user's alone")
        # Takes the page as well: one that cannot be had must fail here and not when it is written.
        os.posix_fallocate(fd, 0, _SIZE)
        place = _free_place(fd)
        if place is None:
            raise ConfigError(f"{path}: all {PLACES} places are taken")
        return Turn(fd, place, slice_s)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise ConfigError(f"{path}: {error}") from error
    except BaseException:
        os.close(fd)
        raise


def _shared_path(slice_s: float) -> Path:
    """Those who share not the same cores have nothing to wait for."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    shared = hashlib.sha256(f"{_VERSION} {slice_s} {cores}".encode()).hexdigest()[:12]
    return Path(f"/dev/shm/pdserve-turns-{os.getuid()}-{shared}")  # noqa: S108


def _free_place(fd: int) -> int | None:
    """Locks the first place that is free, for as long as ``fd`` is open."""
    for place in range(PLACES):
        with contextlib.suppress(BlockingIOError, PermissionError):
            lock = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
            return place
    return None
