"""Downloads go on where they were cut off, keep the token to the host that it is for, and fail in one line."""

import http.server
import json
import os
import subprocess
import sys
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT

from data.download import fetch
from model import BadInput

HEX_PHI = "/datasets/Unispac/shallow-vs-deep-safety-alignment-dataset/resolve/main/data/safety_bench/Harmful-HEx-PHI.jsonl"
CONVERSATIONS = [[{"role": "user", "content": f" Request {i} "}, {"role": "assistant", "content": f"Sure,\u2028here {i}"}]
                 for i in range(20)]
ROWS = [{"prompt": f"Request {i}", "chosen": "No.", "rejected": f"Sure, here {i}",
         "subset": "refusals-dangerous" if i % 100 == 7 else "refusals-offensive" if i == 220 else "xstest-should-refuse"}
        for i in range(230)]


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub in small: a gated file behind a redirect to another host, and the rows service. The server's `cut` is
    after how many bytes an answer stops."""

    def do_GET(self):
        url, server = urlsplit(self.path), self.server
        server.seen.append((url.path, dict(self.headers)))
        if url.path == HEX_PHI:
            if self.headers.get("Authorization") != "Bearer good":
                return self.send_error(403 if "Authorization" in self.headers else 401)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/cdn/file")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if url.path == "/rows":
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if (query["dataset"], query["config"], query["split"]) != ("allenai/reward-bench", "default", "filtered"):
                return self.send_error(404)
            start, length = int(query["offset"]), int(query["length"])
            assert length <= 100
            rows = [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)][start:start + length]
            return self.send(json.dumps({"rows": rows, "num_rows_total": len(ROWS), "num_rows_per_page": 100}).encode())
        if url.path == "/cdn/file":
            return self.send("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in CONVERSATIONS).encode())
        self.send_error(404)

    def send(self, body):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.cut = [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def prepare(hub, name, out, *options, token=None):
    """Run data/NAME/prepare.py against the hub: (exit status, stdout, last line of stderr)."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | {"HF_ENDPOINT": hub.url + "/"}
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run([sys.executable, f"data/{name}/prepare.py", "--out", out, *options], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr.splitlines()[-1] if done.stderr else ""


def test_hex_phi(hub, tmp_path):
    """Gated, cut off, resumed: in the end every conversation is a row, and the token stayed with the hub."""
    for token, code in ((None, "401"), ("bad", "403")):
        status, _, error = prepare(hub, "hex_phi", tmp_path, token=token)
        assert status == 2 and code in error and "HF_TOKEN" in error
        assert f"{hub.url}/datasets/Unispac/shallow-vs-deep-safety-alignment-dataset" in error      # where to ask
    hub.cut = 300
    status, _, error = prepare(hub, "hex_phi", tmp_path, token="good")
    assert status == 2 and "cut off after 300 of" in error and not (tmp_path / "test.jsonl").exists()
    hub.cut = None
    status, out, _ = prepare(hub, "hex_phi", tmp_path, token="good")
    assert status == 0 and "20 requests" in out
    assert [headers.get("Range") for path, headers in hub.seen if path == "/cdn/file"] == [None, "bytes=300-"]
    assert not any("Authorization" in headers for path, headers in hub.seen if path == "/cdn/file")
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert rows[3] == {"prompt": "Request 3", "response": "Sure,\u2028here 3", "category": "hex_phi"} and len(rows) == 20
    asked = len(hub.seen)
    assert prepare(hub, "hex_phi", tmp_path)[0] == 0 and len(hub.seen) == asked                     # it is there


def test_a_copy_of_hex_phi_is_checked_line_by_line(hub, tmp_path):
    good, bad = json.dumps(CONVERSATIONS[0]), json.dumps(CONVERSATIONS[0][::-1])
    (tmp_path / "copy.jsonl").write_text(f"{good}\n{good}\n")
    assert prepare(hub, "hex_phi", tmp_path, "--from", tmp_path / "copy.jsonl")[0] == 0
    kept = (tmp_path / "test.jsonl").read_text()
    for line in (bad, "{", '{"prompt": "a"}', "[1, 2]"):
        (tmp_path / "copy.jsonl").write_text(f"{good}\n{line}\n")
        status, _, error = prepare(hub, "hex_phi", tmp_path, "--from", tmp_path / "copy.jsonl")
        assert status == 2 and "line 2" in error and (tmp_path / "test.jsonl").read_text() == kept


def test_ai2_refusals(hub, tmp_path):
    """Page by page; an interrupted run asks for the missing pages only."""
    hub.cut = 9_000                                         # the first two pages are longer, the last is not
    status, _, error = prepare(hub, "ai2_refusals", tmp_path, "--server", hub.url)
    assert status == 2 and "cut off after 9000 of" in error
    hub.cut = None
    status, out, _ = prepare(hub, "ai2_refusals", tmp_path, "--server", hub.url)
    assert status == 0 and "refusals-dangerous: 3" in out and "refusals-offensive: 1" in out
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows[1] == {"prompt": "Request 107", "response": "Sure, here 107", "category": "refusals-dangerous"}
    assert [row["prompt"] for row in rows] == ["Request 7", "Request 107", "Request 207", "Request 220"]
    (tmp_path / "download" / "filtered-000100.json").unlink()
    asked = len(hub.seen)
    assert prepare(hub, "ai2_refusals", tmp_path, "--server", hub.url)[0] == 0 and len(hub.seen) == asked + 1
    (tmp_path / "download" / "filtered-000100.json").write_text('{"rows": [], "num_rows_total": 230}')
    status, _, error = prepare(hub, "ai2_refusals", tmp_path, "--server", hub.url)
    assert status == 2 and "filtered-000100.json" in error and "delete it" in error


def test_what_is_not_there_is_named_in_one_line(hub, tmp_path):
    with pytest.raises(BadInput, match="absent.*no such file.*404"):
        fetch(f"{hub.url}/absent", tmp_path / "file")
    with pytest.raises(BadInput, match="could not be downloaded.*refused"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_partial_file_that_is_too_long_is_begun_anew(hub, tmp_path):
    (tmp_path / "file.partial").write_bytes(bytes(100_000))
    assert json.loads(fetch(f"{hub.url}/cdn/file", tmp_path / "file").read_text(encoding="utf-8").split("\n")[0]) == CONVERSATIONS[0]
