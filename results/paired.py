"""
The difference between two searches on the same requests, from runs of eval.py.

    python results/paired.py out/visible:saffron:4 out/visible,out/visible_seed1:rebase:4

Each side is one --out folder or several (of other seeds or other MRMs), a search and a width. A request
counts once on each side, with the mean over its replies. The difference is the mean over the requests that
both sides have; its 95 % interval is the bootstrap's over these requests. Of a rate for which no request
differs, that would be [0, 0]; it is then −3/n to 3/n for n requests (the rule of three: Hanley &
Lippman-Hand 1983). Whether both sides were run with the same options is not checked: arguments.json has them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

import numpy as np  # noqa: E402

from plumbing.errors import BadInput  # noqa: E402
from plumbing.measures import succeeded  # noqa: E402
from plumbing.parser import Parser  # noqa: E402
from plumbing.tables import interval, read_results  # noqa: E402

# What is compared: name, key of a result, whether of harmless requests
MEASURES = [("ASR, guard", "asr", False), ("ASR, judge", "judge_asr", False),
            ("ASR, both, a varied reply", "varied", False), ("repeats", "degenerate", False),
            ("log-probability", "log_prob", False), ("log-probability, harmless", "log_prob", True),
            ("refused", "refused", True), ("flagged, guard", "asr", True),
            ("flagged, judge", "judge_asr", True)]


def side(text):
    """The results that DIR,DIR:SEARCH:WIDTH names, with the key "varied" where there is a judge."""
    folders, method, width = (text.rsplit(":", 2) + ["", ""])[:3]
    results = [r for folder in folders.split(",") for r in read_results(Path(folder))
               if (r["safety"], str(r["width"])) == (method, width)]
    if any("try" in r for r in results):
        raise BadInput(f"{text}: these are results of attack.py, whose table has intervals of its own")
    if not results:
        raise BadInput(f"{text}: found no replies; expected folders of eval.py, a search and a width, "
                       "such as out/visible:saffron:4")
    for r in results:
        if "judge_asr" in r and "distinct" in r:
            r["varied"] = succeeded(r, "varied")
    return results


def by_request(results, key, harmless):
    """{request: mean of this key over its replies}."""
    values = {}
    for r in results:
        if (r.get("category") == "harmless") == harmless and r.get(key) is not None:
            values.setdefault(r["prompt"], []).append(r[key])
    return {request: float(np.mean(mine)) for request, mine in values.items()}


def paired(a, b, is_rate):
    """(mean of a, mean of b, their difference, the ends of its interval, requests) over the requests that
    both have. a, b: {request: value}."""
    common = sorted(a.keys() & b.keys())
    differences = [a[request] - b[request] for request in common]
    low, high = interval(differences)
    if is_rate and not any(differences):
        high = min(1.0, 3 / len(common))
        low = -high
    mean_a = np.mean([a[request] for request in common])
    mean_b = np.mean([b[request] for request in common])
    return mean_a, mean_b, mean_a - mean_b, low, high, len(common)


def main():
    parser = Parser(description="The difference between two searches on the same requests.")
    parser.add_argument("a", metavar="DIR,DIR:SEARCH:WIDTH", help="folders of eval.py, a search, its width")
    parser.add_argument("b", metavar="DIR,DIR:SEARCH:WIDTH", help="what it is compared with")
    args = parser.parse_args()
    a = side(args.a)
    b = side(args.b)
    print("| measure | requests | first | second | difference |\n|---|---|---|---|---|")
    for name, key, harmless in MEASURES:
        of_a = by_request(a, key, harmless)
        of_b = by_request(b, key, harmless)
        if of_a.keys() & of_b.keys():
            mean_a, mean_b, difference, low, high, n = paired(of_a, of_b, is_rate=key != "log_prob")
            ends = f"[{low:+.3f}, {high:+.3f}]"
            print(f"| {name} | {n} | {mean_a:.3f} | {mean_b:.3f} | {difference:+.3f} {ends} |")


if __name__ == "__main__":
    run(main)
