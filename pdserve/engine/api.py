"""What goes into an engine and what comes out: the whole seam between an engine and its worker.

The engine owns one model, one KV pool and one thread. Anything else posts *commands* (from any
thread) and receives *events*, in batches, on the engine's thread. Blocks belong to the engine: an
event that names blocks lends them, until the command that gives them back.

Life of a sequence (states in pdserve/lifecycle.SEQUENCE):

    GENERATE  Submit -> Admitted [-> TierRead -> TierReadDone] -> Tokens... (the last one finishes)
    PREFILL   Submit -> Admitted [-> TierRead -> TierReadDone] -> BlocksReady... -> Tokens (one)
              then the blocks are held until Release
    IMPORT    Submit -> Admitted [-> TierRead -> TierReadDone] -> Reserved
              -> ImportDone -> Tokens...        (the peer's first token is in ImportDone)
               | ImportFailed -> Tokens...      (computed here, from the blocks that are valid)

Each Submit gets exactly one ending: Tokens with ``finish`` set, or Failed. After the ending no
event names the sequence again, and (PREFILL excepted, until Release) it holds no block.
Cancel ends with Failed(Cancelled), unless the ending came first.
While a TierRead is out, or a caller writes into blocks of a Reserved, the caller must end that
(TierReadDone, ImportDone or ImportFailed) even for a cancelled sequence: only then are its blocks
free for others.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

from pdserve.errors import PdserveError
from pdserve.telemetry.timeline import Phase
from pdserve.types import (
    AttemptTokens,
    BlockKey,
    CachedTokens,
    ChunkTiming,
    FinishReason,
    Sampling,
    Tier,
    TokenLogprob,
    TokenOut,
)

# The attempt id serves as the sequence's id.
SeqId = NewType("SeqId", bytes)
BlockId = NewType("BlockId", int)
PinTicket = NewType("PinTicket", int)


class Job(enum.Enum):
    GENERATE = "generate"  # read the prompt and write the answer here
    PREFILL = "prefill"  # read the prompt, sample one token, hold the blocks
    IMPORT = "import"  # a peer reads the prompt; write the answer here


# ---- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    seq: SeqId
    job: Job
    tokens: AttemptTokens
    sampling: Sampling
    priority: int = 0
    # Seconds of time.monotonic(); the engine fails the sequence when it passes.
    deadline: float = float("inf")


@dataclass(frozen=True, slots=True)
class Cancel:
    seq: SeqId
    reason: PdserveError


@dataclass(frozen=True, slots=True)
class TierReadDone:
    """``hits[i]`` is the tier that filled the i-th block; the first None ends the prefix."""

    seq: SeqId
    hits: tuple[Tier | None, ...]
    phases: tuple[Phase, ...] = field(default=(), compare=False)  # one for each tier asked


@dataclass(frozen=True, slots=True)
class ImportDone:
    """Every wanted block of the Reserved event holds verified KV."""

    seq: SeqId
    first_token: TokenOut
    # Set when the first token already ended the sequence (nothing had to move).
    finish: FinishReason | None = None
    # So many of the first blocks the peer had found in a cache of its own: unlike those that it
    # computed, it does not write them to what all workers share.
    from_cache: int = 0


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """``valid`` of the wanted blocks, counted from the first, hold verified KV; compute the rest.

    Also legal before Reserved came (``valid`` = 0): the job becomes GENERATE.
    """

    seq: SeqId
    valid: int


@dataclass(frozen=True, slots=True)
class Release:
    """The peer has what it wanted of a PREFILL sequence, or is gone."""

    seq: SeqId


@dataclass(frozen=True, slots=True)
class Unpin:
    ticket: PinTicket


@dataclass(frozen=True, slots=True)
class Forget:
    """Suspect blocks: they and their descendants leave the index."""

    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class FlushDevice:
    """Every cached block that nothing refers to leaves the index.

    ``done``: hears on the engine's thread how many there were.
    """

    done: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Inspect:
    """Runs ``read(snapshot)`` on the engine's thread, between two steps."""

    read: Callable[[EngineSnapshot], Any]


Command = (
    Submit
    | Cancel
    | TierReadDone
    | ImportDone
    | ImportFailed
    | Release
    | Unpin
    | Forget
    | FlushDevice
    | Inspect
)


# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admitted:
    """The sequence has blocks for every token known (IMPORT: and one more)."""

    seq: SeqId
    device_hit_blocks: int


@dataclass(frozen=True, slots=True)
class TierRead:
    """Fill ``blocks[i]`` with the value of ``keys[i]``, a prefix of them, then TierReadDone."""

    seq: SeqId
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """IMPORT: write the peer's blocks ``first_wanted..`` of the prompt into ``blocks``."""

    seq: SeqId
    first_wanted: int  # blocks before this one were found here
    blocks: tuple[BlockId, ...]
    cached: CachedTokens


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """PREFILL: these blocks are final (a partial last one has its tail zeroed).

    The first event of a sequence holds the blocks that were found in a cache, too.
    """

    seq: SeqId
    first_index: int  # position of blocks[0] in the prompt's block list
    blocks: tuple[BlockId, ...]
    chunk: ChunkTiming | None  # None: nothing was computed for these


@dataclass(frozen=True, slots=True)
class Tokens:
    seq: SeqId
    offset: int  # index of tokens[0] among all generated tokens
    tokens: tuple[TokenOut, ...]
    finish: FinishReason | None = None
    # Set on the first event of a sequence alone:
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    # Set on the event that ends it:
    cached: CachedTokens = CachedTokens()
    chunks: tuple[ChunkTiming, ...] = ()
    preemptions: int = 0
    # On the first event of a sequence and on the one that ends it: what ended since.
    phases: tuple[Phase, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Failed:
    seq: SeqId
    error: PdserveError
    phases: tuple[Phase, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class WriteBack:
    """These full blocks are pinned for copying to slower tiers; Unpin gives them back."""

    ticket: PinTicket
    keys: tuple[BlockKey, ...]
    blocks: tuple[BlockId, ...]
    # Handed over by a peer, which computed them and writes them to what all workers share.
    from_peer: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks entered the device index (consecutive, children of ``parent``)."""

    keys: tuple[BlockKey, ...]
    parent: BlockKey | None  # None: the first is a prompt's first block
    token_ids: tuple[int, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class Removed:
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    pass


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Answers Forget: its keys and their descendants, which are to leave the slower tiers too."""

    keys: tuple[BlockKey, ...]


Event = (
    Admitted
    | TierRead
    | Reserved
    | BlocksReady
    | Tokens
    | Failed
    | WriteBack
    | Stored
    | Removed
    | Cleared
    | Forgotten
)
# Called on the engine's thread with all that one step made; must not block.
EventSink = Callable[[Sequence[Event]], None]

# (parent or root, token ids of one full block) -> key; given by cache_tiers/keys.py.
BlockHasher = Callable[[BlockKey, Sequence[int]], BlockKey]


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """A consistent count of what the engine holds."""

    steps: int
    running: int
    waiting: int
    waiting_tokens: int
    held: int
    receiving: int
    blocks_free: int
    blocks_cached: int  # kept for reuse, nothing refers to them
    blocks_used: int
    blocks_total: int
    pins: int
    preemptions: int
    # Broken invariants of the pool (reference counts, index, free list); empty when sound.
    violations: tuple[str, ...]
    idle: bool  # no sequence, no pin, no lent block
