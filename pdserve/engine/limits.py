"""What a sequence may be and when it ends: pure functions of its tokens and the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config import EngineConfig
from pdserve.engine.api import Job, Submit
from pdserve.errors import ContextTooLong, InvalidRequest, PdserveError
from pdserve.types import FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class Limits:
    """One engine's sizes, in blocks, tokens and sequences."""

    block_size: int
    num_blocks: int
    max_model_len: int
    max_running: int
    max_waiting: int
    step_tokens: int
    prefill_chunk: int

    @classmethod
    def of(
        cls, config: EngineConfig, block_size: int, num_blocks: int, max_model_len: int
    ) -> Limits:
        return cls(
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            # A running sequence takes one token of every step.
            max_running=min(config.max_running, config.step_tokens),
            max_waiting=config.max_waiting,
            step_tokens=config.step_tokens,
            prefill_chunk=config.prefill_chunk,
        )

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    @property
    def pool_tokens(self) -> int:
        return self.num_blocks * self.block_size


def refusal(submit: Submit, limits: Limits) -> PdserveError | None:
    """Why a sequence can never run here; None when it can."""
    tokens = submit.tokens
    known = len(tokens.token_ids)
    if not 1 <= tokens.prompt_len <= known:
        return InvalidRequest(
            f"the prompt has {tokens.prompt_len} of {known} tokens; at least 1 is needed",
            param="prompt",
        )
    if tokens.prompt_len >= limits.max_model_len:
        return ContextTooLong(
            f"the prompt has {tokens.prompt_len} tokens; with at least one token of answer at "
            f"most {limits.max_model_len} fit the context",
            param="prompt",
        )
    if known > limits.pool_tokens:
        return ContextTooLong(
            f"{known} tokens need {limits.blocks_for(known)} blocks; this worker's pool has "
            f"{limits.num_blocks}",
            param="prompt",
        )
    return None


def finish_on_arrival(submit: Submit, limits: Limits) -> FinishReason | None:
    """Set when what was generated before this attempt already ended the sequence.

    As in a running one, a stop id among the first min_tokens ends nothing: the sampler would not
    have made it, so a client did.
    """
    tokens, sampling = submit.tokens, submit.sampling
    stops = tokens.generated > sampling.min_tokens
    if stops and tokens.token_ids[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    if tokens.generated and len(tokens.token_ids) >= limits.max_model_len:
        return FinishReason.LENGTH
    # Without room for an answer, the log-probabilities of the prompt can still be asked for.
    if tokens.generated >= sampling.max_tokens and sampling.prompt_logprobs is None:
        return FinishReason.LENGTH
    return None


def finish_reason(
    sampling: Sampling, job: Job, token_id: int, prompt_len: int, total: int, limits: Limits
) -> FinishReason | None:
    """Whether ``token_id``, the last of ``total`` tokens, ends the sequence.

    The sampler withholds stop ids while fewer than min_tokens were generated.
    """
    if token_id in sampling.stop_token_ids:
        return FinishReason.STOP
    if total - prompt_len >= sampling.max_tokens or total >= limits.max_model_len:
        return FinishReason.LENGTH
    # Computing the last token takes a block for it. A PREFILL goes on in another pool.
    if job is not Job.PREFILL and total > limits.pool_tokens:
        return FinishReason.LENGTH
    return None
