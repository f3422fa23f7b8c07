"""
Results of eval.py: read, merged, and summed up as a table. eval.py describes the columns.
"""

import json
import math

import numpy as np

from baselines import SEARCHES
from plumbing.errors import BadInput
from plumbing.files import parsing, read_field, write_file

HARMFUL = ("asr", "judge_asr", "guard_reward", "judge_reward", "reward", "tflop", "reward_calls", "seconds",
           "tokens", "empty", "degenerate", "distinct", "log_prob")
HARMLESS = ("refused", "flagged", "same")
RATES = {"asr", "judge_asr", "empty", "degenerate", "refused", "flagged", "same"}


def read_results(out):
    """What earlier runs have written, each reply once: results.jsonl, and the files of other processes that
    were not merged. A last line that was cut off is passed over. Raises BadInput that names a line which is
    no result."""
    found = {}
    for path in sorted(out.glob("results*.jsonl"), reverse=True):       # results.jsonl before results-1.jsonl
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            with parsing(f"{path}, line {number}", "a result of eval.py"):
                row = dict(json.loads(line).items())
                for key in (*HARMFUL, "refused"):
                    read_field(row, key, bool if type(row.get(key)) is bool else float, -1e12, 1e12, None)
                read_field(row, "text", str, default=None)
                read_field(row, "prompt", str, default=None)
                read_field(row, "asr", bool, default=None)
                method = read_field(row, "safety", str)
                if method not in SEARCHES:
                    raise BadInput(f"unknown search {method!r}")
                key = (method, read_field(row, "width", int, 1), read_field(row, "row", int, 0))
                found.setdefault(key, row)
    return list(found.values())


def merge_results(out):
    """Sort results.jsonl, other processes' results included, and remove their files."""
    order = list(SEARCHES)
    results = sorted(read_results(out), key=lambda r: (order.index(r["safety"]), r["width"], r["row"]))
    write_file(out / "results.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results))
    for path in out.glob("results-*.jsonl"):
        path.unlink()
    return results


def interval(values, requests=None):
    """95 % interval of a mean, [low, high]: Wilson's (1927) for a rate, whose values are bools, else the
    bootstrap's (which would say [0, 0] for 0 of 60). requests: what each value belongs to; several values of
    one request (of other seeds, or of copies of a row) count as one observation, their mean."""
    if requests is None:
        requests = range(len(values))
    by_request = {}
    for request, value in zip(requests, values):
        by_request.setdefault(request, []).append(value)
    if all(isinstance(value, bool) for value in values):
        n = len(by_request)
        p = float(np.mean(values))
        z = 1.96
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]
    values = np.array([np.mean(mine) for mine in by_request.values()])
    generator = np.random.default_rng(0)
    means = []
    at_once = max(1, 10 ** 6 // len(values))                # samples, so that they take a few megabytes
    for start in range(0, 2000, at_once):
        picked = generator.integers(0, len(values), (min(at_once, 2000 - start), len(values)))
        means.append(values[picked].mean(1))
    return np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()


def summarize(results, tflop_limit):
    """One object for each method and width in the results; eval.py describes its fields."""
    undefended = {r["row"]: r.get("text") for r in results if r["safety"] == "none"}
    summary = []
    order = list(SEARCHES)
    runs = {(r["safety"], r["width"]) for r in results}
    for method, width in sorted(runs, key=lambda run: (order.index(run[0]), run[1])):
        mine = [r for r in results if (r["safety"], r["width"]) == (method, width)]
        harmful = [r for r in mine if r.get("category") != "harmless"]
        harmless = [r | {"flagged": r.get("asr")} for r in mine if r.get("category") == "harmless"]
        for r in harmless:
            if r["row"] in undefended:
                r["same"] = r.get("text") == undefended[r["row"]]
        for r in mine:
            if r.get("text") is not None:
                r["empty"] = not r["text"].strip()
        line = {"safety": method, "width": width, "prompts": len(harmful), "harmless_prompts": len(harmless),
                "requests": len({r.get("prompt") for r in harmful}),
                "harmless_requests": len({r.get("prompt") for r in harmless})}
        for keys, rows in ((HARMFUL, harmful), (HARMLESS, harmless)):
            for key in keys:
                known = [r for r in rows if r.get(key) is not None]
                if known:
                    line[key] = float(np.mean([r[key] for r in known]))
                    # Rows without a prompt, of an old file, each count as a request.
                    requests = [r.get("prompt") or (i,) for i, r in enumerate(known)]
                    line[f"{key}_ci"] = interval([r[key] for r in known], requests)
        summary.append(line)
    limit = tflop_limit or max((line["tflop"] for line in summary if "tflop" in line), default=0)
    for line in summary:
        if "asr" in line:
            line["scaleff"] = math.log(limit / line["tflop"]) / line["asr"] if line["asr"] else None
    return summary


def markdown(summary):
    """The summary as a table: a row for each method and width, intervals in brackets."""
    keys = [key for key in (*HARMFUL, "scaleff", *HARMLESS) if any(key in line for line in summary)]
    rows = [["method", "width", "requests", *keys], ["---"] * (3 + len(keys))]
    for line in summary:
        cells = []
        for key in keys:
            value = line.get(key)
            shown = "–" if value is None else short(key, value)
            if f"{key}_ci" in line:
                low, high = line[f"{key}_ci"]
                shown += f" [{short(key, low)}, {short(key, high)}]"
            cells.append(shown)
        prompts = f"{line['requests']} + {line['harmless_requests']}"
        rows.append([line["safety"], str(line["width"]), prompts, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def short(key, value):
    """A number of a column, as the table shows it."""
    return f"{100 * value:.0f} %" if key in RATES else f"{value:.3g}"
