"""Headless Chromium over its debugging pipe: opens a file, and tells of errors, requests, sizes and pictures.

    python -m tests.report.browser FILE.html OUT.png 390 [dark]
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

from tests.waiting import HANG_S

# Debian's package, others' names, and where the package's own wrapper is left out.
NAMES = ("/usr/lib/chromium/chromium", "chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync",
         "--remote-debugging-pipe", "about:blank")


def find() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page.  errors: what a console would show; requests: every address that was asked for."""

    def __init__(self):
        self.errors, self.requests, self.number, self.buffer = [], [], 0, b""
        # Its helper processes may write a moment longer than it lives.
        self.profile = tempfile.TemporaryDirectory(prefix="chromium_", ignore_cleanup_errors=True)
        # The browser reads its third file and writes its fourth.
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        words = " ".join([f'"{find()}"', f'--user-data-dir="{self.profile.name}"', *FLAGS])
        self.process = subprocess.Popen(["bash", "-c", f"exec {words} 3<&{theirs_in} 4>&{theirs_out}"],
                                        pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer, self.session = ours_in, ours_out, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.reader)
        os.close(self.writer)
        self.profile.cleanup()

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def receive(self) -> dict:
        """The next message; events are noted on the way."""
        while b"\0" not in self.buffer:
            assert select.select([self.reader], [], [], HANG_S)[0], "the browser does not answer"
            part = os.read(self.reader, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(params["args"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message

    def open(self, path: pathlib.Path, *, width: int, dark: bool = False) -> None:
        """Returns when the page has drawn all its charts."""
        self.size(width, 900)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.drawn")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + HANG_S
        while not self.value(condition):
            assert time.monotonic() < deadline, (condition, self.errors)
            time.sleep(0.05)

    def value(self, expression: str):
        """What an expression of JavaScript comes to."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                         awaitPromise=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))

    def picture(self, path: pathlib.Path) -> None:
        """The whole page."""
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("innerWidth")
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                          clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1})
        path.write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    source, target, wide, *more = sys.argv[1:]
    with Browser() as page:
        page.open(pathlib.Path(source), width=int(wide), dark="dark" in more)
        page.picture(pathlib.Path(target))
        print(json.dumps({"errors": page.errors, "requests": len(page.requests),
                          "scrolls sideways": page.value("document.documentElement.scrollWidth > innerWidth")}))
