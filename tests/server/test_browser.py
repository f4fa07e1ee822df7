"""The API page in a real browser, headless Chromium: the form, the tabs, dark mode, and who else may call."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from alone import environment_at
from conftest import golden
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from test_serve import Server, busy, running, wait_for

ANSWER = golden()[0].answer
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--no-proxy-server"),
    *("--window-size=1280,1000", "--force-prefers-reduced-motion"),  # or a click waits for scrolling
    "--host-resolver-rules=MAP foreign.example 127.0.0.1",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(environment_at(tmp_path_factory.mktemp("home")), "-q") as started:
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Server) -> webdriver.Chrome:
    """The page, just loaded."""
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # type: ignore[no-untyped-call]
    chromium.get(server.url)
    return chromium


def at(page: webdriver.Chrome, id: str) -> WebElement:
    return page.find_element(By.ID, id)


def fill(page: webdriver.Chrome, **values: str) -> None:
    for name, value in values.items():
        field = at(page, name)
        field.clear()
        field.send_keys(value)


def add(page: webdriver.Chrome, fields: dict[str, Any]) -> None:
    """Have the form's requests carry fields that it has no input for."""
    page.execute_script(
        "const send = window.fetch, more = arguments[0]; window.fetch = (url, options) =>"
        "send(url, {...options, body: JSON.stringify({...JSON.parse(options.body), ...more})});",
        fields,
    )


def until(page: webdriver.Chrome, happens: Any) -> None:
    WebDriverWait(page, 30, poll_frequency=0.05).until(lambda _: happens())


def test_the_form_streams_an_answer_and_nothing_is_loaded_from_elsewhere(
    page: webdriver.Chrome, server: Server
) -> None:
    fill(page, temperature="0")
    at(page, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, lambda: at(page, "progress").text.startswith("Done in"))
    assert at(page, "written").text == ANSWER
    figures = at(page, "figures").text
    assert "79 tokens" in figures and "93 tokens" in figures and "Trace id" in figures
    entries = page.get_log("performance")  # type: ignore[no-untyped-call]
    messages = [json.loads(entry["message"])["message"] for entry in entries]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert f"{server.url}/v1/getData" in asked and all(url.startswith(server.url) for url in asked)
    assert page.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_what_the_model_writes_is_text_and_no_html(page: webdriver.Chrome) -> None:
    """The grammar makes the model write markup; the page shows it as it is."""
    schema = {"const": "<img src=x onerror=document.title='run'>"}
    add(page, {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}})
    at(page, "send").click()
    until(page, lambda: at(page, "progress").text.startswith("Done in"))
    assert at(page, "written").text == json.dumps(schema["const"])
    assert at(page, "written").find_elements(By.CSS_SELECTOR, "*") == [] and page.title.startswith("Llama 2 API")


def test_stop_stops_the_server_too(page: webdriver.Chrome, server: Server) -> None:
    add(page, {"ignore_eos": True, "temperature": 2, "top_k": 0, "top_p": 1})
    at(page, "send").click()
    until(page, lambda: at(page, "written").text)
    at(page, "stop").click()
    until(page, lambda: at(page, "progress").text.startswith("Stopped after"))
    assert at(page, "send").is_enabled() and not at(page, "stop").is_enabled()
    wait_for(lambda: busy(server) == 0)


def test_an_error_is_shown_with_its_code_message_and_trace_id(page: webdriver.Chrome) -> None:
    fill(page, temperature="3")
    at(page, "send").click()
    until(page, lambda: at(page, "error").is_displayed())
    code, message, trace = at(page, "error").text.splitlines()
    assert (code, message) == ("Error 400", "temperature must be between 0 and 2, not 3")
    assert trace.startswith("traceId ") and at(page, "error").get_attribute("role") == "alert"


def test_tabs_go_by_arrow_keys_and_only_one_is_a_tab_stop(page: webdriver.Chrome) -> None:
    def chosen() -> list[str]:
        return [e.text for e in page.find_elements(By.CSS_SELECTOR, "[role=tab][aria-selected=true]")]

    def shown() -> list[str | None]:
        return [
            e.get_attribute("id") for e in page.find_elements(By.CSS_SELECTOR, "[role=tabpanel]") if e.is_displayed()
        ]

    at(page, "tab-curl").click()
    for key, title, panel in [
        (Keys.ARROW_RIGHT, "Python", "panel-python"),
        (Keys.END, "HTTP", "panel-http"),
        (Keys.ARROW_RIGHT, "curl", "panel-curl"),
        (Keys.ARROW_LEFT, "HTTP", "panel-http"),
        (Keys.HOME, "curl", "panel-curl"),
    ]:
        page.switch_to.active_element.send_keys(key)
        assert (chosen(), shown(), page.switch_to.active_element.text) == ([title], [panel], title)
    stops = page.find_elements(By.CSS_SELECTOR, "[role=tab]:not([tabindex='-1'])")
    assert len(stops) == 1


def test_the_keyboard_reaches_the_content_first_and_copies(page: webdriver.Chrome, server: Server) -> None:
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the content"
    permission = {"origin": server.url, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.execute_cdp_cmd("Browser.grantPermissions", permission)
    button = page.find_element(By.CSS_SELECTOR, "#panel-curl button.copy")
    button.send_keys(Keys.ENTER)
    until(page, lambda: button.text == "Copied")
    copied = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == at(page, "sample-curl").text and server.url in copied


def test_it_is_dark_where_the_system_is_and_fits_a_narrow_screen(page: webdriver.Chrome) -> None:
    def ground(scheme: str) -> str:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    assert (ground("light"), ground("dark")) == ("rgb(251, 251, 253)", "rgb(18, 17, 23)")
    ground("light")
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide, room = page.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide == room <= 360
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_key_is_sent_and_stored_nowhere(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    with running(environment_at(tmp_path), "-q", "--api-key", "secret") as closed:
        chromium.get(closed.url)
        at(chromium, "send").click()
        until(chromium, lambda: "Error 401" in at(chromium, "error").text)
        fill(chromium, key="secret", temperature="0")
        at(chromium, "send").click()
        until(chromium, lambda: at(chromium, "written").text == ANSWER)
        stored = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
        assert "secret" not in chromium.execute_script(stored)
        chromium.refresh()
        assert at(chromium, "key").get_attribute("value") == ""


# -- other pages -------------------------------------------------------------------------------------------------


class _EmptyPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>other</title><link rel=icon href='data:,'>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def another_site() -> Iterator[int]:
    """The port of a server with a page that has nothing to do with ours."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield other.server_port
        other.shutdown()
        thread.join()


CALL = """
const [url, done] = arguments;
fetch(url, {method: "POST", headers: {"Content-Type": "application/json", "Cache-Control": "no-cache"},
            body: JSON.stringify({prompt: "Tell me about llama2", temperature: 0})})
  .then((reply) => reply.json()).then((answer) => done(answer.response ?? answer), (error) => done(error.name));
"""


def test_a_page_of_this_machine_may_call_and_a_foreign_one_may_not(chromium: webdriver.Chrome, server: Server) -> None:
    with another_site() as port:
        chromium.get(f"http://localhost:{port}/")
        assert chromium.execute_async_script(CALL, f"{server.url}/v1/getData") == ANSWER
        chromium.get(f"http://foreign.example:{port}/")
        assert chromium.title == "other"
        assert chromium.execute_async_script(CALL, f"{server.url}/v1/getData") == "TypeError"
    # Nor by a name of its own for this machine.
    chromium.get(f"http://foreign.example:{urlsplit(server.url).port}/")
    assert "is not this machine" in chromium.find_element(By.TAG_NAME, "body").text
