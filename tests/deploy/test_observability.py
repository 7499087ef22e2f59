"""Dashboard and alerts ask only for what a router serves, and a real Prometheus answers them."""

import http.server
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.grafana import make_dashboard
from pdserve.telemetry.metrics import RouterMetrics
from tests.deploy.scraped import busy_metrics, serve_some
from tests.source_tree import ROOT

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
METRIC = re.compile(r"pdserve:[a-z0-9_]+")
SELECTOR = re.compile(r"(pdserve:[a-z0-9_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
# Prometheus adds them when it scrapes; le is a histogram's own.
ADDED = {"job", "instance", "le"}


def served() -> dict[str, set[str]]:
    """Every series that a router serves, with its labels."""
    text = busy_metrics().render()[0].decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_dashboard_is_the_one_that_its_source_writes() -> None:
    same = DASHBOARD.read_text(encoding="utf-8") == make_dashboard.render()
    assert same, "run: python deploy/grafana/make_dashboard.py"


@pytest.mark.parametrize("query", [*dashboard_queries(), *(rule["expr"] for rule in alert_rules())])
def test_a_query_names_only_series_and_labels_that_are_served(query: str) -> None:
    series = served()
    names = set(METRIC.findall(query))
    assert names or query.startswith("up{"), "asks for nothing of ours"
    assert names <= set(series), names - set(series)
    labels = {
        match.partition("=")[0].rstrip("~!").strip()
        for _, inside in SELECTOR.findall(query)
        for match in re.findall(r"[a-z_]+\s*(?:=~|!~|!=|=)", inside)
    }
    labels |= {part.strip() for inside in GROUPED.findall(query) for part in inside.split(",")}
    known = set().union(*(series[name] for name in names), ADDED)
    assert labels <= known, f"{labels - known} of {names}"


def test_everything_that_is_served_is_shown() -> None:
    shown = set(METRIC.findall(" ".join(dashboard_queries())))
    # Two of a histogram's three parts, and a mean where the distribution is shown beside it.
    parts = re.compile(r"_(bucket|sum|count)$")
    shown = {parts.sub("", name) for name in shown}
    ours = {parts.sub("", name) for name in served() if name.startswith("pdserve:")}
    assert ours - shown == {"pdserve:request_time_per_output_token_seconds"}


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("SKIPPED PROMTOOL: apt-get install prometheus brings it")
    done = subprocess.run(
        [promtool, "check", "rules", str(ALERTS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_sees_alerts_fire_for_what_they_are_for(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("SKIPPED PROMTOOL: apt-get install prometheus brings it")
    cases = [
        story("PdserveRouterDown", {UP: "0x30"}),
        story("PdserveRouterDown", {UP: "1x30"}, fires=False),
        # A target that vanished, and one that was never there.
        story("PdserveRouterDown", {UP: "1x5 _x24"}),
        story("PdserveRouterDown", {'up{job="another"}': "1x30"}),
        *(
            story("PdserveWorkerNotServing", {workers(state): "1x30"}, fires=fires)
            for state, fires in NOT_SERVING.items()
        ),
        *(
            story("PdserveRequestsRefused", {refused(code): "0+60x30"}, fires=fires)
            for code, fires in REFUSED.items()
        ),
    ]
    told = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "told.yaml").write_text(yaml.safe_dump(told))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "told.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


UP = 'up{job="pdserve",instance="r:1"}'
NOT_SERVING = {
    "suspect": True,
    "starting": True,
    "dead": True,
    "ready": False,
    "draining": False,
}
REFUSED = {"overloaded": True, "deadline_exceeded": True, "invalid_request": False}


def workers(state: str) -> str:
    return f'pdserve:workers{{job="pdserve",model_name="m",role="decode",state="{state}"}}'


def refused(code: str) -> str:
    return f'pdserve:requests_rejected_total{{job="pdserve",model_name="m",code="{code}"}}'


def story(alert: str, series: dict[str, str], *, fires: bool = True) -> dict[str, Any]:
    """``series``: one value a minute, for half an hour; then the alert fires or does not."""
    (expr,) = [rule["expr"] for rule in alert_rules() if rule["alert"] == alert]
    wanted = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    assert expr
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": wanted,
                "eval_time": "29m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


class Served(http.server.BaseHTTPRequestHandler):
    metrics: RouterMetrics

    def do_GET(self) -> None:
        # Each scrape finds more than the one before, so that every rate is above nothing.
        serve_some(self.metrics)
        body, content_type = self.metrics.render(self.headers.get("Accept", ""))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Scrapes are not worth a line."""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus that has scraped a router's metrics for some seconds."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("SKIPPED PROMETHEUS: apt-get install prometheus brings it")
    handler = type("Handler", (Served,), {"metrics": busy_metrics()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {
                "job_name": "pdserve",
                "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
            }
        ],
    }
    process, url = start_prometheus(binary, folder, config)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()


def start_prometheus(
    binary: str, folder: Path, config: dict[str, Any]
) -> tuple[subprocess.Popen[bytes], str]:
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + 60
    while True:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < limit, "Prometheus scraped nothing"
        try:
            rates = ask(url, "count(rate(pdserve:prompt_tokens_total[30s]) > 0)")
        except OSError:
            rates = []
        if rates:
            return process, url
        time.sleep(0.5)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    text = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"{url}/api/v1/query?{text}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    return list(found["data"]["result"])


@pytest.mark.deploy
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: str) -> None:
    empty = []
    for query in dashboard_queries():
        text = query.replace("$__rate_interval", "30s")
        text = text.replace('job=~"$job"', 'job=~".*"').replace('"$model"', '".*"')
        assert "$" not in text
        if not ask(prometheus, text):
            empty.append(query)
    assert not empty


@pytest.mark.deploy
def test_prometheus_evaluates_every_alert(prometheus: str) -> None:
    # Half of the requests of this router fail or resume: those who watch for it notice.
    expected = {"PdserveRequestsFail", "PdserveManyResumes", "PdserveRequestsRefused"}
    limit = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=10) as answer:
            groups = json.load(answer)["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        noticed = {rule["name"] for rule in rules if rule["state"] != "inactive"}
        if all(rule["health"] == "ok" for rule in rules) and expected <= noticed:
            break
        assert time.monotonic() < limit, (noticed, rules)
        time.sleep(0.5)
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alert_rules()}
    assert not noticed & {"PdserveRouterDown", "PdserveNoDecodeWorker", "PdserveKvFull"}
