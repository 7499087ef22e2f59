"""Equal keys mean equal tokens, equal prefix, equal model and equal tenant."""

from __future__ import annotations

from cache_tiers.keys import KeyMaker
from pdserve.types import Fingerprint

MAKER = KeyMaker(b"0123456789abcdef")
MODEL = Fingerprint(b"m" * 32)
TOKENS = tuple(range(40))


def chain(salt: bytes = b"", tokens: tuple[int, ...] = TOKENS, maker: KeyMaker = MAKER) -> tuple:
    return maker.chain(maker.root(MODEL, salt), tokens, 16)


def test_only_full_blocks_have_keys() -> None:
    assert len(chain()) == 2
    assert chain(tokens=TOKENS[:15]) == ()
    assert len(chain(tokens=TOKENS[:16])) == 1
    assert chain(tokens=()) == ()


def test_tenants_and_models_share_nothing() -> None:
    assert chain(b"a") == chain(b"a")
    assert not set(chain(b"a")) & set(chain(b"b"))
    assert MAKER.root(MODEL, b"") != MAKER.root(Fingerprint(b"n" * 32), b"")
    # Fingerprint and salt cannot be shifted into one another.
    assert MAKER.root(Fingerprint(b"m" * 31), b"mx") != MAKER.root(Fingerprint(b"m" * 32), b"x")


def test_nobody_computes_keys_without_the_secret() -> None:
    assert not set(chain()) & set(chain(maker=KeyMaker(b"fedcba9876543210")))


def test_a_key_names_everything_before_it() -> None:
    first, second = chain()
    changed = chain(tokens=(99, *TOKENS[1:]))
    assert changed[0] != first
    assert changed[1] != second  # its own tokens are the same
    last = chain(tokens=(*TOKENS[:31], 99))
    assert last[0] == first
    assert last[1] != second


def test_one_block_after_another_is_the_chain() -> None:
    key = MAKER.root(MODEL, b"")
    for i, expected in enumerate(chain()):
        key = MAKER.child(key, TOKENS[16 * i : 16 * (i + 1)])
        assert key == expected
        assert len(key) == 16


def test_a_known_key_stays_what_it_is() -> None:
    # Keys outlive restarts and versions: a change here empties every cache.
    assert MAKER.root(MODEL, b"tenant").hex() == "231f1a9a80b3f0e905dd39d5511800f4"
    assert chain(b"tenant")[1].hex() == "550e97d7645e6e86958459d16aba928e"
