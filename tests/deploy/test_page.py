"""The live page in a real browser on a real cluster: what it shows, sends and fits."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.ray_node import LOCAL, start_ray
from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config import Config
from pdserve.config_load import load_config
from pdserve.engine.resolve import default_cache, prepare_model
from tests.e2e.clusters import SMOLLM2, Variant, settings

pytestmark = [pytest.mark.deploy, pytest.mark.cluster]

KEY = "a-key-for-the-live-page"
# The page leaves the length of an answer to the model, so the context has to bound it.
CONTEXT = 320
CHAT = "/v1/chat/completions"
PHONES = ((390, 844), (360, 640))
# Where the pictures go that a person wants to look at.
PICTURES = os.environ.get("PDSERVE_PAGE_PICTURES", "")


@pytest.fixture(scope="module")
def programs() -> tuple[str, str]:
    """Chromium and its driver, or why there is no test."""
    pytest.importorskip("selenium", reason="SKIPPED PAGE: pip install selenium drives the browser")
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if found[0] is None or found[1] is None:
        pytest.skip("SKIPPED PAGE: apt-get install chromium chromium-driver brings the browser")
    return found[0], found[1]


@pytest.fixture(scope="module")
def cluster(
    programs: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text(KEY + "\n")
    model = prepare_model(Config().model, default_cache(), lambda step: None).path
    config = load_config(
        None,
        [
            *settings(Variant(SMOLLM2, "shm", "roomy"), CONTEXT, model),
            f"security.api_key_files={folder / 'keys'}",
            "cache.host.bytes_max=67108864",
        ],
        {"name": "page", "state_dir": str(folder / "state")},
    )
    # Paths of Ray's sockets have to be short.
    short = Path(tempfile.mkdtemp(prefix="pds-t"))
    node = start_ray(LOCAL, short / "ray", f"test:{secrets.token_hex(8)}", threads=2)
    try:
        made = start_cluster(config, ray=node)
        try:
            yield made
        finally:
            made.stop(drain_s=0.5)
    finally:
        node.stop()
        shutil.rmtree(short, ignore_errors=True)


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.url = url

    def see(self, width: int, height: int, *, dark: bool = False) -> None:
        """A window of that size, with that taste; as a phone where it is narrow."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """What a reader sees there; empty where there is nothing."""
        found = self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return str(found)

    def count(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def click(self, selector: str) -> None:
        """The list may be drawn anew between looking and clicking, so both happen at once."""
        self.run("document.querySelector(arguments[0]).click()", selector)

    def type(self, selector: str, text: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(text)

    def until(
        self, condition: Callable[[], object], seconds: float = 30.0, shown: str = "body"
    ) -> None:
        """Waits for it; fails with what ``shown`` has to read by then."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text(shown)[:2000]
            time.sleep(0.1)

    def complaints(self) -> list[str]:
        """Errors of scripts and of the policy; an answer of 401 is told by the page itself."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "401" not in entry["message"]
        ]

    def picture(self, name: str) -> None:
        if PICTURES:
            Path(PICTURES).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


@pytest.fixture(scope="module")
def browser(programs: tuple[str, str], cluster: Cluster) -> Iterator[Browser]:
    """The page with its key entered, after a wrong one."""
    from selenium import webdriver

    chromium, driver_path = programs
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    try:
        made = Browser(driver, cluster.http.url + "/")
        made.see(1440, 1000)
        driver.get(made.url)
        made.until(lambda: made.run("return document.getElementById('key').open"))
        made.type("#key-input", "not-the-right-key\n")
        made.until(lambda: "not known" in made.text("#key-error"))
        made.type("#key-input", KEY + "\n")
        made.until(lambda: made.count(".worker") == 2)
        yield made
    finally:
        driver.quit()


@pytest.fixture
def load(cluster: Cluster) -> Iterator[None]:
    """Two clients that ask one question after another until the test is over."""
    over = threading.Event()
    failed: list[BaseException] = []

    def ask(client: int) -> None:
        at = 0
        try:
            while not over.is_set():
                at += 1
                words = " ".join(f"{client}-{at}-{word}" for word in range(20))
                post(cluster.http.url, {"messages": [user(words)], "max_tokens": 24})
        except BaseException as error:
            failed.append(error)
            raise

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()
    assert not failed


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(url + CHAT, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_key_stays_in_the_tab(browser: Browser) -> None:
    kept = browser.run(
        "return [Object.values(sessionStorage), localStorage.length, document.cookie]"
    )
    assert kept == [[KEY], 0, ""]
    assert KEY not in browser.run("return location.href + document.documentElement.outerHTML")


@pytest.mark.usefixtures("load")
def test_workers_figures_and_requests_move(browser: Browser) -> None:
    assert browser.text(".worker.prefill h4") == "prefill-0"
    assert browser.text(".worker.decode h4") == "decode-0"
    assert browser.text("#ready") == "ready"
    browser.until(lambda: browser.count(".pill") > 0)
    browser.until(lambda: browser.count(".request .state.finished") > 1)
    assert "prefill-0 → decode-0" in browser.text("#requests")
    # Runs are short: look often.
    browser.until(lambda: browser.count(".runner") > 0)
    browser.until(lambda: browser.count(".chart .line") >= 4)
    written = browser.text("#tiles .decode .figure")
    assert float(written.replace(",", "")) > 0
    browser.until(lambda: re.search("[1-9].* .B/s", browser.text("#tiles .kv .figure")))
    assert "kept, of" in browser.text("#tiers")
    browser.picture("desktop-load")
    assert browser.complaints() == []


def test_a_question_gets_its_answer_and_the_path_that_it_took(browser: Browser) -> None:
    question = f"Tell a long story about a lighthouse, {secrets.token_hex(24)}, <b>and be brief</b>"
    browser.type("#chat-input", question + "\n")
    browser.until(lambda: browser.count(".answer-path") == 1, 120)
    assert browser.text(".message.user .words") == question
    assert browser.count(".message b") == browser.count(".answer-path b"), "markup became elements"
    assert len(browser.text(".message.assistant .words")) > 20
    steps = browser.text(".answer-path")
    assert "prefill-0" in steps
    assert "decode-0" in steps
    assert "MB by shm" in steps
    assert "computed" in steps
    assert browser.complaints() == []
    browser.picture("desktop-chat")
    assert "move KV" in timeline_of(browser, ".answer-foot button")
    # The same question again finds in the caches what the first one left.
    browser.click("#chat-new")
    browser.until(lambda: browser.count(".message") == 0)
    browser.type("#chat-input", question + "\n")
    browser.until(lambda: browser.count(".answer-path") == 1, 120)
    assert "from device" in browser.text(".answer-path")


def timeline_of(browser: Browser, selector: str) -> str:
    """What the dialog tells that a click there opens; closes it again."""
    browser.click(selector)
    browser.until(lambda: browser.count("#timeline .span") > 4, shown="#timeline")
    told = browser.text("#timeline")
    assert browser.run("return document.activeElement.closest('#timeline') !== null")
    browser.picture(f"timeline-{selector.strip('.').split()[0]}")
    browser.click("[data-close]")
    browser.until(lambda: not browser.run("return document.getElementById('timeline').open"))
    return told


def test_a_request_shows_its_timeline(browser: Browser) -> None:
    browser.until(lambda: browser.count(".request") > 0)
    for selector in (".answer-foot button", ".request"):
        told = timeline_of(browser, selector)
        assert "compute a chunk" in told
        assert "write the answer" in told
    assert browser.complaints() == []


def test_one_request_after_another_shows_its_timeline(browser: Browser) -> None:
    """The browser tells that a dialog was closed only after the next one is open."""
    browser.click(".request")
    browser.run(
        "document.querySelector('[data-close]').click();"
        "document.querySelector('.request:last-of-type').click()"
    )
    browser.until(lambda: browser.count("#timeline .span") > 4, shown="#timeline")
    assert browser.run("return document.querySelectorAll('.request').length") > 1
    last = browser.text(".request:last-of-type .id")
    assert last
    assert last in browser.text("#timeline-title")
    browser.click("[data-close]")
    browser.until(lambda: not browser.run("return document.getElementById('timeline').open"))


@pytest.mark.parametrize(("width", "height"), PHONES)
def test_it_fits_a_phone(browser: Browser, width: int, height: int) -> None:
    browser.see(width, height)
    try:
        browser.until(lambda: browser.run("return innerWidth") == width)
        browser.picture(f"phone-{width}")
        # With its longest contents, and over them the dialog.
        for opened in (False, True):
            if opened:
                browser.click(".request")
                browser.until(lambda: browser.count("#timeline .span") > 4)
            wide = browser.run("return document.documentElement.scrollWidth")
            assert wide <= width
            assert browser.run("return document.getElementById('timeline').scrollWidth") <= width
        browser.click("[data-close]")
        small = browser.run(
            "return [...document.querySelectorAll('button')].filter((b) => b.offsetParent)"
            ".filter((b) => b.offsetHeight < 36 || b.offsetWidth < 36).map((b) => b.outerHTML)"
        )
        assert small == [], "too small to touch"
    finally:
        browser.see(1440, 1000)


def test_it_is_light_or_dark_as_asked_and_can_be_read_either_way(browser: Browser) -> None:
    grounds = {}
    for dark in (False, True):
        browser.see(1440, 1000, dark=dark)
        time.sleep(0.7)  # a transition or two
        browser.picture("desktop-dark" if dark else "desktop-light")
        grounds[dark] = browser.run("return getComputedStyle(document.body).backgroundColor")
        pale = browser.run(CONTRAST)
        assert pale == [], f"dark={dark}"
    browser.see(1440, 1000)
    assert grounds[False] != grounds[True]


# Texts whose contrast with what lies behind them is below 4.5.
CONTRAST = """
const channels = (text) => text.match(/[0-9.]+/g).map(Number);
const light = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const bright = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = channels(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] > 0.9) return found;
  }
  return [255, 255, 255];
};
const pale = [];
for (const node of document.querySelectorAll('body *')) {
  const said = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!said || !node.offsetParent || node.closest('.unseen, .skip, script, noscript')) continue;
  const [a, b] = [bright(channels(getComputedStyle(node).color)), bright(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) pale.push(`${node.tagName} ${node.className} ${node.textContent} ${ratio}`);
}
return pale;
"""


def test_a_router_that_does_not_answer_is_said_not_to(browser: Browser, cluster: Cluster) -> None:
    os.kill(cluster.router_pid, signal.SIGSTOP)
    try:
        browser.until(lambda: "No answer from the router" in browser.text("#notice"))
        assert browser.run("return document.body.classList.contains('stale')")
    finally:
        os.kill(cluster.router_pid, signal.SIGCONT)
    browser.until(lambda: browser.text("#notice") == "")
    assert not browser.run("return document.body.classList.contains('stale')")
