"""
Files from their publishers, for the prepare.py of each folder here: resumed where they were cut off,
complete or not there.

    fetch(url, path)                                    one file
    hub_file("datasets/OWNER/NAME", "a/file", path)     one file of the Hugging Face hub
    hub_rows("OWNER/NAME", "default", "train", folder)  all rows of a data set there, without a parquet
                                                        library

HF_TOKEN, where set, is sent to the hub (gated files need it). HF_ENDPOINT names another hub for files; the
rows service has an address of its own.
"""

import hashlib
import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from plumbing.errors import BadInput
from plumbing.files import read_json, write_file

ROWS_SERVICE = "https://datasets-server.huggingface.co"
ROWS_A_PAGE = 100                                       # the most that it gives at once


class NotThere(BadInput):
    """The server, or the folder, has no such file."""


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, to another host without the token, and keeps what the hub says of a large file
    before it sends one to where that is stored."""

    def __init__(self):
        self.sha256 = None

    def redirect_request(self, request, file, code, message, headers, url):
        etag = headers.get("X-Linked-ETag", "").strip('"')
        self.sha256 = etag if len(etag) == 64 else self.sha256
        new = super().redirect_request(request, file, code, message, headers, url)
        if new and (new.type, new.host) == (request.type, request.host):
            new.unredirected_hdrs |= request.unredirected_hdrs
        return new


def fetch(url, path, token=None, ask_at=None):
    """Download a file unless it is there, and return its path. What an interrupted download left in
    PATH.partial is gone on with; size and, where a redirect tells it as the hub's do, sha256 are checked.
    token: sent as a bearer token to this host, but to none that it redirects to. ask_at: where access can be
    asked for. Raises BadInput, in one line, when the file cannot be had or comes incomplete; NotThere when
    there is none."""
    path = Path(path)
    if path.exists():
        return path
    partial = path.with_name(path.name + ".partial")
    request = urllib.request.Request(url)
    redirect = Redirect()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        if have:
            request.add_header("Range", f"bytes={have}-")
        with urllib.request.build_opener(redirect).open(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0  # 200: all of it comes, from the beginning
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(partial, "ab" if have else "wb") as file, tqdm(
                    desc=path.name, total=total, initial=have, unit="B", unit_scale=True,
                    file=sys.stderr) as bar:
                while block := answer.read(1 << 20):
                    bar.update(file.write(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise refusal(url, error, ask_at) from None
        # There is nothing after what we have: unless that is all of it, it is of another file.
        total = int(error.headers.get("Content-Range", "/-1").split("/")[1])
        if total != have:
            partial.unlink()
            return fetch(url, path, token, ask_at)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise BadInput(f"{url} could not be downloaded ({getattr(error, 'reason', error)}); "
                       "run this again to go on") from None
    if total is not None and partial.stat().st_size != total:
        raise BadInput(f"{url} was cut off after {partial.stat().st_size} of {total} bytes; "
                       "run this again to go on")
    if redirect.sha256 and sha256(partial) != redirect.sha256:
        partial.unlink()
        raise BadInput(f"{url}: the download differs from the hub's file (other sha256); run this again")
    os.replace(partial, path)
    return path


def refusal(url, error, ask_at):
    """What to raise for a server's HTTPError."""
    reasons = {401: "it asks for access", 403: "access was refused", 404: "there is no such file"}
    reason = reasons.get(error.code, error.reason)
    if error.code in (401, 403) and ask_at:
        reason += f"; ask for it at {ask_at}, and set HF_TOKEN to a token of that account"
    return (NotThere if error.code == 404 else BadInput)(f"{url}: {reason} (HTTP {error.code})")


def sha256(path):
    """The sha256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_token():
    """HF_TOKEN, or None. Raises BadInput, which does not show it, for one that cannot be sent."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise BadInput("HF_TOKEN has characters that no token has; expected one word such as hf_...")
    return token or None


def hub_file(repository, name, path, revision="main"):
    """Download one file of a hub repository ("OWNER/NAME", of data sets "datasets/OWNER/NAME").
    Raises as `fetch`."""
    server = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if urllib.parse.urlsplit(server).scheme not in ("http", "https"):
        raise BadInput(f"HF_ENDPOINT = {server!r}: expected an address such as https://huggingface.co")
    page = f"{server.rstrip('/')}/{repository}"
    quote = urllib.parse.quote
    return fetch(f"{page}/resolve/{quote(revision, safe='')}/{quote(name)}", path, hub_token(), page)


def hub_rows(dataset, config, split, folder, server=ROWS_SERVICE):
    """All rows of a split, in order, page by page through the hub's rows service. The pages stay in `folder`,
    so that what was interrupted goes on. Raises BadInput as `fetch`, and for a page that is not what
    it should be."""
    offset = 0
    total = 1
    while offset < total:
        query = urllib.parse.urlencode({"dataset": dataset, "config": config, "split": split,
                                        "offset": offset, "length": ROWS_A_PAGE})
        path = Path(folder) / f"{split}-{offset:06d}.json"
        token = hub_token() if server == ROWS_SERVICE else None
        fetch(f"{server.rstrip('/')}/rows?{query}", path, token, f"https://huggingface.co/datasets/{dataset}")
        page = read_json(path)
        try:
            total = page["num_rows_total"]
            rows = page["rows"]
            expected = min(ROWS_A_PAGE, total - offset)
            if [row["row_idx"] for row in rows] != list(range(offset, offset + expected)) or any(
                    row["truncated_cells"] for row in rows):
                raise ValueError("rows are missing or cut off")
            yield from (row["row"] for row in rows)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path}: not a page of {dataset} ({type(error).__name__}: {error}); "
                           "delete it and run this again") from None
        offset += expected


def write_jsonl(rows, path):
    """One JSON object a line."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
