"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", "--no-proxy-server",
]  # fmt: skip


class Page:
    """One page of one browser.

    Args:
        folder: the browser's own, new.
        url: what to open.
        size: width and height of the window, in pixels.
        dark: whether the user prefers dark pages.
    """

    def __init__(self, folder: Path, url: str, size: tuple[int, int] = (1200, 900), *, dark: bool = False) -> None:
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        found = next(filter(None, (re.search(r"(ws://[^/]+)/", line) for line in self._process.stderr)))
        host = found[1].removeprefix("ws://")
        place = f"{found[0]}devtools/browser/{self._browser_id(host)}"
        self._stack = ExitStack()
        self._stack.callback(self._process.stderr.close)
        self._browser = self._stack.enter_context(connect(place, max_size=None, proxy=None))
        self._ids = itertools.count(1)
        self.errors: list[str] = []
        target = self._send(None, "Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send(None, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    @staticmethod
    def _browser_id(host: str) -> str:
        import httpx

        address: str = httpx.get(f"http://{host}/json/version", trust_env=False).json()["webSocketDebuggerUrl"]
        return address.rpartition("/")[2]

    def __call__(self, method: str, **parameters: Any) -> Any:
        """One command to the page."""
        return self._send(self._session, method, **parameters)

    def _send(self, session: str | None, method: str, **parameters: Any) -> Any:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        self._browser.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._browser.recv(timeout=30))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(event["params"]["exceptionDetails"]["text"])
        if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.errors.append(event["params"]["entry"]["text"])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} was not true in time"

    def type(self, text: str) -> None:
        """Into the focused field."""
        self("Input.insertText", text=text)

    def choose(self, selector: str, file: Path) -> None:
        """A file, in a field for files."""
        field = self("Runtime.evaluate", expression=f"document.querySelector({selector!r})")["result"]["objectId"]
        self("DOM.setFileInputFiles", files=[str(file)], objectId=field)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """A key; 2 is Ctrl."""
        for kind in ("rawKeyDown", "keyUp"):
            event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            self("Input.dispatchKeyEvent", type=kind, **event)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._stack.close()
