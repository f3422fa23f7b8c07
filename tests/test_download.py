"""Downloads go on where they were cut off, keep the token to the host that it is for,
and fail in one line."""

import errno
import io
import json

import pytest
from hub import ask_hub, hub                    # noqa: F401: hub is a fixture

import data.download
from data.download import NotThere, fetch
from plumbing.errors import BadInput

HEX_PHI = ("/datasets/Unispac/shallow-vs-deep-safety-alignment-dataset/resolve/main/"
           "data/safety_bench/Harmful-HEx-PHI.jsonl")
CONVERSATIONS = [[{"role": "user", "content": f" Request {i} "},
                  {"role": "assistant", "content": f"Sure,\u2028here {i}"}]
                 for i in range(20)]
ROWS = [{"prompt": f"Request {i}", "chosen": "No.", "rejected": f"Sure, here {i}",
         "subset": ("refusals-dangerous" if i % 100 == 7 else "refusals-offensive" if i == 220
                    else "xstest-should-refuse")}
        for i in range(230)]


@pytest.fixture
def published(hub):
    """The hub with the two benchmarks."""
    hub.files[HEX_PHI] = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in CONVERSATIONS).encode()
    hub.gated, hub.stored, hub.rows = {HEX_PHI}, {HEX_PHI: hub.files[HEX_PHI]}, ROWS
    return hub


def prepare(hub, name, out, *options, token=None):
    return ask_hub(hub, f"data/{name}/prepare.py", "--out", out, *options, token=token)


def test_hex_phi(published, tmp_path):
    """Gated, cut off, resumed: in the end every conversation is a row, and the token stayed with the hub."""
    for token, code in ((None, "401"), ("bad", "403")):
        status, _, error = prepare(published, "hex_phi", tmp_path, token=token)
        assert status == 2 and code in error and "HF_TOKEN" in error
        # where to ask
        assert f"{published.url}/datasets/Unispac/shallow-vs-deep-safety-alignment-dataset" in error
    published.cut = 300
    status, _, error = prepare(published, "hex_phi", tmp_path, token="good")
    assert status == 2 and "cut off after 300 of" in error and not (tmp_path / "test.jsonl").exists()
    published.cut = None
    status, out, _ = prepare(published, "hex_phi", tmp_path, token="good")
    assert status == 0 and "20 requests" in out
    assert ([headers.get("Range") for path, headers in published.seen if path.startswith("/cdn/")]
            == [None, "bytes=300-"])
    assert not any("Authorization" in headers for path, headers in published.seen if path.startswith("/cdn/"))
    rows = [json.loads(line)
            for line in (tmp_path / "test.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert (rows[3] == {"prompt": "Request 3", "response": "Sure,\u2028here 3", "category": "hex_phi"}
            and len(rows) == 20)
    asked = len(published.seen)
    assert prepare(published, "hex_phi", tmp_path)[0] == 0 and len(published.seen) == asked     # it is there


def test_a_copy_of_hex_phi_is_checked_line_by_line(published, tmp_path):
    good, bad = json.dumps(CONVERSATIONS[0]), json.dumps(CONVERSATIONS[0][::-1])
    (tmp_path / "copy.jsonl").write_text(f"{good}\n{good}\n")
    assert prepare(published, "hex_phi", tmp_path, "--from", tmp_path / "copy.jsonl")[0] == 0
    kept = (tmp_path / "test.jsonl").read_text()
    for line in (bad, "{", '{"prompt": "a"}', "[1, 2]"):
        (tmp_path / "copy.jsonl").write_text(f"{good}\n{line}\n")
        status, _, error = prepare(published, "hex_phi", tmp_path, "--from", tmp_path / "copy.jsonl")
        assert status == 2 and "line 2" in error and (tmp_path / "test.jsonl").read_text() == kept


def test_ai2_refusals(published, tmp_path):
    """Page by page; an interrupted run asks for the missing pages only."""
    published.cut = 9_000                                   # the first two pages are longer, the last is not
    status, _, error = prepare(published, "ai2_refusals", tmp_path, "--server", published.url)
    assert status == 2 and "cut off after 9000 of" in error
    published.cut = None
    status, out, _ = prepare(published, "ai2_refusals", tmp_path, "--server", published.url)
    assert status == 0 and "refusals-dangerous: 3" in out and "refusals-offensive: 1" in out
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows[1] == {"prompt": "Request 107", "response": "Sure, here 107",
                       "category": "refusals-dangerous"}
    assert [row["prompt"] for row in rows] == ["Request 7", "Request 107", "Request 207", "Request 220"]
    (tmp_path / "download" / "filtered-000100.json").unlink()
    asked = len(published.seen)
    assert (prepare(published, "ai2_refusals", tmp_path, "--server", published.url)[0] == 0
            and len(published.seen) == asked + 1)
    (tmp_path / "download" / "filtered-000100.json").write_text('{"rows": [], "num_rows_total": 230}')
    status, _, error = prepare(published, "ai2_refusals", tmp_path, "--server", published.url)
    assert status == 2 and "filtered-000100.json" in error and "delete it" in error


def test_what_is_not_there_is_named_in_one_line(hub, tmp_path):
    with pytest.raises(NotThere, match="absent.*no such file.*404"):
        fetch(f"{hub.url}/absent", tmp_path / "file")
    with pytest.raises(BadInput, match="could not be downloaded.*refused"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_what_is_left_of_another_file_is_not_used(hub, tmp_path):
    """Longer than the file, or as long, or the beginning of another one.
    And what is all of it needs no second download."""
    hub.files["/file"] = hub.stored["/file"] = b"what is there" * 9
    (tmp_path / "file.partial").write_bytes(bytes(1000))
    assert fetch(f"{hub.url}/file", tmp_path / "file").read_bytes() == hub.files["/file"]
    for left in (b"xyz", bytes(len(hub.files["/file"]))):
        (tmp_path / "other.partial").write_bytes(left)
        with pytest.raises(BadInput, match="sha256"):
            fetch(f"{hub.url}/file", tmp_path / "other")
        assert fetch(f"{hub.url}/file", tmp_path / "other").read_bytes() == hub.files["/file"]
        (tmp_path / "other").unlink()
    (tmp_path / "other.partial").write_bytes(hub.files["/file"])
    hub.cut = 0
    assert fetch(f"{hub.url}/file", tmp_path / "other").read_bytes() == hub.files["/file"]


def test_a_redirect_on_the_same_host_keeps_the_token(hub, tmp_path):
    """As the hub's to its own cache, for small files of gated repositories."""
    hub.files["/cache/file"], hub.gated, hub.moved = (
        b"small", {"/file", "/cache/file"}, {"/file": "/cache/file"})
    assert fetch(f"{hub.url}/file", tmp_path / "file", token="good").read_bytes() == b"small"


def test_a_full_disk_is_named_and_can_be_gone_on_from(hub, tmp_path, monkeypatch):
    hub.files["/file"] = b"content"

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(data.download, "open", lambda *_: Full(), raising=False)
        with pytest.raises(BadInput, match="No space left on device.*run this again"):
            fetch(f"{hub.url}/file", tmp_path / "file")
    assert fetch(f"{hub.url}/file", tmp_path / "file").read_bytes() == b"content"
