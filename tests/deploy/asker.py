"""A client inside a namespace: ``python -m tests.deploy.asker ROUTER SEED COUNT TOKENS``.

Prints ``{"streaming": true}`` when every stream has begun, then one JSON list: each stream's tokens
and how they were made. ``python -m tests.deploy.asker idle WORKER...`` prints what each worker says
of its own cleanliness; the cluster's token is in CLUSTER_TOKEN.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from pdserve.rpc import identity
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.ask import request

PROMPT_TOKENS = 100


class Streams:
    """Owns one channel and as many streams as are asked for, all at once."""

    def __init__(self, router: str, count: int) -> None:
        self._stub = pb_grpc.InferenceStub(grpc.insecure_channel(router))
        self._begun = threading.Barrier(count, action=lambda: say({"streaming": True}))

    def one(self, prompt: list[int], tokens: int, salt: str) -> dict[str, Any]:
        began = last = time.monotonic()
        found: list[int] = []
        gap, usage = 0.0, pb.Usage()
        asked = request(prompt, tokens, cache_salt=salt, ignore_eos=True)
        for chunk in self._stub.Generate(asked, timeout=90):
            assert chunk.offset == len(found), "gap or repeat"
            if not found:
                self._begun.wait(60)
            now = time.monotonic()
            gap, last = (max(gap, now - last) if found else 0.0), now
            found.extend(chunk.token_ids)
            usage = chunk.usage
        return {
            "tokens": found,
            "took_s": round(time.monotonic() - began, 2),
            "gap_s": round(gap, 2),
            "prefill": usage.prefill_worker,
            "decode": usage.decode_worker,
            "moved": usage.kv_bytes_transferred,
            "transport": usage.kv_transport,
            "skipped": usage.kv_skipped_reason,
            "resumes": usage.resumes,
        }


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


def ask(router: str, seed: str, count: int, tokens: int, salt: str) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 512) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
    streams = Streams(router, count)
    with ThreadPoolExecutor(count) as pool:
        say(list(pool.map(lambda prompt: streams.one(prompt, tokens, salt), prompts)))


def idle(workers: list[str]) -> None:
    header = identity.mint(os.environ["CLUSTER_TOKEN"], identity.Caller.OPERATOR).header(
        "/pdserve.v1.Worker/"
    )
    found = []
    for address in workers:
        with grpc.insecure_channel(address) as channel:
            check = worker_pb2_grpc.WorkerStub(channel).CheckIdle(
                worker_pb2.CheckIdleRequest(), timeout=10, metadata=(("authorization", header),)
            )
        whole = check.blocks_free + check.blocks_cached == check.blocks_total
        found.append(check.idle and whole and not check.violations)
    say(found)


if __name__ == "__main__":
    if sys.argv[1] == "idle":
        idle(sys.argv[2:])
    else:
        ask(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
