"""A real Chromium for tests, spoken to over WebDriver with nothing but the standard library.

Debian has both programs as `chromium` and `chromium-driver`. Without them a test is skipped, but under CI it fails.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
]
TIMEOUT = 60  # seconds of one command


class Browser:
    """One window. `open` begins anew: what `errors` and `requests` give is of the page that is open."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.seen: list[dict[str, Any]] = []

    def open(self, page: Path | str) -> None:
        """Load a page from its file, until it is loaded."""
        self._ask("url", {"url": "about:blank"})
        for kind in ("browser", "performance"):
            self._log(kind)
        self.seen.clear()
        self._ask("url", {"url": page.resolve().as_uri() if isinstance(page, Path) else page})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns."""
        return self._ask("execute/sync", {"script": script, "args": list(arguments)})

    def resize(self, width: int, height: int) -> None:
        """The size of what is seen of the page, in CSS pixels."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, **features: str) -> None:
        """What the page is told by media queries, such as prefers-color-scheme."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._ask("goog/cdp/execute", {"cmd": command, "params": parameters})

    def click(self, selector: str) -> None:
        """A click as a person makes it: it fails where something else lies above."""
        self._ask(f"element/{self._element(selector)}/click", {})

    def hover(self, selector: str, x: int, y: int) -> None:
        """Put the pointer so many pixels from the middle of an element."""
        origin = {"element-6066-11e4-a52e-4f735466cecf": self._element(selector)}
        moves = [{"type": "pointerMove", "duration": 0, "x": x + dx, "y": y, "origin": origin} for dx in (-4, 0)]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves}
        self._ask("actions", {"actions": [pointer]})

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)
        return found

    def errors(self) -> list[str]:
        """Errors and warnings of the console."""
        return [entry["message"] for entry in self._log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for, itself among them; what it carries in itself (data:, blob:) is not."""
        self._log("performance")
        sent = [m["params"]["request"]["url"] for m in self.seen if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is seen of the page, or all of it, as PNG."""
        taken = self.cdp(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **(self._clip() if whole else {})
        )
        path.write_bytes(base64.b64decode(taken["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.cdp("Page.printToPDF", printBackground=True)["data"]))

    def _clip(self) -> Mapping[str, Any]:
        size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _element(self, selector: str) -> str:
        found = self._ask("element", {"using": "css selector", "value": selector})
        return str(next(iter(found.values())))

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._ask("se/log", {"type": kind})
        if kind == "performance":
            self.seen += [json.loads(entry["message"])["message"] for entry in entries]
        return entries

    def _ask(self, command: str, body: Mapping[str, Any]) -> Any:
        return ask(f"{self.session}/{command}", body)


def ask(url: str, body: Mapping[str, Any] | None = None, method: str = "POST") -> Any:
    """One command of the WebDriver protocol."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with OPENER.open(request, timeout=TIMEOUT) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine, whatever proxy there is


def programs() -> tuple[str, str]:
    """Chromium and its driver; without them the test is skipped, but under CI it fails."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "no browser: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return chromium, driver


@contextlib.contextmanager
def browser(folder: Path, arguments: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser with an empty profile in a folder, for as long as the block runs."""
    chromium, driver = programs()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=log, stderr=log, env=os.environ | {"HOME": str(folder)}
        )
    try:
        root = f"http://127.0.0.1:{port}"
        _wait(root, process)
        options = {"binary": chromium, "args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}", *arguments]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = ask(f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"{root}/session/{session}")
        finally:
            ask(f"{root}/session/{session}", method="DELETE")
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def _wait(root: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if ask(f"{root}/status", method="GET")["ready"]:
                return
        time.sleep(0.05)
    raise AssertionError("the driver of the browser does not start")
