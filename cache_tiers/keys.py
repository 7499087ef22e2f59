"""Block keys: equal keys mean equal tokens, equal prefix, equal model and equal tenant.

key(block) = BLAKE2b-128(hash key; parent key || token ids as u32), and the parent of a prompt's
first block is the *root* = BLAKE2b-128(hash key; "root" || fingerprint || tenant salt). Without the
hash key nobody can compute a key, so a client cannot aim at another tenant's blocks. Torch-free:
the router computes keys too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdserve.types import ID_BYTES, BlockKey, Fingerprint


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """Derives keys under one secret. ``hash_key``: 16 to 64 bytes, outlives restarts."""

    hash_key: bytes

    def root(self, fingerprint: Fingerprint, salt: bytes) -> BlockKey:
        digest = hashlib.blake2b(key=self.hash_key, digest_size=ID_BYTES, person=b"pdserve-root")
        # Both parts are prefixed by their length: no two pairs spell the same bytes.
        for part in (fingerprint, salt):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return BlockKey(digest.digest())

    def child(self, parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
        digest = hashlib.blake2b(key=self.hash_key, digest_size=ID_BYTES, person=b"pdserve-block")
        digest.update(parent)
        digest.update(np.asarray(token_ids, dtype="<u4").tobytes())
        return BlockKey(digest.digest())

    def chain(
        self, root: BlockKey, token_ids: Sequence[int], block_size: int
    ) -> tuple[BlockKey, ...]:
        """Keys of the full blocks of ``token_ids``, first to last."""
        keys: list[BlockKey] = []
        parent = root
        whole = np.asarray(token_ids, dtype="<u4")
        for start in range(0, len(token_ids) - block_size + 1, block_size):
            digest = hashlib.blake2b(
                key=self.hash_key, digest_size=ID_BYTES, person=b"pdserve-block"
            )
            digest.update(parent)
            digest.update(whole[start : start + block_size].tobytes())
            parent = BlockKey(digest.digest())
            keys.append(parent)
        return tuple(keys)
