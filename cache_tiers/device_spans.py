"""Blocks of a pool on a device, copied between it and host memory on streams of the tiers' own.

The engine tells of a block only once the device has finished its step (``Runner.finish``), and uses
one that a tier filled only after it was told so, when the copy is complete; hence the copies wait
for nothing on the engine's stream, and nothing waits for them.
Host memory that the tiers keep is registered with the driver (page-locked), so the device copies it
without a detour. A block moves whole and lies in one piece, so nothing is packed.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from cache_tiers.spans import Received
from pdserve.engine.memory import cuda_runtime
from pdserve.pages import Bytes

_logger = logging.getLogger(__name__)

# Of each thread that receives from Redis.
STAGING_BYTES = 32 * 2**20


class DevicePool:
    """``blocks``: uint8 [num_blocks, span_bytes] on a device; on the CPU the same without streams.

    Owns a stream and a piece of page-locked memory for each thread that copies.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks
        self.staging_rows = max(1, STAGING_BYTES // blocks.shape[1])
        self._own = threading.local()

    def of(self, blocks: Sequence[int]) -> DeviceSpans:
        return DeviceSpans(self, blocks)

    def adopt(self, memory: Bytes, ahead: bool) -> Callable[[], None]:
        """Page-locks ``memory``; where the driver refuses it is used as it is, and slower."""
        if not self.blocks.is_cuda or memory.nbytes == 0:
            return lambda: None
        address, runtime = ctypes.c_void_p(memory.ctypes.data), cuda_runtime()
        with torch.cuda.device(self.blocks.device):
            torch.cuda.current_stream().synchronize()  # creates the context
            status = runtime.cudaHostRegister(address, ctypes.c_size_t(memory.nbytes), 0)
        if status != 0:
            # Else the next kernel that this thread launches would be blamed for it.
            runtime.cudaGetLastError()
            size = memory.nbytes >> 20
            _logger.warning("%d MiB of a tier are not page-locked: CUDA error %d", size, status)
            return lambda: None

        def release() -> None:
            if runtime.cudaHostUnregister(address) != 0:
                runtime.cudaGetLastError()

        return release

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies inside run on this thread's own stream, and are complete at its end."""
        if not self.blocks.is_cuda:
            yield
            return
        stream = getattr(self._own, "stream", None)
        if stream is None:
            stream = torch.cuda.Stream(self.blocks.device)  # type: ignore[no-untyped-call]
            self._own.stream = stream
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def staging(self) -> torch.Tensor:
        """uint8 [staging_rows, span_bytes], page-locked, this thread's own."""
        found: torch.Tensor | None = getattr(self._own, "staging", None)
        if found is None:
            shape = (self.staging_rows, self.blocks.shape[1])
            found = torch.empty(shape, dtype=torch.uint8, pin_memory=self.blocks.is_cuda)
            self._own.staging = found
        return found


class DeviceSpans:
    def __init__(self, pool: DevicePool, blocks: Sequence[int]) -> None:
        self._pool = pool
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def room(self) -> int:
        return min(len(self._blocks), self._pool.staging_rows)

    def part(self, begin: int, end: int) -> DeviceSpans:
        return DeviceSpans(self._pool, self._blocks[begin:end])

    def read(self, into: Mapping[int, Bytes]) -> None:
        with self._pool.copying():
            for position, row in into.items():
                block = self._pool.blocks[self._blocks[position]]
                torch.from_numpy(row).copy_(block, non_blocking=True)

    def write(self, rows: Mapping[int, Bytes]) -> None:
        with self._pool.copying():
            for position, row in rows.items():
                block = self._pool.blocks[self._blocks[position]]
                block.copy_(torch.from_numpy(row), non_blocking=True)

    @contextmanager
    def received(self) -> Iterator[Received]:
        rows = self._pool.staging()[: len(self._blocks)].numpy()
        assert len(rows) == len(self._blocks), "no more than ``room`` at once"
        received = Received([row.data for row in rows])
        yield received
        if received.found:
            self.write(dict(enumerate(rows[: received.found])))
