"""What each command does to the board; one function per command.

A command may come late: for a sequence that has ended, or in a state where it means nothing any
more. Then it is dropped (``handle`` says so), with one exception: whatever gives lent blocks back
frees them, also for an ended sequence.
"""

from __future__ import annotations

import logging
from typing import assert_never

from pdserve.engine.api import (
    Cancel,
    Failed,
    FlushDevice,
    Forget,
    ImportDone,
    ImportFailed,
    Job,
    Release,
    Submit,
    TierReadDone,
    Tokens,
    Unpin,
)
from pdserve.engine.board import Board
from pdserve.engine.limits import finish_on_arrival, refusal
from pdserve.engine.sequence import Lender, Sequence
from pdserve.errors import Cancelled, DuplicateRequest, InternalError, Overloaded, PdserveError
from pdserve.lifecycle import SequenceEvent, SequenceState
from pdserve.types import BlockKey

log = logging.getLogger(__name__)

SchedulerCommand = (
    Submit
    | Cancel
    | TierReadDone
    | ImportDone
    | ImportFailed
    | Release
    | Unpin
    | Forget
    | FlushDevice
)


def handle(board: Board, command: SchedulerCommand, arrival: int) -> bool:
    """Carries a command out; False when it came too late to mean anything.

    ``arrival`` orders submissions: each has a larger one than those before it.
    """
    match command:
        case Submit():
            return _submit(board, command, arrival)
        case Cancel(seq_id, reason):
            return _cancel(board, board.sequences.get(seq_id), reason)
        case Release(seq_id):
            return _release(board, board.sequences.get(seq_id))
        case TierReadDone():
            return _tier_read_done(board, command)
        case ImportDone():
            return _import_done(board, command)
        case ImportFailed():
            return _import_failed(board, command)
        case Unpin(ticket):
            return board.kv.unpin(ticket)
        case Forget(keys):
            return _forget(board, keys)
        case FlushDevice(done):
            freed = board.kv.flush()
            if done is not None:
                done(freed)
            return True
        case _:
            assert_never(command)


def _submit(board: Board, submit: Submit, arrival: int) -> bool:
    if submit.seq in board.sequences:
        # The id names one sequence, and its one ending answers both.
        log.error("a running sequence was submitted again; the second one is ignored")
        return False
    error = refusal(submit, board.limits)
    if error is None and submit.seq in board.ghosts:
        error = DuplicateRequest("this attempt has already ended")
    if error is None:
        reason = finish_on_arrival(submit, board.limits)
        if reason is not None:
            board.events.append(Tokens(submit.seq, submit.tokens.generated, (), reason))
            return True
        if len(board.waiting) >= board.limits.max_waiting:
            error = Overloaded(
                f"{len(board.waiting)} sequences wait on this worker already", retry_after_s=1.0
            )
    if error is not None:
        board.events.append(Failed(submit.seq, error))
    else:
        seq = Sequence.of(submit, arrival, board.limits.block_size)
        if seq.job is Job.IMPORT and seq.generated >= seq.sampling.max_tokens:
            # Only the log-probabilities of the prompt are asked for: no peer has a token to send.
            seq.job = Job.GENERATE
        board.enqueue(seq)
    return True


def _cancel(board: Board, seq: Sequence | None, reason: PdserveError) -> bool:
    if seq is None:
        return False
    if seq.state is SequenceState.HELD:
        # Its ending came; whoever cancels it wants its blocks no longer. A peer that reads them
        # nevertheless notices by their generation.
        board.release_held(seq)
    else:
        board.fail(seq, reason)
    return True


def _release(board: Board, seq: Sequence | None) -> bool:
    if seq is None or seq.job is not Job.PREFILL:
        return False
    return _cancel(board, seq, Cancelled("released before it was computed"))


def _tier_read_done(board: Board, command: TierReadDone) -> bool:
    if _bury(board, command):
        return True
    seq = board.sequences.get(command.seq)
    if seq is None or seq.state is not SequenceState.FETCHING:
        return False
    seq.lent_to = None
    seq.journal.read(command.phases)
    board.kv.fill_from_tiers(seq, command.hits)
    board.begin(seq)
    return True


def _import_done(board: Board, command: ImportDone) -> bool:
    if _bury(board, command):
        return True
    seq = board.sequences.get(command.seq)
    if seq is None or seq.job is not Job.IMPORT:
        return False
    if command.finish is not None:
        # Nothing had to move, so there is nothing to keep. A tier may still be reading.
        if seq.lent_to is Lender.IMPORT:
            seq.lent_to = None
        board.take_token(seq, command.first_token, command.finish)
    elif seq.state is SequenceState.RECEIVING:
        board.arrived(seq, command.from_cache)
        if board.open_sampler(seq):
            board.take_token(seq, command.first_token)
    else:
        board.fail(seq, InternalError("blocks were imported before any were reserved"))
    return True


def _import_failed(board: Board, command: ImportFailed) -> bool:
    if _bury(board, command):
        return True
    seq = board.sequences.get(command.seq)
    if seq is None or seq.job is not Job.IMPORT:
        return False
    if seq.state is SequenceState.RECEIVING:
        prompt_blocks = board.limits.blocks_for(seq.known)
        first_wanted = seq.computed // board.limits.block_size
        valid = max(0, min(command.valid, prompt_blocks - first_wanted))
        board.compute_instead(seq, first_wanted + valid)
    else:
        # WAITING, or FETCHING: the state stays, and goes on to compute here.
        seq.advance(SequenceEvent.HANDOFF_FAILED)
        seq.job = Job.GENERATE
    return True


def _forget(board: Board, keys: tuple[BlockKey, ...]) -> bool:
    """Also a lender may have the old bytes in hand, and say only later that they are in place."""
    board.kv.forget(keys)
    gone = frozenset(keys)
    for seq in board.sequences.values():
        seq.forget(gone)
    return True


def _bury(board: Board, command: TierReadDone | ImportDone | ImportFailed) -> bool:
    """Whether the command gave back the blocks of an ended sequence.

    Such a sequence had its blocks lent either to the tiers or to an import, and only that lender's
    command counts.
    """
    ghost = board.ghosts.get(command.seq)
    lender = Lender.TIERS if isinstance(command, TierReadDone) else Lender.IMPORT
    if ghost is None or ghost.lent_to is not lender:
        return False
    board.bury(ghost)
    return True
