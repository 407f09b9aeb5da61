"""A headless Chromium that tests drive by its own protocol, through two pipes: no driver, no package, no port.

`open_page` is a context with a `Page`, and skips by name where there is no Chromium.
"""

import base64
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--no-first-run", "--remote-debugging-pipe")  # fmt: skip
_KEYS = {"Tab": 9, "Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "Backspace": 8}


def found() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One page: what is asked of it, and the addresses that it asked for."""

    to_it: int
    from_it: int
    session: str = ""
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    number: int = 0
    unread: bytes = b""

    def send(self, method: str, **parameters: Any) -> Any:
        """What a method of the protocol returns."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_it, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> Any:
        while b"\0" not in self.unread:
            read = os.read(self.from_it, 1 << 16)
            if not read:
                raise RuntimeError("Chromium has ended")
            self.unread += read
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        its = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.addresses.append(its["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(its["exceptionDetails"].get("exception", {}).get("description", str(its)))

    def load(self, address: str) -> None:
        """Goes to an address, and waits until all of it is there."""
        self.send("Page.navigate", url=address)
        self.run(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))"
        )

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key as a person does: Tab, an arrow, or what writes a character."""
        text = {} if key in _KEYS else {"text": key}
        code = _KEYS.get(key, ord(key[0].upper()))
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, words: str) -> None:
        """Presses the key of each character."""
        for character in words:
            self.press(character)

    def show(self, width: int, height: int, *, dark: bool = False) -> None:
        """Gives the page a screen, in light or dark."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A page of a browser whose own files lie in a folder."""
    path = found()
    if path is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(_NAMES)} is a command")
    its_end, to_it = os.pipe()
    from_it, their_end = os.pipe()
    command = shlex.join([path, *_OPTIONS, f"--user-data-dir={folder / 'profile'}"])
    browser = subprocess.Popen(
        ["bash", "-c", f"exec {command} 3<&{its_end} 4>&{their_end}"],
        pass_fds=(its_end, their_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_end)
    os.close(their_end)
    try:
        page = Page(to_it, from_it)
        target = page.send("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            page.send(f"{domain}.enable")
        yield page
    finally:
        browser.terminate()
        browser.wait()
        os.close(to_it)
        os.close(from_it)
