"""Chromium without a window, driven through chromedriver by its own protocol (JSON over HTTP)."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Return the reason why there is no browser to test with, or None."""
    if not any(map(shutil.which, NAMES)):
        return "needs chromium (Debian: apt install chromium)"
    return None if shutil.which("chromedriver") else "needs chromedriver (Debian: apt install chromium-driver)"


@dataclass
class Browser:
    """One session."""

    url: str

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **params: Any) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": command, "params": params})

    def look(self, width: int, dark: bool = False, media: str = "screen") -> None:
        """Be a screen of that width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def open(self, page: Path) -> None:
        self.call("/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns."""
        return self.call("/execute/sync", {"script": script, "args": arguments})

    def press(self, *keys: str) -> None:
        """Keys, in turn, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def shoot(self, path: Path) -> None:
        """The whole page as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Return the messages of the console since the last call."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that pages asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.call("/se/log", {"type": "performance"})]
        sent = [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith(("data:", "chrome:", "about:"))]


@contextlib.contextmanager
def chromium(*, scripts: bool = True) -> Iterator[Browser]:
    """A fresh session, ended with everything that it started."""
    binary = next(filter(None, map(shutil.which, NAMES)))
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = _port(driver)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options: dict[str, Any] = {"binary": binary, "args": arguments}
        if not scripts:
            options["prefs"] = {"webkit.webprefs.javascript_enabled": False, "profile.default_content_setting_values.javascript": 2}  # fmt: skip
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        root = Browser(f"http://127.0.0.1:{port}/session")
        session = root.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        browser = Browser(f"{root.url}/{session}")
        try:
            yield browser
        finally:
            browser.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(10)


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    until = time.monotonic() + 60
    for line in driver.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(". \n").rsplit(" ", 1)[1])
        assert time.monotonic() < until
    raise AssertionError("chromedriver ended before it had started")
