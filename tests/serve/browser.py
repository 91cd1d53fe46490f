"""A headless Chromium, driven over the WebDriver protocol (W3C) by its own driver."""

from __future__ import annotations

import base64
import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Right": "\ue014", "Tab": "\ue004"}
DRIVER = shutil.which("chromedriver")


class Browser:
    """One window."""

    def __init__(self, driver: str) -> None:
        self.http = httpx.Client(base_url=driver, timeout=60)
        options = {"args": [*FLAGS, *OFFLINE, "--window-size=1200,900"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        made = self.http.post("/session", json={"capabilities": wanted}).json()["value"]
        self.at = f"/session/{made['sessionId']}"

    def call(self, path: str, **body: Any) -> Any:
        answer = self.http.post(self.at + path, json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["message"].splitlines()[0])
        return answer

    def open(self, url: str) -> None:
        self.call("/url", url=url)

    def js(self, code: str, *given: Any) -> Any:
        """What a function of this body returns."""
        return self.call("/execute/sync", script=code, args=list(given))

    def until(self, code: str, *given: Any) -> Any:
        """The same, once it is true."""
        for _ in range(400):
            if found := self.js(code, *given):
                return found
            time.sleep(0.025)
        raise AssertionError(f"never came true: {code}")

    def find(self, css: str) -> str:
        return str(self.call("/element", using="css selector", value=css)[ELEMENT])

    def click(self, css: str) -> None:
        self.call(f"/element/{self.find(css)}/click")

    def type(self, css: str, text: str) -> None:
        self.call(f"/element/{self.find(css)}/value", text=text)

    def press(self, *keys: str) -> None:
        """On what has the focus."""
        down = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": down}])

    def hover(self, css: str) -> None:
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": {ELEMENT: self.find(css)}}
        self.call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def size(self, width: int, height: int) -> None:
        self.call("/window/rect", width=width, height=height)

    def complaints(self) -> list[str]:
        """What the console holds since it was asked last."""
        return [line["message"] for line in self.call("/se/log", type="browser")]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.http.get(self.at + "/screenshot").json()["value"]))

    def quit(self) -> None:
        self.http.delete(self.at)
        self.http.close()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser, for as long as it is needed; `DRIVER` is there."""
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(line.rstrip(".\n").rpartition(" ")[2] for line in driver.stdout if "successfully" in line)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.quit()
    finally:
        driver.terminate()
        driver.wait()
