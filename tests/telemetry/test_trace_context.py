"""W3C trace context: what is taken from a caller, and that anything malformed is ignored."""

from __future__ import annotations

import pytest

from pdserve.telemetry.trace_context import read_context

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-fe", False),
        (f"  {GOOD}\t", True),
        # A later version may say more, after a dash.
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
    ],
)
def test_a_caller_is_followed(header: str, sampled: bool) -> None:
    context = read_context([header], ["congo=t61rcWkgMzE, rojo=00f067aa0ba902b7 , ,"])
    assert (context.trace_id, context.parent_id, context.sampled) == (TRACE, SPAN, sampled)
    assert context.state == (("congo", "t61rcWkgMzE"), ("rojo", "00f067aa0ba902b7"))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [GOOD, GOOD],
        [GOOD.upper()],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-01-more"],
        [f"cc-{TRACE}-{SPAN}-01.more"],
        [f"00-{TRACE[1:]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-0g"],
        ["x" * 10_000],
        [f"00_{TRACE}_{SPAN}_01"],
        [f"00-{TRACE}-{SPAN}-01\n"],
        ["\u0660\u0660" + GOOD[2:]],
    ],
    ids=lambda headers: str(headers)[:60],
)
def test_what_breaks_the_specification_begins_a_new_trace(headers: list[str]) -> None:
    first, second = (read_context(headers, ["a=b"]) for _ in range(2))
    assert first.trace_id not in (TRACE, second.trace_id)
    assert len(first.trace_id) == 32
    assert int(first.trace_id, 16)
    assert (first.parent_id, first.sampled, first.state) == ("", None, ())


@pytest.mark.parametrize(
    "states",
    [
        ["a=1,a=2"],
        ["a=1", "a=2"],
        ["A=1"],
        ["=1"],
        ["a"],
        ["a=\x01"],
        ["a=b=c"],
        [",".join(f"k{i}=v" for i in range(33))],
        ["a=" + "v" * 300],
        ["a=1," * 200],
    ],
    ids=lambda states: str(states)[:40],
)
def test_a_broken_state_is_dropped_whole_and_the_parent_kept(states: list[str]) -> None:
    context = read_context([GOOD], states)
    assert (context.trace_id, context.state) == (TRACE, ())


def test_states_of_several_headers_are_one() -> None:
    context = read_context([GOOD], ["a=1", "fw529a3039@dt=2"])
    assert context.state == (("a", "1"), ("fw529a3039@dt", "2"))
