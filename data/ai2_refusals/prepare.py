"""
The requests of RewardBench that should be refused, each with a reply that complies: AI2's refusals,
as in the paper.

    python data/ai2_refusals/prepare.py

Writes test.jsonl, rows as eval.py reads them. readme.md says where they come from.
WARNING: harmful and offensive text.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from plumbing.start import run  # noqa: E402

from data.download import ROWS_SERVICE, hub_rows, write_jsonl  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.files import check_output  # noqa: E402
from plumbing.parser import Parser  # noqa: E402

DATASET = "allenai/reward-bench"
CONFIG = "default"
SPLIT = "filtered"
SUBSETS = "refusals-"


def main():
    parser = Parser(description="Fetch the refusals of RewardBench.")
    parser.add_argument("--server", default=ROWS_SERVICE, help="the hub's rows service")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for test.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    check_output(args.out / "test.jsonl")
    rows = []
    for row in hub_rows(DATASET, CONFIG, SPLIT, args.out / "download", args.server):
        fields = [row.get(key) for key in ("prompt", "rejected", "subset")]
        if not all(isinstance(field, str) for field in fields):
            raise BadInput(f"{DATASET}: a row without the texts prompt, rejected and subset; "
                           "the data set has changed")
        if row["subset"].startswith(SUBSETS):
            rows.append({"prompt": row["prompt"].strip(), "response": row["rejected"].strip(),
                         "category": row["subset"]})
    if not rows:
        raise BadInput(f"{DATASET}, split {SPLIT}: no row has a subset {SUBSETS}...; "
                       "the data set has changed")
    write_jsonl(rows, args.out / "test.jsonl")
    for subset in dict.fromkeys(row["category"] for row in rows):
        print(f"test.jsonl: {subset}: {sum(row['category'] == subset for row in rows)} requests with a reply")


if __name__ == "__main__":
    run(main)
