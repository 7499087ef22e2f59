"""``python -m kv_transfer.trial``: moves real blocks between two processes, by each transport.

For ``pdserve doctor``: the pools, the exporter and the readers are those of workers.

    this process                                     a second process
    starts it, sends a token           -->           pool filled with known bytes
    endpoint and offers                <--           exporter
    reads by each transport, looks at every byte
    closes its input                   -->           ends

Prints one JSON object: ``nccl`` (version of the library, 0 without one) and ``moves``, a list of
``transport``, ``text`` and one of ``moved`` (bytes), ``impossible`` or ``failed`` as ``outcome``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import torch

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.convert import (
    endpoint_from_proto,
    endpoint_to_proto,
    offers_from_proto,
    offers_to_proto,
)
from kv_transfer.exporter import PoolExporter
from kv_transfer.nccl import MULTI_RANK_VARIABLE, library_version, load_library
from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.engine.memory import PoolMemory, allocate_cuda, allocate_shared
from pdserve.errors import InternalError, PdserveError
from pdserve.types import Fingerprint, Incarnation, Transport
from pdserve.v1 import kv_pb2

_BLOCKS = 32
_SPAN_BYTES = 64 * 2**10
_FINGERPRINT = Fingerprint(bytes(32))
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Move:
    transport: str
    outcome: str  # moved, impossible or failed
    text: str  # the way it was chosen, or what is wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kv_transfer.trial")
    parser.add_argument("--transports", default="shm,tcp", help="names, separated by commas")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--serve", action="store_true", help="be the second process")
    parsed = parser.parse_args(arguments)
    transports = tuple(Transport(name) for name in parsed.transports.split(","))
    # Two ranks on one device, as two workers that share it.
    os.environ.setdefault(MULTI_RANK_VARIABLE, "1")
    if parsed.serve:
        _serve(transports, parsed.device)
        return 0
    library = load_library()
    with _peer(parsed.transports, parsed.device) as (endpoint, offers, token):
        moves = [_move(one, endpoint, offers, token, parsed.device) for one in transports]
    version = library_version(library) if library is not None else 0
    print(json.dumps({"nccl": version, "moves": [asdict(move) for move in moves]}))
    return 0


def _content(block: int) -> torch.Tensor:
    data = np.random.default_rng(block).integers(0, 256, _SPAN_BYTES, dtype=np.uint8)
    return torch.from_numpy(data)


def _pool(device: str) -> PoolMemory:
    incarnation = Incarnation(secrets.token_bytes(16))
    if device == "cpu":
        return allocate_shared(_BLOCKS, _SPAN_BYTES, incarnation)
    return allocate_cuda(_BLOCKS, _SPAN_BYTES, incarnation, torch.device(device))


def _serve(transports: tuple[Transport, ...], device: str) -> None:
    token = sys.stdin.readline().strip()
    pool = _pool(device)
    for block in range(_BLOCKS):
        pool.blocks[block].copy_(_content(block))
    exporter = PoolExporter(pool, _FINGERPRINT, _HOST, token, transports)
    offers = exporter.offers([(index, index) for index in range(_BLOCKS)])
    messages = (endpoint_to_proto(exporter.endpoint()), offers_to_proto(offers))
    print(*(base64.b64encode(one.SerializeToString()).decode() for one in messages), flush=True)
    sys.stdin.read()
    exporter.close()
    pool.close()


@contextlib.contextmanager
def _peer(transports: str, device: str) -> Iterator[tuple[Endpoint, tuple[BlockOffer, ...], str]]:
    """A second process with a filled pool, how to read it, and the token that it asks for."""
    token = secrets.token_hex(16)
    own = ["--serve", "--transports", transports, "--device", device]
    command = [sys.executable, "-m", "kv_transfer.trial", *own]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(token.encode() + b"\n")
            process.stdin.flush()
            yield *_read_offers(process.stdout), token
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _read_offers(stream: IO[bytes]) -> tuple[Endpoint, tuple[BlockOffer, ...]]:
    line = stream.readline()
    if not line:
        raise InternalError("the second process ended at once")
    first, second = (base64.b64decode(word) for word in line.split())
    endpoint = endpoint_from_proto(kv_pb2.KvEndpoint.FromString(first))
    return endpoint, offers_from_proto(kv_pb2.Offer.FromString(second), _BLOCKS, _BLOCKS)


def _move(
    transport: Transport,
    endpoint: Endpoint,
    offers: tuple[BlockOffer, ...],
    token: str,
    device: str,
) -> Move:
    pool = _pool(device)
    config = TransferConfig(transports=(transport.value,))
    readers = ReaderPool(pool, _FINGERPRINT, config, token)
    try:
        try:
            readers.choose(endpoint)
        except PdserveError as error:
            return Move(transport.value, "impossible", str(error))
        began = time.monotonic()
        deadline = began + config.deadline_s
        report = readers.reader_for(endpoint).read(offers, range(_BLOCKS), deadline)
        took = time.monotonic() - began
        wrong = [b for b in range(_BLOCKS) if not torch.equal(pool.blocks[b].cpu(), _content(b))]
        if wrong:
            return Move(transport.value, "failed", f"{len(wrong)} blocks arrived with other bytes")
        text = f"{report.bytes_moved:,} bytes in {took * 1000:.0f} ms, each byte as it was sent"
        return Move(transport.value, "moved", text)
    except PdserveError as error:
        return Move(transport.value, "failed", str(error))
    finally:
        readers.close()
        pool.close()


if __name__ == "__main__":
    sys.exit(main())
