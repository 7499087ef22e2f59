"""The checksum of a block's span; which one is used follows from where the *offering* pool lies.

Shared memory: XXH3-64. It runs near memory speed and releases the GIL while it does.

CUDA: ``lanes64``, which a device computes for many blocks at once. The span, zero-padded to a
multiple of 4 bytes, is read as signed little-endian 32-bit lanes x[i]; the result is

    sum(x[i] * w[i]) mod 2**64,    w[i] = splitmix64(i) | 1

A single changed lane always changes the sum, since every weight is odd and |x| < 2**32; exchanged
or several changed lanes do with all but a 2**-32 chance, since the weights are 64 bits wide.
Both ends use the same algorithm; the host computes either of them over bytes in its memory.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional

from pdserve.engine.host_spans import span_sum

MASK = 2**64 - 1
# Widened lanes take twice the bytes of the spans; this bounds them.
_WORKING_BYTES = 64 * 2**20


class SpanChecksum(Protocol):
    name: str

    def of_span(self, span: memoryview) -> int:
        """Of host bytes; 0 <= result < 2**64."""
        ...

    def of_rows(self, rows: torch.Tensor) -> list[int]:
        """Of each row of uint8 [n, span_bytes], on any device; waits for the device."""
        ...


class Xxh3:
    name = "xxh3_64"

    def of_span(self, span: memoryview) -> int:
        return span_sum(span)

    def of_rows(self, rows: torch.Tensor) -> list[int]:
        return [span_sum(row.data) for row in rows.cpu().numpy()]


class Lanes64:
    name = "lanes64"

    def of_span(self, span: memoryview) -> int:
        # A copy: torch refuses to share read-only memory.
        row = torch.from_numpy(np.array(np.frombuffer(span, dtype=np.uint8)))
        return self.of_rows(row.unsqueeze(0))[0]

    def of_rows(self, rows: torch.Tensor) -> list[int]:
        if rows.shape[0] == 0:
            return []
        padding = -rows.shape[1] % 4
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding))
        lanes = rows.contiguous().view(torch.int32)
        weights = _weights(lanes.shape[1], str(rows.device))
        step = max(1, _WORKING_BYTES // (8 * lanes.shape[1]))
        sums = [(part.long() * weights).sum(dim=1) for part in torch.split(lanes, step)]
        return [value & MASK for value in torch.cat(sums).tolist()]


XXH3 = Xxh3()
LANES64 = Lanes64()


def checksum_for(device_uuid: str) -> SpanChecksum:
    """The algorithm of a pool on that device; empty: in shared memory."""
    return LANES64 if device_uuid else XXH3


@functools.lru_cache(maxsize=8)
def _weights(count: int, device: str) -> torch.Tensor:
    """int64 [count], equal on every host and device."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)
