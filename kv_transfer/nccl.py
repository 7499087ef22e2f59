"""Links of two ranks over NCCL's C library, set up and ended within bounds.

    CONNECTING -> UP -> ABORTED

Every communicator is non-blocking: no call waits for the peer, progress is polled through
ncclCommGetAsyncError, and a peer that never comes is given up by ncclCommAbort. A link lives and
dies on one thread.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kv_transfer.cudart import loaded_library
from kv_transfer.slots import READER_RANK, SERVER_RANK, LinkFactory
from kv_transfer.wire import LINK_ID_BYTES
from pdserve.engine.memory import MemoryKind, PoolMemory
from pdserve.errors import DeadlineExceeded, TransferError

_log = logging.getLogger(__name__)

_SUCCESS = 0
_IN_PROGRESS = 7
_UINT8 = 1
_UNSET = -(2**31)  # NCCL_CONFIG_UNDEF_INT
_MAGIC = 0xCAFEBEEF
# The layout below is that of 2.17; the library reads ``size`` bytes and takes later fields as
# unset, so it works with every later one.
_CONFIG_VERSION = 21700
# Two ranks on one GPU are refused unless this is set to 1 in both processes. 2.32.3 knows it; of
# earlier ones it is reported that 2.28 does not and 2.30 does.
MULTI_RANK_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
MULTI_RANK_SINCE = 23000
_POLL_SECONDS = 0.0005
# Enqueuing an operation is local work once both ranks are connected.
_ENQUEUE_SECONDS = 10.0


class UniqueId(ctypes.Structure):
    """ncclUniqueId; passed by value."""

    _fields_ = (("internal", ctypes.c_ubyte * LINK_ID_BYTES),)


class Config(ctypes.Structure):
    """The start of ncclConfig_t."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


