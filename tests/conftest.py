import hashlib
import http.server
import io
import json
import os
import re
import runpy
import select
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SMOLLM2 = ROOT / "data" / "smollm2"
sys.path.insert(0, str(ROOT))

from model import Llama, Template               # noqa: E402
from mrm import load_adapter, load_released_mrm     # noqa: E402


# ---------------------------------------------------------------------------------------------------------------
# exercises: tests marked exercise(N, points=P), graded by `python -m pytest tests --exercise N`

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, metavar="N", help="run the tests of one exercise and count its points")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes half a minute or more")
    config.addinivalue_line("markers", "exercise(N, points): checks exercise N, and is worth so many points if all of it passes")
    config.grades = {}                                  # test function -> (points, [outcome of each case])


def exercise_of(item):
    """The number of the exercise that a test checks, or None."""
    marker = item.get_closest_marker("exercise")
    return marker and marker.args[0]


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--exercise")
    if wanted is not None:
        numbers = sorted({exercise_of(item) for item in items} - {None})
        if wanted not in numbers:
            raise pytest.UsageError(f"no test checks exercise {wanted}: those of {', '.join(map(str, numbers))} are there; "
                                    "an open-ended one is graded by its report")
        config.hook.pytest_deselected(items=[item for item in items if exercise_of(item) != wanted])
        items[:] = [item for item in items if exercise_of(item) == wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that comes to what another exercise has left open is skipped, not failed."""
    report = yield
    error, mine = call.excinfo and call.excinfo.value, exercise_of(item)
    if isinstance(error, NotImplementedError) and (missing := re.match(r"exercise (\d+)", str(error))):
        if int(missing[1]) != mine:
            report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], f"needs exercise {missing[1]}")
    if mine is not None and (report.when == "call" or report.outcome != "passed"):
        points = item.get_closest_marker("exercise").kwargs["points"]
        note = f" ({report.longrepr[2]})" if report.outcome == "skipped" else ""
        item.config.grades.setdefault(item.originalname, (points, []))[1].append(report.outcome + note)
    return report


def pytest_unconfigure(config):
    """The last thing printed: the points."""
    if config.getoption("--exercise") is not None and config.grades:
        total = 0
        print(f"\nexercise {config.getoption('--exercise')}")
        for name, (points, outcomes) in config.grades.items():
            worst = next((outcome for outcome in outcomes if outcome != "passed"), "passed")
            earned = points if worst == "passed" else 0
            total += earned
            cases = f" ({outcomes.count(worst)} of {len(outcomes)} cases)" if earned < points and len(outcomes) > 1 else ""
            print(f"  {earned} of {points}  {name}: {worst}{cases}")
        print(f"{total} of {sum(points for points, _ in config.grades.values())} points")


@pytest.fixture(scope="session")
def golden_search():
    """The search of the paper's authors, run on the two tiny models: prompts, frontiers, outputs."""
    return json.loads((GOLDEN / "search.json").read_text())


@pytest.fixture(scope="session")
def tiny_policy(golden_search):
    llama = Llama.load(GOLDEN / "tiny_policy", torch.float64)
    llama.template = Template(golden_search["policy_prefix"], golden_search["policy_infix"])
    return llama


@pytest.fixture(scope="session")
def tiny_guard():
    return Llama.load(GOLDEN / "tiny_guard", torch.float64)


@pytest.fixture(scope="session")
def tiny_mrm(tiny_guard, golden_search):
    template = Template(golden_search["mrm_prefix"], golden_search["mrm_infix"])
    return load_released_mrm(GOLDEN / "tiny_mrm", tiny_guard, template)


@pytest.fixture(scope="session")
def smollm2_folder():
    """The default weights, made on the first run and kept."""
    if not (SMOLLM2 / "model.safetensors").exists():
        subprocess.run([sys.executable, SMOLLM2 / "prepare.py"], check=True)
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    return Llama.load(smollm2_folder)


@pytest.fixture(scope="session")
def guard(smollm2):
    return load_adapter(SMOLLM2 / "guard.safetensors", smollm2, "guard")


@pytest.fixture(scope="session")
def mrm(smollm2):
    return load_adapter(SMOLLM2 / "mrm.safetensors", smollm2, "mrm")


@pytest.fixture(scope="session")
def public_data():
    """The folder with the publishers' data sets, named by SAFFRON_DATA."""
    folder = os.environ.get("SAFFRON_DATA")
    if not folder:
        pytest.skip("SAFFRON_DATA does not name a folder with the public data sets")
    return Path(folder)


def run_script(script, *args, stdin=""):
    """Run one of the repository's scripts from its first line, as `python script args` in its folder would, but in this
    process, which has imported torch already: (exit status, stdout, stderr)."""
    text = lambda content=b"": io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    out, err, status = text(), text(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in (("argv", [str(script), *map(str, args)]), ("stdin", text(stdin.encode())), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, value)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else print(end.code, file=err) or 1
        for stream in (out, err):
            stream.flush()
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def torchrun(script, *args):
    """Start a script in two processes of its own, as the command line torchrun does: a subprocess.Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *args]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8")


def in_two_processes(script, *args):
    """The same to its end: (exit status, stdout, stderr)."""
    process = torchrun(script, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


class Browser:
    """Headless Chromium, spoken to over a pipe in the DevTools protocol: one page, real mouse and keyboard events."""

    def __init__(self, folder):
        to_child, self.to = os.pipe()
        self.back, from_child = os.pipe()
        root = ["--no-sandbox"] if os.geteuid() == 0 else []        # as root, Chromium's sandbox refuses to start
        self.process = subprocess.Popen(
            ["chromium", "--headless", "--disable-gpu", f"--user-data-dir={folder}", "--remote-debugging-pipe", *root],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4),     # the pipe is at 3 and 4 by convention
            preexec_fn=lambda: (os.dup2(to_child, 3), os.dup2(from_child, 4)))
        os.close(to_child), os.close(from_child)
        self.count, self.events, self.received, self.session = 0, [], b"", {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
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
        os.write(self.to, json.dumps({"id": self.count, "method": method, "params": params, **self.session}).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path, width=1280, height=900, dark=False):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
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
            code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self):
        """What stood in the console, and what was asked for but the page itself."""
        said = [event for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                                                                      "Log.entryAdded")]
        asked = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return said + asked[1:]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.terminate()
    browser.process.wait()


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub in small. The server has: `files` (path to bytes); `gated` paths, for the token "good" only;
    `moved` paths, to others of its own; `stored` paths, which redirect to another host and tell their sha256; `rows` of its rows service; `cut`, after how
    many bytes each answer stops; and what it has `seen`."""

    def do_GET(self):
        url, server = urlsplit(self.path), self.server
        server.seen.append((url.path, dict(self.headers)))
        if url.path in server.gated and self.headers.get("Authorization") != "Bearer good":
            self.send_error(403 if "Authorization" in self.headers else 401)
        elif url.path in server.moved:
            self.send_response(307)
            self.send_header("Location", server.moved[url.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif url.path in server.stored:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/cdn{url.path}")
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(server.stored[url.path]).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif url.path.startswith("/cdn/") and url.path[4:] in server.stored:
            self.send(server.files[url.path[4:]])
        elif url.path in server.files:
            self.send(server.files[url.path])
        elif url.path == "/rows" and server.rows:
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if (query["dataset"], query["config"], query["split"]) != ("allenai/reward-bench", "default", "filtered"):
                return self.send_error(404)
            start, length = int(query["offset"]), int(query["length"])
            assert length <= 100
            rows = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(server.rows)][start:start + length]
            self.send(json.dumps({"rows": rows, "num_rows_total": len(server.rows), "num_rows_per_page": 100}).encode())
        else:
            self.send_error(404)

    def send(self, body):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.gated, server.moved, server.stored = {}, set(), {}, {}
    server.rows, server.seen, server.cut = [], [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask_hub(hub, script, *options, token=None):
    """Run a script with this hub as its hub: (exit status, stdout, last line of stderr)."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | {"HF_ENDPOINT": hub.url + "/"}
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, *map(str, (script, *options))], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.splitlines()[-1] if done.stderr else ""
