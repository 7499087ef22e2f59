"""What follows a failed attempt: the decision alone."""

from __future__ import annotations

import pytest

from pdserve.errors import Cancelled, Draining, InternalError, Overloaded, PdserveError, WorkerLost
from pdserve.types import Incarnation
from router.recovery import Failure, GiveUp, History, Limits, Retry, decide

LIMITS = Limits(prefill=2, decode=3, strict=False)
D0, D1, P0 = (Incarnation(name * 16) for name in (b"a", b"b", b"p"))
LOST = WorkerLost("gone")


def failure(
    error: PdserveError = LOST,
    *,
    decode: Incarnation = D0,
    prefill: Incarnation | None = None,
    progressed: bool = False,
    streaming: bool = False,
) -> Failure:
    return Failure(error, error.retryable, decode, prefill, progressed, streaming)


def run(*failures: Failure, limits: Limits = LIMITS) -> list[Retry | GiveUp]:
    history, decisions = History(), []
    for one in failures:
        decision = decide(history, one, limits)
        decisions.append(decision)
        if isinstance(decision, GiveUp):
            break
        history = decision.history
    return decisions


def test_the_first_repetition_is_immediate_and_elsewhere() -> None:
    (retry,) = run(failure())
    assert retry == Retry(History(failed=frozenset({D0}), decode_failures=1), 0.0)


def test_decode_attempts_are_capped() -> None:
    decisions = run(*[failure()] * 5)
    assert [type(decision) for decision in decisions] == [Retry, Retry, GiveUp]
    assert decisions[-1].error is LOST
    assert decisions[1].delay_s > 0


def test_progress_forgives() -> None:
    decisions = run(failure(), failure(), failure(progressed=True), failure(), failure())
    assert [type(decision) for decision in decisions] == [Retry] * 5
    assert decisions[2].history == History(failed=frozenset({D0}))


def test_what_cannot_be_mended_ends() -> None:
    error = InternalError("broken")
    assert run(failure(error)) == [GiveUp(error)]


def test_a_cancel_that_the_router_did_not_ask_for_is_tried_again() -> None:
    assert isinstance(run(failure(Cancelled("lease")))[0], Retry)


def test_prefill_attempts_have_a_cap_of_their_own() -> None:
    decisions = run(failure(prefill=P0), failure(prefill=P0), failure(), failure())
    assert [type(decision) for decision in decisions] == [Retry] * 4
    assert not decisions[0].history.prefill_given_up
    assert decisions[1].history.prefill_given_up
    assert D0 not in decisions[1].history.failed, "the decode worker is not to blame"


def test_strict_mode_gives_the_request_up_instead() -> None:
    decisions = run(*[failure(prefill=P0)] * 3, limits=Limits(2, 3, strict=True))
    assert [type(decision) for decision in decisions] == [Retry, GiveUp]


def test_drains_are_exempt_but_do_not_spin() -> None:
    decisions = run(*[failure(Draining("going"))] * 9)
    assert all(isinstance(decision, Retry) for decision in decisions)
    assert decisions[0].delay_s == 0
    assert decisions[1].delay_s > 0
    assert decisions[-1].history.decode_failures == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_full_workers_refuse_new_requests_and_delay_running_ones(streaming: bool) -> None:
    full = failure(Overloaded("full", retry_after_s=0.7), streaming=streaming)
    decisions = run(*[full] * 5)
    if streaming:
        assert [decision.delay_s for decision in decisions] == [0.7] * 5
    else:
        assert [type(decision) for decision in decisions] == [Retry, Retry, GiveUp]
        assert decisions[-1].error.retry_after_s == 0.7
