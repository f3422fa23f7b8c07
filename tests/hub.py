"""The Hugging Face hub in small, for the tests that download. (A fixture: `from hub import hub`.)"""

import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import run_script


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub in small. The server has: `files` (path to bytes); `gated` paths, for the token
    "good" only; `moved` paths, to others of its own; `stored` paths, which redirect to another host and tell
    their sha256; `rows` of its rows service; `cut`, after how many bytes each answer stops;
    and what it has `seen`."""

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
            if (query["dataset"], query["config"], query["split"]) != (
                    "allenai/reward-bench", "default", "filtered"):
                return self.send_error(404)
            start, length = int(query["offset"]), int(query["length"])
            assert length <= 100
            rows = [{"row_idx": i, "row": row, "truncated_cells": []}
                    for i, row in enumerate(server.rows)][start:start + length]
            self.send(json.dumps({"rows": rows, "num_rows_total": len(server.rows),
                                  "num_rows_per_page": 100}).encode())
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url + "/")
        patch.delenv("HF_TOKEN", raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        status, out, error = run_script(script, *options)
    return status, out, error.splitlines()[-1] if error else ""