def nonblocking_config() -> Config:
    return Config(
        size=ctypes.sizeof(Config),
        magic=_MAGIC,
        version=_CONFIG_VERSION,
        blocking=0,
        cga_cluster_size=_UNSET,
        min_ctas=_UNSET,
        max_ctas=_UNSET,
        net_name=None,
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """NCCL, preferably the copy that torch has loaded; None when there is none."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        comm = ctypes.c_void_p
        library.ncclGetUniqueId.argtypes = [ctypes.POINTER(UniqueId)]
        library.ncclCommInitRankConfig.argtypes = [
            ctypes.POINTER(comm),
            ctypes.c_int,
            UniqueId,
            ctypes.c_int,
            ctypes.POINTER(Config),
        ]
        for name in ("ncclSend", "ncclRecv"):
            getattr(library, name).argtypes = [
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
                ctypes.c_int,
                comm,
                ctypes.c_void_p,
            ]
        library.ncclCommGetAsyncError.argtypes = [comm, ctypes.POINTER(ctypes.c_int)]
        library.ncclCommAbort.argtypes = [comm]
        library.ncclGetErrorString.argtypes = [ctypes.c_int]
        library.ncclGetErrorString.restype = ctypes.c_char_p
        return library
    return None


def library_version(library: ctypes.CDLL) -> int:
    """As NCCL counts: 22304 is 2.23.4."""
    found = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(found))
    return found.value


def links_on_one_device() -> bool:
    """Whether two ranks may share a GPU: NCCL knows how, and both processes allow it."""
    library = load_library()
    return (
        library is not None
        and library_version(library) >= MULTI_RANK_SINCE
        and os.environ.get(MULTI_RANK_VARIABLE) == "1"
    )


def _candidates() -> Iterator[str]:
    loaded = loaded_library("libnccl.so")
    if loaded is not None:
        yield loaded
    if importlib.util.find_spec("nvidia") is not None:
        package = importlib.util.find_spec("nvidia.nccl")
        for folder in (package.submodule_search_locations or ()) if package else ():
            yield str(Path(folder) / "lib" / "libnccl.so.2")
    yield "libnccl.so.2"


def nccl_links(pool: PoolMemory) -> LinkFactory | None:
    """Links from this pool's device; None without a device or without NCCL."""
    if pool.kind is not MemoryKind.CUDA:
        return None
    library = load_library()
    if library is None:
        _log.info("NCCL is not installed: blocks move without it")
        return None
    return NcclLinks(library, pool.blocks.device)


class NcclLinks:
    """A LinkFactory."""

    def __init__(self, library: ctypes.CDLL, device: torch.device) -> None:
        self._library = library
        self._device = device

    def new_id(self) -> bytes:
        value = UniqueId()
        _check(self._library, "ncclGetUniqueId", self._library.ncclGetUniqueId(value))
        return bytes(value)

    def connect(
        self, link_id: bytes, rank: int, deadline: float, check_peer: Callable[[], None]
    ) -> NcclLink:
        assert len(link_id) == LINK_ID_BYTES
        torch.cuda.set_device(self._device)  # of this thread, which owns the link
        comm = ctypes.c_void_p()
        status = self._library.ncclCommInitRankConfig(
            ctypes.byref(comm),
            2,
            UniqueId.from_buffer_copy(link_id),
            rank,
            ctypes.byref(nonblocking_config()),
        )
        link = NcclLink(self._library, comm, rank, self._device)
        try:
            link.settle("ncclCommInitRankConfig", status, deadline, check_peer)
        except (TransferError, DeadlineExceeded):
            link.abort()
            raise
        return link


class NcclLink:
    """A SlotLink. ``comm`` is owned by this object."""

    def __init__(
        self, library: ctypes.CDLL, comm: ctypes.c_void_p, rank: int, device: torch.device
    ) -> None:
        self._library = library
        self._comm = comm
        self._peer = READER_RANK if rank == SERVER_RANK else SERVER_RANK
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._moved = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def stream(self) -> Iterator[None]:
        # Kernels of the engine that are still queued may use the blocks' old contents.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def start_send(self, slot: torch.Tensor) -> None:
        self._start("ncclSend", slot)

    def start_receive(self, slot: torch.Tensor) -> None:
        self._start("ncclRecv", slot)

    def done(self) -> bool:
        self._state("the link")
        return bool(self._moved.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self._stream.synchronize()

    def abort(self) -> None:
        if self._comm.value is None:
            return
        status = self._library.ncclCommAbort(self._comm)
        self._comm = ctypes.c_void_p()
        if status not in {_SUCCESS, _IN_PROGRESS}:
            _log.warning("ncclCommAbort failed: %s", _text(self._library, status))

    def settle(
        self, call: str, status: int, deadline: float, check_peer: Callable[[], None] | None = None
    ) -> None:
        """Waits until a call that is under way has been taken by the library."""
        if status not in {_SUCCESS, _IN_PROGRESS}:
            _check(self._library, call, status)
        while self._state(call) == _IN_PROGRESS:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{call} did not end in time")
            if check_peer is not None:
                check_peer()
            time.sleep(_POLL_SECONDS)

    def _start(self, call: str, slot: torch.Tensor) -> None:
        assert slot.is_contiguous()
        status = getattr(self._library, call)(
            slot.data_ptr(),
            slot.numel(),
            _UINT8,
            self._peer,
            self._comm,
            self._stream.cuda_stream,
        )
        # The event may be recorded only when the operation is in the stream.
        self.settle(call, status, time.monotonic() + _ENQUEUE_SECONDS)
        self._moved.record(self._stream)

    def _state(self, call: str) -> int:
        state = ctypes.c_int()
        status = self._library.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        _check(self._library, "ncclCommGetAsyncError", status)
        if state.value != _IN_PROGRESS:
            _check(self._library, call, state.value)
        return state.value


def _text(library: ctypes.CDLL, status: int) -> str:
    text: bytes = library.ncclGetErrorString(status)
    return f"{text.decode(errors='replace')} ({status})"


def _check(library: ctypes.CDLL, call: str, status: int) -> None:
    if status != _SUCCESS:
        raise TransferError(f"{call} failed: {_text(library, status)}")
