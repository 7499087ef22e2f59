"""Whatever workers do, a client's stream has no gap and no repeat, and it ends exactly once."""

from __future__ import annotations

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from router_harness import cluster, drive, idle, prefill, until
from router_harness import settings as config
from scripted_worker import (
    Action,
    Break,
    Fail,
    ScriptedWorker,
    Shift,
    Stranger,
    Write,
    answer,
    job,
)

from pdserve.errors import (
    BY_CODE,
    Draining,
    InternalError,
    Overloaded,
    PdserveError,
    ProtocolError,
    TransferError,
    WorkerLost,
)

SEED = 20261121
PROMPT = tuple(range(1, 11))

errors = st.sampled_from(
    [
        WorkerLost("gone"),
        Draining("going"),
        TransferError("lost"),
        InternalError("broken"),
        Overloaded("full", retry_after_s=0.01),
    ]
)
actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(Write, st.integers(0, 5)),
    st.builds(Shift, st.integers(-3, 3).filter(bool)),
    st.builds(Fail, errors, st.sampled_from(["", "p0"])),
    st.just(Break()),
    st.just(Stranger()),
)
scripts = st.lists(st.lists(actions, max_size=4), max_size=4)


@seed(SEED)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    first=scripts,
    second=scripts,
    total=st.integers(1, 12),
    already=st.integers(0, 4),
    pair=st.booleans(),
)
def test_no_gap_no_repeat_one_end(first, second, total, already, pair) -> None:
    async def story() -> None:
        workers = [ScriptedWorker("d0", scripts=first), ScriptedWorker("d1", scripts=second)]
        readers = [prefill("p0")] if pair else []
        async with cluster(*workers, *readers, config=config(skip_handoff_tokens=0)) as made:
            sent = tuple(answer(PROMPT, min(already, total)))
            got, finishes, failed = list(sent), 0, None
            try:
                one = job(prompt=PROMPT, tokens=total, generated=sent)
                async for delta in made.dispatcher.generate(one):
                    assert finishes == 0, "nothing comes after the end"
                    assert delta.offset == len(got), "no gap, no repeat"
                    got += [token.token_id for token in delta.tokens]
                    finishes += delta.finish is not None
                    assert delta.usage.completion_tokens == len(got)
            except PdserveError as error:
                failed = error
            assert got == answer(PROMPT, len(got))
            if failed is None:
                assert finishes == 1
                assert len(got) == total
            else:
                assert finishes == 0
                assert type(failed) in (*BY_CODE.values(), ProtocolError)
            await until(lambda: idle(made))

    copies = [list(script) for script in (first, second)]
    print(f"seed {SEED}; scripts {copies}")
    first, second = ([list(attempt) for attempt in script] for script in copies)
    drive(story)
