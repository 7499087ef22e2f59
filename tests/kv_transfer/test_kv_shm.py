"""Shared memory in particular: nothing is written through it, and no header is simply believed."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from kv_peer import Peer, PeerSetup, new_pool, open_files, running

from kv_transfer.host import host_id
from kv_transfer.shm import ShmReader, open_memory
from pdserve.engine.memory import HEADER, MAGIC, data_offset
from pdserve.errors import LayoutMismatch, StaleBlock, TransferError


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running(PeerSetup()) as peer:
        yield peer


def test_no_write_gets_through(peer: Peer) -> None:
    """Not by the array, not by the mapping, not by asking the kernel for more."""
    memory = open_memory(peer.endpoint)
    rows = np.frombuffer(memory, dtype=np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        rows[-1] = 1
    with pytest.raises(TypeError):
        memory[0] = 1
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(rows.ctypes.data, mmap.PAGESIZE, writable) == -1
    assert ctypes.get_errno() in {1, 13}  # EPERM or EACCES
    del rows
    memory.close()
    assert peer.offers([0])[0] == peer.offers([0])[0]


def test_a_reader_keeps_no_writable_file(peer: Peer) -> None:
    pool = new_pool(4, peer.setup.span_bytes)
    before = open_files()
    reader = ShmReader(peer.endpoint, pool)
    for fd, target in open_files() - before:
        if "pdserve-kv" in target:
            with open(f"/proc/self/fdinfo/{fd}") as info:
                flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags"))
            assert flags & os.O_ACCMODE == os.O_RDONLY
            break
    else:
        raise AssertionError("the reader holds no memory file")
    reader.close()
    reader.close()
    assert open_files() <= before
    pool.close()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pid": 2**22}, TransferError),
        ({"shm_fd": 9999}, TransferError),
        ({"shm_fd": 0}, TransferError),  # standard input: no pool
        ({"incarnation": bytes(16)}, StaleBlock),
        ({"num_blocks": 25}, LayoutMismatch),
        ({"span_bytes": 3072}, LayoutMismatch),
        ({"num_blocks": 48, "span_bytes": 768}, LayoutMismatch),
    ],
)
def test_memory_that_is_not_what_was_announced_is_refused(
    peer: Peer, change: dict[str, object], error: type[TransferError]
) -> None:
    wrong = dataclasses.replace(peer.endpoint, **change)  # type: ignore[arg-type]
    pool = new_pool(1, wrong.span_bytes)
    files = open_files()
    with pytest.raises(error):
        ShmReader(wrong, pool)
    assert open_files() <= files
    pool.close()


@pytest.mark.parametrize("size", [0, 39, 4096, data_offset(4) + 4 * 64 - 1])
def test_a_file_shorter_than_it_says_is_refused(peer: Peer, size: int) -> None:
    """Reading beyond its end would kill this process."""
    fd = os.memfd_create("short")
    header = HEADER.pack(MAGIC, peer.endpoint.incarnation, 4, 64, data_offset(4))
    os.write(fd, header)
    os.ftruncate(fd, size)
    claimed = dataclasses.replace(
        peer.endpoint, pid=os.getpid(), shm_fd=fd, num_blocks=4, span_bytes=64
    )
    with pytest.raises(TransferError):
        open_memory(claimed)
    os.close(fd)


def test_the_host_id_is_stable_and_depends_on_the_user(peer: Peer) -> None:
    assert peer.endpoint.host_id == host_id() == host_id()
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(12345)
        os.setuid(12345)
        os.write(write, host_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    other = os.read(read, 100).decode()
    os.close(read)
    os.close(write)
    assert len(other) == 32
    assert other != host_id()
