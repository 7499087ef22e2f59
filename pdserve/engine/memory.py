"""The memory that a KV pool lives in, and how another process can find and read it.

On a CPU the pool is one anonymous file in memory (memfd): it has no name that could be left behind,
dies with its last user, and another process of the same user opens it *read-only* through
``/proc/<pid>/fd/<fd>``. So nobody but its owner can write into it.

Layout of the file, little-endian:

    0     8   magic "PDSKVPL1"
    8    16   incarnation of the owner
    24    8   number of blocks (u64)
    32    8   bytes per block (u64)
    40    8   offset of the first block (u64)
    64    8*n generation of each block (u64); raised by the owner each time the block is freed
    data offset (a multiple of 4096): the blocks, one span each

On CUDA the blocks lie in one plain device allocation and the generations in host memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from pdserve.engine.host_spans import PLAIN_SPANS, HostSpans
from pdserve.errors import DoesNotFit
from pdserve.types import Incarnation

MAGIC = b"PDSKVPL1"
HEADER = struct.Struct("<8s16sQQQ")
GENERATIONS_OFFSET = 64
PAGE = 4096


class MemoryKind(Enum):
    SHARED = "shared"  # a memfd
    CUDA = "cuda"


def data_offset(num_blocks: int) -> int:
    """Where block 0 starts in the shared file; bytes."""
    end = GENERATIONS_OFFSET + 8 * num_blocks
    return -(-end // PAGE) * PAGE


@dataclass(slots=True)
class PoolMemory:
    """A pool's bytes. The engine's thread owns their contents; others read what they were lent."""

    kind: MemoryKind
    num_blocks: int
    span_bytes: int
    incarnation: Incarnation
    blocks: torch.Tensor  # uint8 [num_blocks, span_bytes], CPU (shared) or CUDA
    generations: npt.NDArray[np.uint64]  # [num_blocks], host memory
    fd: int = 0  # of the shared file; 0 on CUDA
    device_pointer: int = 0  # CUDA address of block 0; 0 on CPU
    device_uuid: str = ""
    spans: HostSpans = PLAIN_SPANS  # how those of host memory are copied and summed
    _keep_alive: list[object] = field(default_factory=list)

    def block_bytes(self, block: int) -> memoryview:
        """A writable view of one block's span; CPU pools only."""
        assert self.kind is MemoryKind.SHARED
        return self.blocks[block].numpy().data

    def close(self) -> None:
        if self.fd:
            os.close(self.fd)
            self.fd = 0


def allocate_shared(num_blocks: int, span_bytes: int, incarnation: Incarnation) -> PoolMemory:
    """A zeroed pool in shared memory. DoesNotFit when the kernel refuses the size."""
    start = data_offset(num_blocks)
    size = start + num_blocks * span_bytes
    fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        # Take the pages now: a pool that does not fit must fail here, not at a later write.
        os.posix_fallocate(fd, 0, size)
        buffer = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        os.close(fd)
        raise DoesNotFit(
            f"the KV pool of {num_blocks} blocks x {span_bytes} bytes = {size / 2**30:.2f} GiB "
            f"does not fit into memory: {error.strerror}"
        ) from error
    HEADER.pack_into(buffer, 0, MAGIC, incarnation, num_blocks, span_bytes, start)
    generations = np.frombuffer(
        buffer, dtype=np.uint64, count=num_blocks, offset=GENERATIONS_OFFSET
    )
    flat = torch.frombuffer(buffer, dtype=torch.uint8, offset=start, count=num_blocks * span_bytes)
    return PoolMemory(
        kind=MemoryKind.SHARED,
        num_blocks=num_blocks,
        span_bytes=span_bytes,
        incarnation=incarnation,
        blocks=flat.view(num_blocks, span_bytes),
        generations=generations,
        fd=fd,
        _keep_alive=[buffer],
    )


class _CudaArray:
    """Lets torch adopt a plain cudaMalloc allocation (``__cuda_array_interface__``, version 3)."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def allocate_cuda(
    num_blocks: int, span_bytes: int, incarnation: Incarnation, device: torch.device
) -> PoolMemory:
    """A zeroed pool from plain cudaMalloc, whose base address CUDA IPC can export."""
    size = num_blocks * span_bytes
    runtime = cuda_runtime()
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # creates the context
        torch.cuda.empty_cache()  # what loading left with torch is no memory to the runtime
        status = runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size))
    if status != 0 or pointer.value is None:
        runtime.cudaGetLastError()  # else the next kernel would be blamed for it
        raise DoesNotFit(
            f"the KV pool of {num_blocks} blocks x {span_bytes} bytes = {size / 2**30:.2f} GiB "
            f"does not fit on {device}: cudaMalloc returned {status}"
        )
    flat = torch.as_tensor(_CudaArray(pointer.value, size), device=device)
    flat.zero_()
    return PoolMemory(
        kind=MemoryKind.CUDA,
        num_blocks=num_blocks,
        span_bytes=span_bytes,
        incarnation=incarnation,
        blocks=flat.view(num_blocks, span_bytes),
        generations=np.zeros(num_blocks, dtype=np.uint64),
        device_pointer=pointer.value,
        device_uuid=str(torch.cuda.get_device_properties(device).uuid),
        _keep_alive=[runtime],
    )


def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch itself has loaded into this process."""
    return ctypes.CDLL(_cudart_path())


def _cudart_path() -> str:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            path = line.rsplit(maxsplit=1)[-1]
            if "libcudart.so" in path:
                return path
    return "libcudart.so"
