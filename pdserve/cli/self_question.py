"""The question that a new cluster answers before ``pdserve up`` calls it ready.

It goes the way that a client's would: through the public gRPC front, streamed. It is longer than
what decode workers read themselves, and unlike any other from its first words on, so KV has to move
where there are workers for it. That it did is checked in what the answer says of itself.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.client import Client, ClientOptions, Message
from pdserve.client.types import Prompt
from pdserve.cluster import router_view
from pdserve.cluster.supervisor import Cluster
from pdserve.config import Config
from pdserve.errors import DeadlineExceeded, InternalError, InvalidRequest, WorkerLost
from pdserve.types import Usage

ANSWER_TOKENS = 32
READY_TIMEOUT_S = 120.0
# Beyond what a decode worker reads itself, so that some blocks have to move.
_MARGIN_TOKENS = 48
_FILLER = (
    "A cluster reads this text on one worker and answers it on another, "
    "and the notes made while reading travel between the two. "
)
_SYSTEM = "You are a helpful AI assistant. "
_QUESTION = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class Report:
    """How the answer was made."""

    usage: Usage
    first_token_s: float
    total_s: float


def client_for(access: router_view.Access, grpc: str) -> Client:
    options = ClientOptions(
        api_key=access.api_key,
        ca_file=access.certificate,
        server_name=router_view.certificate_name(access),
    )
    return Client(grpc, options)


def wait_ready(access: router_view.Access, workers: int) -> None:
    """Waits for /ready, and for as many workers to be ready. DeadlineExceeded says what lacks."""
    limit = time.monotonic() + READY_TIMEOUT_S
    while reason := _lacking(access, workers):
        if time.monotonic() >= limit:
            raise DeadlineExceeded(
                f"the cluster did not get ready within {READY_TIMEOUT_S:g} s: {reason}"
            )
        time.sleep(0.05)


def _lacking(access: router_view.Access, workers: int) -> str:
    """What keeps the cluster from being whole, as its router says; empty when nothing does."""
    try:
        status, body = router_view.get(access, "/ready")
        if status != 200:
            return _message(body)
        # One worker may suffice for the router; the question is to go through all roles.
        states = {str(one.get("id")): one.get("state") for one in router_view.workers(access)}
    except WorkerLost as error:
        return str(error)
    waiting = [f"{worker} is {state}" for worker, state in states.items() if state != "ready"]
    if len(states) < workers:
        waiting.append(f"{len(states)} of {workers} workers have joined")
    return ", ".join(waiting)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def ask_itself(cluster: Cluster, show_text: Callable[[str], None]) -> Report:
    """Streams the answer to ``show_text``. Raises PdserveError if the KV should have moved and
    did not."""
    access = cluster.http
    pools = cluster.config.pools
    wait_ready(access, len(cluster.workers()))
    both = pools.prefill > 0 and pools.decode > 0
    with client_for(access, router_view.local_address(cluster.addresses.grpc)) as client:
        report = _ask(client, _prompt(client, cluster.config), show_text)
        # A mixed worker may rightly take one question; it will not take every one.
        for _ in range(3 if both and pools.mixed else 0):
            if report.usage.kv_bytes_transferred:
                break
            report = _ask(client, _prompt(client, cluster.config), lambda text: None)
    if both and not report.usage.kv_bytes_transferred:
        reason = report.usage.kv_skipped_reason or "no reason was given"
        raise InternalError(f"KV did not move from prefill to decode: {reason}")
    return report


def _ask(client: Client, prompt: Prompt, show_text: Callable[[str], None]) -> Report:
    begin, first, usage = time.monotonic(), 0.0, None
    for chunk in client.stream(prompt, max_tokens=ANSWER_TOKENS, temperature=0.0):
        if chunk.token_ids and not first:
            first = time.monotonic() - begin
        show_text(chunk.text)
        usage = chunk.usage
    if usage is None:
        raise InternalError("the answer to the cluster's own question ended without its usage")
    return Report(usage, first, time.monotonic() - begin)


def _prompt(client: Client, config: Config) -> Prompt:
    """A new prompt, long enough to be handed over where the context allows that."""
    room = client.model().max_model_len - ANSWER_TOKENS
    wanted = min(config.router.skip_handoff_tokens + _MARGIN_TOKENS, room)
    story = f"Check {secrets.token_hex(8)}. "
    while True:
        prompt, tokens = _tokenized(client, story)
        if tokens > room:
            # Not even the question fits; the unique words alone still make a prompt.
            return client.tokenize(story)[: max(1, room)]
        if tokens >= wanted:
            return prompt
        story += _FILLER


def _tokenized(client: Client, story: str) -> tuple[Prompt, int]:
    """As the richest kind of prompt that the model's template takes, and its length in tokens."""
    prompts: tuple[str | tuple[Message, ...], ...] = (
        (Message("system", _SYSTEM + story), Message("user", _QUESTION)),
        (Message("user", story + _QUESTION),),
        story + _QUESTION,
    )
    for prompt in prompts[:-1]:
        try:
            return prompt, len(client.tokenize(prompt))
        except InvalidRequest:
            continue
    return prompts[-1], len(client.tokenize(prompts[-1]))


def way(usage: Usage) -> str:
    """How an answer was made, in one line."""
    cached = usage.cached_tokens
    tiers = [
        f"{count} from {tier}"
        for tier, count in (
            ("device", cached.device),
            ("host", cached.host),
            ("redis", cached.redis),
        )
        if count
    ]
    read = f"{usage.prompt_tokens} tokens read by {usage.prefill_worker or usage.decode_worker}"
    if tiers:
        read += f" ({', '.join(tiers)})"
    if usage.kv_bytes_transferred:
        moved = f"{usage.kv_bytes_transferred:,} bytes of KV moved by {usage.kv_transport}"
    else:
        moved = f"no KV moved ({usage.kv_skipped_reason or 'no reason given'})"
    return f"{read}; {moved}; {usage.completion_tokens} tokens written by {usage.decode_worker}"
