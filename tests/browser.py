"""Headless Chromium, which the tests of the page drive. (A fixture: `from browser import browser`.)"""

import json
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest


class Browser:
    """Headless Chromium, spoken to over a pipe in the DevTools protocol: one page,
    real mouse and keyboard events."""

    def __init__(self, folder):
        to_child, self.to = os.pipe()
        self.back, from_child = os.pipe()
        root = ["--no-sandbox"] if os.geteuid() == 0 else []    # as root, Chromium's sandbox refuses to start
        self.process = subprocess.Popen(
            ["chromium", "--headless", "--disable-gpu", f"--user-data-dir={folder}",
             "--remote-debugging-pipe", *root],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),                                            # the pipe is there by convention
            preexec_fn=lambda: (os.dup2(to_child, 3), os.dup2(from_child, 4)))
        os.close(to_child), os.close(from_child)
        self.count, self.events, self.received, self.session = 0, [], b"", {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.do(
            "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.received:
            assert select.select([self.back], [], [], 60)[0], "Chromium does not answer"
            some = os.read(self.back, 1 << 20)
            assert some, "Chromium has ended"
            self.received += some
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def do(self, method, **params):
        """The result of a command of the protocol; what happens meanwhile is kept in `events`."""
        self.count += 1
        os.write(self.to, json.dumps(
            {"id": self.count, "method": method, "params": params, **self.session}).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path, width=1280, height=900, dark=False):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                mobile=width < 600)
        self.do("Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self.do("Page.navigate", url=Path(path).resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def js(self, expression):
        """The value of an expression on the page."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point_at(self, x, y):
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                    "ArrowDown": 40}[key]
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self):
        """What stood in the console, and what was asked for but the page itself."""
        said = [event for event in self.events
                if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                                       "Log.entryAdded")]
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return said + asked[1:]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.terminate()
    browser.process.wait()
