"""Makes the local pool readable by peers, by every transport that it can and may use.

    SERVING -> CLOSED

The pool is never written to through an exporter. Close it before the pool's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.checksum import checksum_for
from kv_transfer.cudart import export_handle
from kv_transfer.host import host_id
from kv_transfer.nccl import nccl_links
from kv_transfer.plan import split_reads
from kv_transfer.server import TransferServer
from kv_transfer.serving import ServerStats
from kv_transfer.session import Identity
from kv_transfer.slots import LinkFactory
from kv_transfer.spans import STAGING_BYTES
from pdserve.engine.memory import MemoryKind, PoolMemory
from pdserve.errors import ConfigError, TransferError
from pdserve.types import Fingerprint, Transport


class PoolExporter:
    """A BlockExporter. ``transports`` are those allowed; ``links`` replaces NCCL in tests.

    ``bind_host`` is bound and announced (an address that peers reach, or a name of one);
    ``advertise_host`` is announced in its place, for one that binds every address.
    """

    def __init__(
        self,
        pool: PoolMemory,
        fingerprint: Fingerprint,
        bind_host: str,
        cluster_token: str,
        transports: Iterable[Transport],
        *,
        advertise_host: str = "",
        links: LinkFactory | None = None,
    ) -> None:
        self._pool = pool
        self._checksum = checksum_for(pool.device_uuid)
        links = links or nccl_links(pool)
        offered = _offered(pool, tuple(transports), links)
        if not offered:
            raise ConfigError("no allowed transport can read a pool like this worker's")
        self._server: TransferServer | None = None
        handle = b""
        if Transport.CUDA_IPC in offered:
            handle = export_handle(pool.device_pointer, pool.blocks.device)
        if any(transport is not Transport.SHM for transport in offered):
            identity = Identity(pool.incarnation, fingerprint, pool.num_blocks, pool.span_bytes)
            usable = links if Transport.NCCL in offered else None
            self._server = TransferServer(pool, identity, bind_host, cluster_token, usable)
        self._endpoint = Endpoint(
            incarnation=pool.incarnation,
            fingerprint=fingerprint,
            num_blocks=pool.num_blocks,
            span_bytes=pool.span_bytes,
            host_id=host_id(),
            pid=os.getpid(),
            shm_fd=pool.fd if Transport.SHM in offered else 0,
            tcp_address=self._server.address(advertise_host or bind_host) if self._server else "",
            device_uuid=pool.device_uuid,
            cuda_ipc_handle=handle,
            cuda_ipc_offset=0,
            transports=offered,
        )

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def offers(self, wanted: Sequence[tuple[int, int]]) -> tuple[BlockOffer, ...]:
        """On a device the checksums run after what the calling thread's current stream holds."""
        blocks = [block for _, block in wanted]
        for block in blocks:
            if not 0 <= block < self._pool.num_blocks:
                raise TransferError(f"no block {block} in a pool of {self._pool.num_blocks}")
        generations = [int(self._pool.generations[block]) for block in blocks]
        sums = self._sums(blocks)
        return tuple(
            BlockOffer(index, block, generation, value)
            for (index, block), generation, value in zip(wanted, generations, sums, strict=True)
        )

    def stats(self) -> ServerStats:
        """Counts of the transfer server; zeros where there is none."""
        return self._server.stats() if self._server else ServerStats()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _sums(self, blocks: Sequence[int]) -> list[int]:
        if self._pool.kind is MemoryKind.SHARED:
            return self._pool.spans.sums(self._pool.blocks.numpy(), blocks)
        sums: list[int] = []
        # Gathering takes device memory; a little at a time.
        for part in split_reads(len(blocks), self._pool.span_bytes, STAGING_BYTES, len(blocks)):
            sums += self._checksum.of_rows(self._pool.blocks[list(blocks[part])])
        return sums


def _offered(
    pool: PoolMemory, allowed: tuple[Transport, ...], links: LinkFactory | None
) -> tuple[Transport, ...]:
    shared = pool.kind is MemoryKind.SHARED
    possible = {
        Transport.SHM: shared and pool.fd != 0,
        Transport.CUDA_IPC: not shared,
        Transport.NCCL: links is not None,
        Transport.TCP: True,
    }
    return tuple(transport for transport in dict.fromkeys(allowed) if possible[transport])
