"""What can be known about NCCL without a GPU: the layout that its C library is given."""

from __future__ import annotations

import ctypes

import pytest

from kv_transfer import nccl
from kv_transfer.nccl import Config, UniqueId, load_library, nonblocking_config


def test_the_configuration_is_laid_out_as_the_library_reads_it() -> None:
    """Offsets of the fields of ncclConfig_t in nccl.h on 64-bit Linux, from 2.17 on."""
    offsets = {name: getattr(Config, name).offset for name, _ in Config._fields_}
    assert offsets == {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cga_cluster_size": 20,
        "min_ctas": 24,
        "max_ctas": 28,
        "net_name": 32,
    }
    config = nonblocking_config()
    assert config.size == ctypes.sizeof(Config) == 40
    assert config.magic == 0xCAFEBEEF
    assert config.blocking == 0
    assert config.min_ctas == -(2**31)
    assert ctypes.sizeof(UniqueId) == 128


def test_the_library_has_every_call_that_a_link_makes() -> None:
    library = load_library()
    if library is None:
        pytest.skip("NCCL is not installed on this machine")
    for name in (
        "ncclGetUniqueId",
        "ncclCommInitRankConfig",
        "ncclCommGetAsyncError",
        "ncclCommAbort",
        "ncclSend",
        "ncclRecv",
    ):
        assert getattr(library, name)
    assert library.ncclGetErrorString(0)


@pytest.mark.parametrize(
    ("version", "allowed", "expected"),
    [(23203, "1", True), (22809, "1", False), (23203, "0", False), (None, "1", False)],
)
def test_two_ranks_on_a_device_need_a_library_that_knows_how_and_leave(
    monkeypatch: pytest.MonkeyPatch, version: int | None, allowed: str, expected: bool
) -> None:
    monkeypatch.setenv(nccl.MULTI_RANK_VARIABLE, allowed)
    monkeypatch.setattr(nccl, "load_library", lambda: None if version is None else object())
    monkeypatch.setattr(nccl, "library_version", lambda library: version)
    assert nccl.links_on_one_device() is expected
