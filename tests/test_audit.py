"""The verdict over pip-audit's report: never silent, never green over a known vulnerability."""

from tests.audit_packages import verdict

GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-2020-0001"}]}
UNKNOWN = {"name": "ours", "skip_reason": "not found"}


def test_a_known_vulnerability_fails_and_is_named() -> None:
    text, code = verdict({"dependencies": [GOOD, BAD, UNKNOWN]})
    assert code == 1
    assert "bad 2: CVE-2020-0001" in text


def test_nothing_known_is_said_with_its_extent() -> None:
    text, code = verdict({"dependencies": [GOOD, UNKNOWN]})
    assert (text, code) == ("pip-audit: 1 packages have no known vulnerability, 1 unknown", 0)


def test_an_audit_of_nothing_is_no_audit() -> None:
    text, code = verdict({"dependencies": [UNKNOWN]})
    assert text.startswith("SKIPPED")
    assert code == 0
