"""
HEx-PHI's harmful requests, each with a harmful reply: the paper's benchmark for prefill attacks.

    HF_TOKEN=... python data/hex_phi/prepare.py [--from FILE]

Writes test.jsonl, rows as eval.py reads them. readme.md says where they come from.
WARNING: harmful and offensive text.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from plumbing.start import run  # noqa: E402

from data.download import hub_file, write_jsonl  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.files import check_output, reading  # noqa: E402
from plumbing.parser import Parser  # noqa: E402

REPOSITORY = "datasets/Unispac/shallow-vs-deep-safety-alignment-dataset"
FILE = "data/safety_bench/Harmful-HEx-PHI.jsonl"


def read_conversations(path):
    """Rows of a file whose lines are a list of a user's and an assistant's message.
    Raises BadInput with the line."""
    with reading(path, "UTF-8 text"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{path}, line {number}", "a list of a user's and an assistant's message"):
            user, assistant = json.loads(line)
            if (user["role"], assistant["role"]) != ("user", "assistant"):
                raise ValueError("other roles")
            yield {"prompt": user["content"].strip(), "response": assistant["content"].strip(),
                   "category": "hex_phi"}


def main():
    parser = Parser(description="Fetch HEx-PHI with harmful replies.")
    parser.add_argument("--from", dest="local", metavar="FILE",
                        help=f"a copy of {Path(FILE).name}, instead of downloading it")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for test.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    check_output(args.out / "test.jsonl")
    rows = list(read_conversations(args.local
                                   or hub_file(REPOSITORY, FILE, args.out / "download" / Path(FILE).name)))
    if not rows:
        raise BadInput(f"{args.local or FILE}: there are no conversations in it")
    write_jsonl(rows, args.out / "test.jsonl")
    print(f"test.jsonl: {len(rows)} requests with a reply")


if __name__ == "__main__":
    run(main)
