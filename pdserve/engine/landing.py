"""Where the bytes of a checkpoint land while they are read (file_order.py), tensor by tensor.

    room(window)            where its bytes are to be read into
    land(window)            after they were: gives the tensors that are now complete

HostLanding reads straight into the final tensors; only what has to be converted goes through a
tensor of the file's own type. StagedLanding, for devices, reads into a few fixed buffers (pinned
for CUDA, with a copy stream of their own) and copies on from there. With CUDA it has not run on a
GPU yet; its bookkeeping is tested on the CPU.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch

from pdserve.engine.file_order import WINDOW_BYTES, Part, Window
from pdserve.engine.safetensors_file import StoredTensor

# As the bytes are read. Any byte is a U8, which copy_ makes a proper bool of.
STORED: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.uint8,
}


def final_dtype(stored: str, floating: torch.dtype | None) -> torch.dtype:
    """What a tensor becomes: numbers with a point become ``floating`` (None: stay as they are)."""
    if stored == "BOOL":
        return torch.bool
    dtype = STORED[stored]
    return floating if floating is not None and dtype.is_floating_point else dtype


class Landing(Protocol):
    def room(self, window: Window) -> Sequence[memoryview]: ...

    def land(self, window: Window) -> Iterator[tuple[int, torch.Tensor]]:
        """Number and final tensor of each that the window completes."""
        ...

    def finish(self) -> None:
        """Everything that was landed may be used by any stream from here on."""
        ...


class HostLanding:
    """``finals``: CPU tensors, one for each stored one; let go one by one as they are complete."""

    def __init__(self, stored: Sequence[StoredTensor], finals: Sequence[torch.Tensor]) -> None:
        self._stored = stored
        self._finals: list[torch.Tensor | None] = list(finals)
        self._raw: dict[int, torch.Tensor] = {}  # of tensors in part read, the file's type
        # Whether everything is read right where it will stay.
        self.direct = all(
            STORED[one.dtype] is final.dtype for one, final in zip(stored, finals, strict=True)
        )

    def room(self, window: Window) -> Sequence[memoryview]:
        return [memoryview_of(self._raw_of(part))[part.begin : part.end] for part in window.parts]

    def _raw_of(self, part: Part) -> torch.Tensor:
        found = self._raw.get(part.tensor)
        if found is None:
            final, stored = self._finals[part.tensor], self._stored[part.tensor]
            assert final is not None
            dtype = STORED[stored.dtype]
            found = final if final.dtype is dtype else torch.empty(stored.shape, dtype=dtype)
            self._raw[part.tensor] = found
        return found

    def land(self, window: Window) -> Iterator[tuple[int, torch.Tensor]]:
        for part in window.parts:
            if part.end < self._stored[part.tensor].nbytes:
                continue
            raw, final = self._raw.pop(part.tensor), self._finals[part.tensor]
            self._finals[part.tensor] = None
            assert final is not None
            if raw is not final:
                final.copy_(raw)
            yield part.tensor, final

    def finish(self) -> None:
        return


class StagedLanding:
    """``dtypes``: of the final tensors. ``buffers``: at least as many as windows may be ahead."""

    def __init__(
        self,
        stored: Sequence[StoredTensor],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        buffers: int,
    ) -> None:
        self._stored = stored
        self._dtypes = dtypes
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        # With the event after which a buffer may be written again.
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]]
        self._free = queue.SimpleQueue()
        for _ in range(buffers):
            buffer = torch.empty(WINDOW_BYTES, dtype=torch.uint8, pin_memory=cuda)
            self._free.put((buffer, None))
        self._staged: dict[Window, torch.Tensor] = {}
        self._raw: dict[int, torch.Tensor] = {}  # on the device

    def room(self, window: Window) -> Sequence[memoryview]:
        buffer, event = self._free.get()
        if event is not None:
            event.synchronize()
        self._staged[window] = buffer
        return [memoryview_of(buffer)[: window.size]]

    def land(self, window: Window) -> Iterator[tuple[int, torch.Tensor]]:
        buffer = self._staged.pop(window)
        at = 0
        complete = []
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for part in window.parts:
                raw, count = self._raw_of(part), part.end - part.begin
                target = raw.reshape(-1).view(torch.uint8)[part.begin : part.end]
                target.copy_(buffer[at : at + count], non_blocking=True)
                at += count
                if part.end == self._stored[part.tensor].nbytes:
                    del self._raw[part.tensor]
                    complete.append((part.tensor, raw.to(self._dtypes[part.tensor])))
            event = None if self._stream is None else self._stream.record_event()
        self._free.put((buffer, event))
        yield from complete

    def _raw_of(self, part: Part) -> torch.Tensor:
        found = self._raw.get(part.tensor)
        if found is None:
            stored = self._stored[part.tensor]
            found = torch.empty(stored.shape, dtype=STORED[stored.dtype], device=self._device)
            self._raw[part.tensor] = found
        return found

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def memoryview_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    return tensor.reshape(-1).view(torch.uint8).numpy().data
