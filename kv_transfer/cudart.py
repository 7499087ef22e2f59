"""The few calls of the CUDA runtime that torch does not offer: sharing an allocation by handle."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from pdserve.errors import TransferError

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is


class _IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t; passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _CudaArray:
    """Lets torch show device memory that it did not allocate."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def loaded_library(name: str) -> str | None:
    """Path of a shared library whose file name starts with ``name``, if this process has it."""
    with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as maps:
        for line in maps:
            columns = line.split(maxsplit=5)
            if len(columns) == 6 and Path(columns[5].strip()).name.startswith(name):
                return columns[5].strip()
    return None


@functools.cache
def _runtime() -> ctypes.CDLL:
    # The very runtime that torch uses: a second one would have another idea of the current device.
    library = ctypes.CDLL(loaded_library("libcudart.so") or "libcudart.so")
    library.cudaIpcGetMemHandle.argtypes = [ctypes.POINTER(_IpcHandle), ctypes.c_void_p]
    library.cudaIpcOpenMemHandle.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        _IpcHandle,
        ctypes.c_uint,
    ]
    library.cudaIpcCloseMemHandle.argtypes = [ctypes.c_void_p]
    library.cudaGetErrorString.argtypes = [ctypes.c_int]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def export_handle(pointer: int, device: torch.device) -> bytes:
    """HANDLE_BYTES that open the allocation whose base is ``pointer`` in another process."""
    handle = _IpcHandle()
    with torch.cuda.device(device):
        _check("cudaIpcGetMemHandle", _runtime().cudaIpcGetMemHandle(ctypes.byref(handle), pointer))
    return bytes(handle)


def open_handle(handle: bytes, device: torch.device) -> int:
    """The address, in this process, of an allocation of another one."""
    if len(handle) != HANDLE_BYTES:
        raise TransferError(f"a CUDA IPC handle of {len(handle)} bytes")
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # creates the context
        status = _runtime().cudaIpcOpenMemHandle(
            ctypes.byref(pointer), _IpcHandle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
    _check("cudaIpcOpenMemHandle", status)
    if pointer.value is None:
        raise TransferError("cudaIpcOpenMemHandle gave no address")
    return pointer.value


def close_handle(pointer: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        _check("cudaIpcCloseMemHandle", _runtime().cudaIpcCloseMemHandle(pointer))


def device_bytes(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes]; the caller keeps the memory alive."""
    return torch.as_tensor(_CudaArray(pointer, nbytes), device=device)


def _check(call: str, status: int) -> None:
    if status != 0:
        _runtime().cudaGetLastError()  # else the thread's next kernel would be blamed for it
        text = _runtime().cudaGetErrorString(status).decode(errors="replace")
        raise TransferError(f"{call} failed: {text} ({status})")
