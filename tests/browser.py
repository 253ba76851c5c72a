"""A real browser for tests: headless Chromium, driven over its own protocol through two pipes; no library is needed.

with browser() as page:
    page.open(path)
    page.evaluate("document.title")
"""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowLeft": (37, ""), "ArrowRight": (39, ""), "n": (78, "n")}


class Page:
    """One tab. Every method returns once the browser has done it; `said` is what its console said."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the protocol. Raises RuntimeError for the browser's error, or its end."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))
            if answer.get("method") == "Network.requestWillBeSent":
                url = answer["params"]["request"]["url"]
                self.said += [] if url.startswith(("file:", "about:")) else [f"request for {url}"]
            if answer.get("method") == "Network.loadingFailed":
                self.said.append(f"blocked: {answer['params'].get('blockedReason')}")

    def _read(self) -> bytes:
        assert self._process.stdout
        parts = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            parts += byte
        return bytes(parts)

    def open(self, path: Path, part: str = "") -> None:
        """Loads a file and waits until its script has set `data-ready-ms`; `said` begins anew."""
        self.send("Page.navigate", url="about:blank")
        self.said.clear()
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}{part}")
        self.wait("document.body?.dataset.readyMs !== undefined")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited. Raises RuntimeError with what it throws."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {json.dumps(done['exceptionDetails'])[:500]}")
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise RuntimeError(f"after {seconds} s still not: {condition}; the console said {self.said}")
            time.sleep(0.02)

    def point(self, element: str) -> None:
        """Moves the mouse to the middle of an element, given as a JavaScript expression."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._middle(element))

    def click(self, element: str) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, **self._middle(element), **pressed)

    def press(self, key: str) -> None:
        code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _middle(self, element: str) -> dict[str, float]:
        # Of the first box: a token that is broken over two lines has its middle between them.
        return self.evaluate(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'nearest'}}); const b = e.getClientRects()[0];"
            "return {x: b.left + b.width / 2, y: b.top + b.height / 2}; })()"
        )


@contextmanager
def browser() -> Iterator[Page]:
    assert CHROMIUM
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--no-first-run", "--force-color-profile=srgb"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium's sandbox does not work for root
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        line = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", CHROMIUM, *flags]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                yield Page(process)
            finally:
                process.kill()
