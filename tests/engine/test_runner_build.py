"""A built engine: real model, shared memory pool and scheduler together answer like the model."""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tiers.keys import KeyMaker
from pdserve.config import Config, EngineConfig, ModelConfig
from pdserve.engine import shared_weights
from pdserve.engine.api import Event, Failed, Job, SeqId, Submit, Tokens
from pdserve.engine.build import BuiltEngine, build_engine
from pdserve.engine.host_memory import HostShare, Memory
from pdserve.engine.host_spans import NativeSpans, PlainSpans
from pdserve.engine.memory import MemoryKind
from pdserve.engine.tiles import tiles_work
from pdserve.errors import ConfigError, DoesNotFit
from pdserve.types import AttemptTokens, Incarnation, Numerics, Sampling
from tests.engine.model_world import family_folder, generate, kernel, kernel_folder
from tests.engine.test_fused import folder_of
from tests.models import CONTEXT, VOCAB

MAKER = KeyMaker(b"k" * 16)
COUNT = 8


def build(
    events: queue.Queue[Event],
    models: Path,
    *,
    pool_blocks: int = 40,
    workers: int = 1,
    memory: Memory | None = None,
    tier_bytes: int = 0,
    holders: int = 1,
    folder: Path | None = None,
    numerics: str = "exact",
    threads: int = 1,
    **engine: object,
) -> BuiltEngine:
    def sink(batch: Sequence[Event]) -> None:
        for event in batch:
            events.put(event)

    (models / "kernels").unlink(missing_ok=True)
    (models / "kernels").symlink_to(kernel_folder())
    config = Config(
        model_cache=str(models),
        model=ModelConfig(numerics=numerics, dtype="float64" if numerics == "exact" else "auto"),
        engine=EngineConfig(prefill_chunk=32, **engine),  # type: ignore[arg-type]
    )
    return build_engine(
        config=config,
        model_path=str(folder or family_folder("qwen3")),
        pool_blocks=pool_blocks,
        device="cpu",
        threads=threads,
        incarnation=Incarnation(os.urandom(16)),
        hasher=MAKER.child,
        has_tiers=False,
        sink=sink,
        share=HostShare(workers, memory, tier_bytes, holders),
    )


def submit(built: BuiltEngine, prompt: list[int]) -> SeqId:
    root = MAKER.root(built.facts.fingerprint, b"")
    tokens = AttemptTokens(
        token_ids=tuple(prompt),
        prompt_len=len(prompt),
        key_root=root,
        block_keys=MAKER.chain(root, prompt, built.layout.block_size),
    )
    seq = SeqId(os.urandom(16))
    built.engine.post(
        Submit(seq, Job.GENERATE, tokens, Sampling(max_tokens=COUNT, temperature=0.0))
    )
    return seq


def answers(events: queue.Queue[Event], seqs: Sequence[SeqId]) -> list[list[int]]:
    found: dict[SeqId, list[int]] = {seq: [] for seq in seqs}
    open_seqs = set(seqs)
    while open_seqs:
        event = events.get(timeout=60)
        assert not isinstance(event, Failed), event
        if isinstance(event, Tokens):
            found[event.seq] += [token.token_id for token in event.tokens]
            if event.finish is not None:
                open_seqs.discard(event.seq)
    return [found[seq] for seq in seqs]


@pytest.mark.parametrize("attention", ["native", "gather"])
def test_prompts_together_and_again_from_the_cache(attention: str, tmp_path: Path) -> None:
    events: queue.Queue[Event] = queue.Queue()
    built = build(events, tmp_path, attention=attention)
    native = attention == "native" and bool(kernel().pdserve_has_tiles())
    assert isinstance(built.memory.spans, NativeSpans if native else PlainSpans)
    draw = np.random.default_rng(5)
    prompts = [draw.integers(5, VOCAB, n).tolist() for n in (1, 16, 17, 70, 110)]
    expected = [generate("qwen3", prompt, COUNT)[0] for prompt in prompts]
    built.engine.start()
    try:
        for _ in range(2):
            assert answers(events, [submit(built, p) for p in prompts]) == expected
    finally:
        built.engine.stop()
        built.close()


def test_what_was_built_is_said(tmp_path: Path) -> None:
    built = build(queue.Queue(), tmp_path, pool_blocks=10)
    facts = built.facts
    assert built.memory.kind is MemoryKind.SHARED
    assert (built.memory.num_blocks, built.memory.span_bytes) == (10, built.layout.span_bytes)
    assert (facts.max_model_len, facts.vocab_size, facts.block_size) == (CONTEXT, VOCAB, 16)
    assert (facts.dtype, facts.numerics, len(facts.fingerprint)) == ("float64", Numerics.EXACT, 32)
    assert torch.get_num_threads() == 1
    said = "\n".join(built.notes)
    print(said)
    assert "3 layers" in said
    assert "attention: native kernel" in said
    assert "probe: logits differ" in said
    if kernel().pdserve_has_tiles():
        assert "copied and summed past the caches" in said
    assert "pool 10 blocks" in said
    assert "holds 160 tokens" in said
    built.close()


