"""Which workers of hosts that leave may go at once, and which stay until others do their work."""

import pytest

from pdserve.cluster.leaving import may_go
from pdserve.cluster.sizes import Bounds, Member, PoolRules
from pdserve.types import Duty, Role, WorkerId

RULES = PoolRules({role: Bounds(0, 4) for role in Role}, strict=False)
STRICT = PoolRules(RULES.bounds, strict=True)


def ids(text: str) -> list[WorkerId]:
    return [WorkerId(word) for word in text.split()]


@pytest.mark.parametrize(
    ("planned", "absent", "asked", "rules", "going"),
    [
        # Another one writes answers.
        ("prefill-0 decode-0 decode-1", "", "decode-0", RULES, "decode-0"),
        # The only one stays; so does the only one that is there.
        ("prefill-0 decode-0", "", "decode-0", RULES, ""),
        ("prefill-0 decode-0 decode-1", "decode-1", "decode-0", RULES, ""),
        # Who is not there has nothing to lose.
        ("prefill-0 decode-0 decode-1", "decode-1", "decode-0 decode-1", RULES, "decode-1"),
        # Who is there and gets no work from the router does nobody's work.
        ("prefill-0 decode-0 decode-1?", "", "decode-0", RULES, ""),
        ("prefill-0 decode-0 decode-1?", "", "decode-1", RULES, "decode-1"),
        # Of two on one host the first goes, the second when that one is back.
        ("prefill-0 decode-0 decode-1", "", "decode-0 decode-1", RULES, "decode-0"),
        # Decode workers read prompts themselves, unless that is forbidden.
        ("prefill-0 decode-0", "", "prefill-0", RULES, "prefill-0"),
        ("prefill-0 decode-0", "", "prefill-0", STRICT, ""),
        ("prefill-0 mixed-0 mixed-1", "", "prefill-0 mixed-0", STRICT, "prefill-0 mixed-0"),
        # A drained one takes no work over.
        ("decode-0 decode-1!", "", "decode-0", RULES, ""),
        ("decode-0 decode-1!", "", "decode-1", RULES, "decode-1"),
    ],
)
def test_somebody_stays_who_does_the_work(
    planned: str, absent: str, asked: str, rules: PoolRules, going: str
) -> None:
    """``decode-1!`` is drained, ``decode-1?`` is there and not ready."""
    members = {
        WorkerId(word.rstrip("!?")): Member(
            Role(word.rpartition("-")[0]), Duty.DRAIN if word.endswith("!") else Duty.SERVE
        )
        for word in planned.split()
    }
    present = set(members) - set(ids(absent))
    ready = present - {WorkerId(word[:-1]) for word in planned.split() if word.endswith("?")}
    assert may_go(members, present, ready, ids(asked), rules) == ids(going)
