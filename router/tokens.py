"""Text to token ids and back, with the model's own tokenizer and without transformers.

Encoding and rendering run on a few threads, so that a long prompt does not hold up the streams on
the event loop; decoding a token is short and runs where it is called. A model folder without
tokenizer.json can still be served: by token ids.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tokenizers import Tokenizer

from pdserve.errors import ContextTooLong, InvalidRequest, ModelRefused
from router.chat import ChatTemplate
from router.detokenize import Detokenizer, Vocabulary
from router.model_files import ServedModel

P = ParamSpec("P")
T = TypeVar("T")

# The head of a very long text is encoded first: characters for each token of the context, and how
# many tokens the cut may add to it.
PROBE_CHARS = 6
PROBE_SLACK = 64

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_PIECE = "\u2581"  # SentencePiece's spelling of a space


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character: itself, or 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    spelled = {chr(byte): byte for byte in printable}
    spelled.update({chr(256 + at): byte for at, byte in enumerate(rest)})
    return spelled


class Pieces:
    """A loaded tokenizer.json: encode, decode, and what single tokens look like."""

    def __init__(self, file: Path) -> None:
        try:
            # A broken file raises a bare Exception in this library.
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise ModelRefused(f"{file}: not a tokenizer: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        added = self.tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        vocabulary: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.longest_piece = max((len(piece.encode()) for piece in vocabulary), default=1)
        decoder = str(self.tokenizer.decoder)
        self._byte_level = "ByteLevel" in decoder
        self._alphabet = _byte_alphabet() if self._byte_level else {}
        fallback = "ByteFallback" in decoder
        self.vocabulary = Vocabulary(
            decode=self.decode,
            known=self._known,
            special=frozenset(token for token, piece in added.items() if piece.special),
            bytes=frozenset(
                token
                for piece, token in vocabulary.items()
                if fallback and _BYTE_PIECE.fullmatch(piece)
            ),
            filler=self._filler(vocabulary),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def text_of(self, token: int) -> str:
        """One token's own text, with the space it begins with, for lists of log-probabilities."""
        return self.bytes_of(token).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added:
            return str(piece).encode()
        if self._byte_level:
            return bytes(self._alphabet[char] for char in piece if char in self._alphabet)
        if token in self.vocabulary.bytes:
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(_SPACE_PIECE, " ").encode()

    def _known(self, token: int) -> bool:
        return self.tokenizer.id_to_token(token) is not None

    def _filler(self, vocabulary: Mapping[str, int]) -> int | None:
        for piece in ("a", "e", "x", _SPACE_PIECE + "a"):
            if piece in vocabulary:
                return vocabulary[piece]
        return None


class TokenService:
    """What validation and the fronts ask for. One for the process; ``close`` ends its threads."""

    def __init__(self, model: ServedModel, threads: int) -> None:
        self.model = model
        self.pieces = None if model.tokenizer_file is None else Pieces(model.tokenizer_file)
        self._template = (
            None
            if model.chat_template is None
            else ChatTemplate(model.chat_template, model.special_tokens)
        )
        self.eos_ids = model.eos_ids or self._own_eos()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokens")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs long pure work on the pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    async def encode(
        self, name: str, text: str, *, add_special_tokens: bool, limit: int
    ) -> tuple[int, ...]:
        """``limit``: tokens that are of use; text that must have more is not encoded to its end."""
        pieces = self._pieces(name)
        least = len(text.encode()) // pieces.longest_piece
        if least <= limit and len(text) > PROBE_CHARS * limit:
            head = await self.run(
                pieces.encode, text[: PROBE_CHARS * limit], add_special_tokens=False
            )
            least = len(head) - PROBE_SLACK
        if least > limit:
            raise ContextTooLong(
                f"{name}: {len(text)} characters are at least {least} tokens; the model's context "
                f"is {limit} tokens",
                param=name,
            )
        return await self.run(pieces.encode, text, add_special_tokens=add_special_tokens)

    async def render(
        self,
        name: str,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        if self._template is None:
            raise InvalidRequest(
                f"{name}: this model has no chat template; send a plain prompt", param=name
            )
        return await self.run(
            self._template.render,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    async def decode(self, name: str, ids: Sequence[int]) -> str:
        return await self.run(self._pieces(name).decode, list(ids))

    def detokenizer(self, *, skip_special: bool, context: Sequence[int]) -> Detokenizer | None:
        """None where the model has no tokenizer: its answers are token ids alone."""
        if self.pieces is None:
            return None
        return Detokenizer(self.pieces.vocabulary, skip_special=skip_special, context=context)

    def text_of(self, token: int) -> str:
        return "" if self.pieces is None else self.pieces.text_of(token)

    def bytes_of(self, token: int) -> bytes:
        return b"" if self.pieces is None else self.pieces.bytes_of(token)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _own_eos(self) -> tuple[int, ...]:
        """What the tokenizer calls the end, where the model's other files name none."""
        text = self.model.special_tokens.get("eos_token")
        if text is None or self.pieces is None:
            return ()
        token = self.pieces.tokenizer.token_to_id(text)
        return () if token is None or token >= self.model.vocab_size else (token,)

    def _pieces(self, name: str) -> Pieces:
        if self.pieces is None:
            raise InvalidRequest(
                f"{name}: this model has no tokenizer.json; send token ids", param=name
            )
        return self.pieces