@pytest.mark.skipif(not tiles_work(kernel()), reason="its layers are not fused here")
def test_an_engine_that_uses_all_cores_takes_turns_and_keeps_its_helpers_to_cores(
    tmp_path: Path,
) -> None:
    events: queue.Queue[Event] = queue.Queue()
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    name = "llama, 6 heads of 64 under 2, tied"
    before = set(os.listdir("/proc/self/task"))
    built = build(events, tmp_path, folder=folder_of(name), numerics="fast", threads=0)
    built.engine.start()
    try:
        assert built.turn is not None
        assert "turns: of 100 ms" in built.notes
        assert built.turn.struct.began == 0
        assert len(answers(events, [submit(built, [7, 8, 9] * 20)])[0]) == COUNT
        assert built.turn.struct.began > 0
        started = set(os.listdir("/proc/self/task")) - before
        kept = [os.sched_getaffinity(int(task)) for task in started]
        assert all({core} in kept for core in sorted(cores)[1:])
    finally:
        built.engine.stop()
        built.close()
        torch.set_num_threads(threads)


def test_threads_that_would_fight_for_the_cores_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = len(os.sched_getaffinity(0)) + 1
    for policy, expected in (("", True), ("PASSIVE", False)):
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        built = build(queue.Queue(), tmp_path, pool_blocks=4, workers=many)
        assert any("OMP_WAIT_POLICY" in note for note in built.notes) is expected
        built.close()


def test_two_workers_agree_about_the_fingerprint(tmp_path: Path) -> None:
    one, two = (build(queue.Queue(), tmp_path, pool_blocks=n) for n in (4, 6))
    assert one.facts.fingerprint == two.facts.fingerprint
    other = build(queue.Queue(), tmp_path, pool_blocks=4, block_size=8)
    assert other.facts.fingerprint != one.facts.fingerprint
    for built in (one, two, other):
        built.close()


def test_a_computed_pool_obeys_its_cap(tmp_path: Path) -> None:
    built = build(queue.Queue(), tmp_path, pool_blocks=0, pool_bytes_max=2**20)
    assert built.memory.num_blocks == 2**20 // built.layout.span_bytes
    built.close()


def test_a_pool_is_as_large_as_the_host_was_when_the_cluster_started(tmp_path: Path) -> None:
    """And not as what is left now: a worker that starts again finds its neighbours there."""
    then = Memory(64 * 2**20, "as measured then")
    options = {"pool_blocks": 0, "workers": 2, "memory": then, "memory_fraction": 0.5}
    sizes = []
    for tier_bytes in (0, 0, 3 * 2**20):
        built = build(queue.Queue(), tmp_path, tier_bytes=tier_bytes, **options)
        sizes.append(built.memory.num_blocks)
        span = built.layout.span_bytes
        assert any("as measured then" in note for note in built.notes)
        built.close()
    assert sizes[0] == sizes[1]
    assert abs(sizes[0] - sizes[2] - 3 * 2**20 / span) <= 1
    assert (sizes[0] - 1) * span < 16 * 2**20


@pytest.mark.skipif(not tiles_work(kernel()), reason="its layers are not packed here")
def test_the_weights_that_workers_map_are_divided_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_weights, "LEAST_BYTES", 1)
    folder = folder_of("llama, 6 heads of 64 under 2, tied")
    then = Memory(64 * 2**20, "as measured then")
    blocks = {}
    # The last one maps the copy, too, but others need not.
    for share_weights, holders in ((False, 2), (True, 2), (True, 1)):
        built = build(
            queue.Queue(),
            tmp_path,
            folder=folder,
            numerics="fast",
            pool_blocks=0,
            workers=2,
            holders=holders,
            memory=then,
            memory_fraction=0.5,
            share_weights=share_weights,
        )
        blocks[share_weights, holders] = built.memory.num_blocks
        divided = any(note.startswith("1/2 of weights") for note in built.notes)
        assert divided == (share_weights and holders == 2)
        built.close()
    assert blocks[True, 2] > blocks[False, 2] == blocks[True, 1]


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the model does not fit: weights"):
        build(queue.Queue(), tmp_path, pool_blocks=10**9)
    with pytest.raises(ConfigError, match="device"):
        build_engine(
            Config(), str(family_folder("llama")), 0, "tpu:0", 1, Incarnation(bytes(16)),
            MAKER.child, False, lambda _: None, HostShare(),
        )  # fmt: skip
