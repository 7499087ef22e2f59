"""Every alert leads to its section of docs/operations.md, and every section there has an alert."""

import re
from typing import Any

import yaml

from tests.source_tree import ROOT

PAGE = "docs/operations.md"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
RUNBOOK = "Runbook"
PARTS = ("**Means.**", "**See.**", "**Do.**")


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def runbook() -> dict[str, str]:
    """The text below each heading of the third level, in the runbook alone."""
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    _, title, rest = page.partition(f"\n## {RUNBOOK}\n")
    assert title, f"{PAGE} has no section {RUNBOOK!r}"
    chapter = rest.partition("\n## ")[0]
    _, *parts = re.split(r"^### (.+)$", chapter, flags=re.MULTILINE)
    headings, texts = parts[::2], parts[1::2]
    assert len(set(headings)) == len(headings), "two sections with one anchor"
    return dict(zip(headings, texts, strict=True))


def test_every_alert_has_its_section_and_every_section_an_alert() -> None:
    alerts = [rule["alert"] for rule in alert_rules()]
    assert alerts
    # In one order, so that both are read side by side.
    assert list(runbook()) == alerts


def test_an_alert_links_to_its_section() -> None:
    for rule in alert_rules():
        # The anchor that a heading of one word gets.
        wanted = f"{PAGE}#{rule['alert'].lower()}"
        assert rule["annotations"].get("runbook_url") == wanted, rule["alert"]


def test_a_section_says_what_it_means_how_to_see_it_and_what_to_do() -> None:
    for name, text in runbook().items():
        for part in PARTS:
            assert text.count(part) == 1, f"{name}: {part}"


def test_a_section_names_only_series_that_exist() -> None:
    served = re.compile(r"pdserve:[a-z0-9_]+")
    known = served.findall((ROOT / "deploy/grafana/dashboard.json").read_text(encoding="utf-8"))
    known += served.findall(ALERTS.read_text(encoding="utf-8"))
    for name, text in runbook().items():
        assert set(served.findall(text)) <= set(known), name
