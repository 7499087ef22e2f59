"""Incremental text equals the whole decoding, never splits a character, and costs constant time."""

from __future__ import annotations

import random
import time

import pytest
from fronts_world import byte_level_tokenizer, sentence_piece_tokenizer
from tokenizers import Tokenizer

from router.detokenize import Detokenizer
from router.tokens import Pieces

REPLACEMENT = "\ufffd"
TEXTS = [
    "Grüße aus Köln, schöne Straße",
    "東京は大きい都市です。",
    "👍🏽👩‍👩‍👧‍👦😀 and text",
    "Привет, мир!",
    "a\u0301 combining, \ufffd literal, \u200b zero width",
    "  leading, trailing and   inner spaces  \n\n\t",
]


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece"])
def pieces(request, tmp_path_factory) -> Pieces:
    make = {"byte_level": byte_level_tokenizer, "sentence_piece": sentence_piece_tokenizer}
    return load(make[request.param](), tmp_path_factory)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Pieces:
    return load(byte_level_tokenizer(), tmp_path_factory)


def load(tokenizer: Tokenizer, tmp_path_factory) -> Pieces:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return Pieces(file)


def stream(pieces: Pieces, ids: list[int], *, skip: bool = True, context: tuple[int, ...] = ()):
    detokenizer = Detokenizer(pieces.vocabulary, skip_special=skip, context=context)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_of_many_scripts_comes_back_whole(pieces: Pieces, text: str, skip: bool) -> None:
    ids = pieces.tokenizer.encode(text, add_special_tokens=False).ids
    parts = stream(pieces, ids, skip=skip)
    assert "".join(parts) == pieces.tokenizer.decode(ids, skip_special_tokens=skip)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts), "a character was split"
    # Text flows: it is not all kept until the end.
    assert sum(map(len, parts[:-1])) > 0.8 * len(text)


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_equal_the_whole_decoding(byte_level: Pieces, skip: bool) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    size = byte_level.tokenizer.get_vocab_size()
    for _ in range(300):
        # Ids from 3 to 258 are single bytes: mostly invalid UTF-8; some ids have no piece at all.
        top = rng.choice([259, size, size + 20])
        ids = [rng.randrange(top) for _ in range(rng.randrange(1, 80))]
        whole = byte_level.tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(byte_level, ids, skip=skip)) == whole, ids


def test_random_text_in_byte_pieces_equals_the_whole_decoding(pieces: Pieces) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    alphabet = "the dog fox äöüß東京😀👍 \n"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))
        ids = pieces.tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(stream(pieces, ids)) == pieces.tokenizer.decode(ids)


def test_what_was_given_is_a_prefix_of_the_whole_at_every_token(byte_level: Pieces) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    ids = [rng.randrange(3, 300) for _ in range(400)]
    whole = byte_level.tokenizer.decode(ids)
    given = ""
    for part in stream(byte_level, ids):
        given += part
        assert whole.startswith(given)


def test_invalid_bytes_in_byte_pieces_keep_the_characters_that_were_given(tmp_path_factory) -> None:
    pieces = load(sentence_piece_tokenizer(), tmp_path_factory)
    euro = [pieces.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    broken = pieces.tokenizer.token_to_id("<0xFF>")
    assert "".join(stream(pieces, [*euro, broken])) == "€" + REPLACEMENT
    word = pieces.tokenizer.encode("dog", add_special_tokens=False).ids
    ids = [*[broken] * 50, *word, *euro]
    assert "".join(stream(pieces, ids)) == pieces.tokenizer.decode(ids)
    assert pieces.tokenizer.decode(ids).endswith("€")


def test_special_tokens_leave_no_trace_and_no_cost(byte_level: Pieces) -> None:
    special = byte_level.tokenizer.token_to_id("<|endoftext|>")
    ids = byte_level.tokenizer.encode("the dog", add_special_tokens=False).ids
    assert "".join(stream(byte_level, [special, *ids, special])) == "the dog"
    shown = "".join(stream(byte_level, [special, *ids], skip=False))
    assert shown == "<|endoftext|>the dog"


@pytest.mark.parametrize("kind", ["text", "special", "invalid", "literal"])
def test_a_token_costs_the_same_late_as_early(byte_level: Pieces, kind: str) -> None:
    tokenizer = byte_level.tokenizer
    unit = {
        "text": tokenizer.encode(" the dog", add_special_tokens=False).ids,
        "special": [tokenizer.token_to_id("<|im_end|>")],
        "invalid": [next(t for t in range(3, 259) if byte_level.bytes_of(t) == b"\xff")],
        "literal": tokenizer.encode(REPLACEMENT, add_special_tokens=False).ids,
    }[kind]
    ids = (unit * 30_000)[:30_000]
    detokenizer = Detokenizer(byte_level.vocabulary, skip_special=True)

    def cost(part: list[int]) -> float:
        start = time.perf_counter()
        for token in part:
            detokenizer.feed(token)
        return time.perf_counter() - start

    early, _, late = cost(ids[:5000]), cost(ids[5000:25_000]), cost(ids[25_000:])
    print(kind, early, late)
    assert late < 4 * early + 0.05
    assert len(detokenizer._window) < 70


def test_a_continued_text_keeps_the_space_it_begins_with(tmp_path_factory) -> None:
    pieces = load(sentence_piece_tokenizer(), tmp_path_factory)
    prompt = pieces.tokenizer.encode("the", add_special_tokens=False).ids
    answer = pieces.tokenizer.encode("the dog", add_special_tokens=False).ids[len(prompt) :]
    assert "".join(stream(pieces, answer, context=tuple(prompt))) == " dog"
    assert "".join(stream(pieces, answer)) == "dog", "a text of its own starts without it"


def test_single_tokens_show_their_bytes(byte_level: Pieces) -> None:
    ids = byte_level.tokenizer.encode(" the 😀", add_special_tokens=False).ids
    assert b"".join(byte_level.bytes_of(token) for token in ids) == " the 😀".encode()
    assert byte_level.bytes_of(10**6) == b""
