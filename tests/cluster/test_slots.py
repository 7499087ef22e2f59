"""Waiting for the nodes of a joined Ray: what is demanded, and what is still lacking."""

from pdserve.cluster.slots import demand, lacking
from pdserve.types import Role

WANTED = {Role.PREFILL: 2, Role.DECODE: 1, Role.MIXED: 0}


def test_every_worker_is_a_bundle_of_its_own() -> None:
    assert demand(WANTED, 0) == [{"prefill": 1.0}, {"prefill": 1.0}, {"decode": 1.0}]
    assert demand(WANTED, 1)[-1] == {"decode": 1.0, "GPU": 1.0}


def test_what_has_no_place_is_counted_by_role() -> None:
    assert lacking(WANTED, {}) == {Role.PREFILL: 2, Role.DECODE: 1}
    assert lacking(WANTED, {"prefill": 1.0, "decode": 4.0}) == {Role.PREFILL: 1}
    assert lacking(WANTED, {"prefill": 2.0, "decode": 1.0}) == {}
