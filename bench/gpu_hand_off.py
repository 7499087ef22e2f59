"""KV blocks of another process, read over CUDA IPC by the product's own reader.

Not run on a GPU yet; on the CPU it reads over shared memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from bench.peer import FINGERPRINT, TOKEN, new_pool, running_peer
from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.types import Transport

SPAN = 2_097_152  # Llama-3.1-8B: 16 tokens, 32 layers, 8 heads of 128, keys and values, bfloat16


@contextlib.contextmanager
def reading(device: torch.device, blocks: int) -> Iterator[tuple[Callable[[], object], int]]:
    """What reads all blocks once, and how many bytes that is. On the CPU over shared memory."""
    transport = Transport.CUDA_IPC if device.type == "cuda" else Transport.SHM
    config = TransferConfig(transports=(transport.value,))
    with running_peer(blocks, SPAN, str(device), (transport,)) as peer:
        pool = new_pool(blocks, SPAN, str(device))
        readers = ReaderPool(pool, FINGERPRINT, config, TOKEN)
        reader = readers.reader_for(peer.endpoint)
        assert reader.transport is transport
        offers = peer.offers(blocks)
        try:
            yield (
                lambda: reader.read(offers, range(blocks), time.monotonic() + 60),
                blocks * SPAN,
            )
        finally:
            readers.close()
            pool.close()
