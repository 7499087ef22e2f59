"""The codes of refusals: those that the alert asks for are those that the door gives."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from fronts_world import running_world
from http_talk import call, post
from prometheus_client.parser import text_string_to_metric_families

from pdserve.config import RouterConfig
from router.validation import Validator
from tests.source_tree import ROOT

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
ASKED = re.compile(r'pdserve:requests_rejected_total\{code=~"([^"]*)"')


def test_the_alert_asks_for_codes_of_requests_that_are_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked,) = ASKED.findall(ALERTS.read_text(encoding="utf-8"))
    with running_world(model_folder, router=RouterConfig(request_timeout_s=1.0)) as world:
        body = {"prompt": "the fox", "max_tokens": 2}
        world.dispatcher.places = 0
        assert post(world.http, "/v1/completions", body).status == 429
        world.dispatcher.places = None

        async def dawdle(*_: Any) -> None:
            await asyncio.sleep(30)

        with monkeypatch.context() as patch:
            patch.setattr(Validator, "prepare", dawdle)
            assert post(world.http, "/v1/completions", body).status == 504
        text = call(world.http, "GET", "/metrics").body.decode()
    refused = {
        sample.labels["code"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "pdserve:requests_rejected_total" and sample.value == 1
    }
    assert refused == set(asked.split("|"))
