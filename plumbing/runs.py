"""
What eval.py and attack.py are to run, and whether a folder of results is of the same run.
"""

import json
from pathlib import Path

from baselines import SEARCHES
from plumbing.attacks import ATTACKS
from plumbing.checkpoint import DEFAULT, identity
from plumbing.errors import BadInput
from plumbing.files import content_hash, parsing, read_field, read_json, read_jsonl, write_file
from plumbing.options import search_options


def read_attacks(paths, attack, suffix, limit, spare_harmless=True):
    """{number: row} of the data, counted through all files; with a limit only the first rows of each. A row
    keeps its other keys. Raises BadInput with the line number of one that lacks what the attack needs.
    spare_harmless: harmless rows are not attacked, and need no more than a prompt."""
    rows = {}
    count = 0
    needed = [key for key in ATTACKS[attack].needs if key != "suffix" or not suffix]
    for path in paths:
        for i, (line, row) in enumerate(read_jsonl(path)):
            source = f"{Path(path).name}, line {line}"
            harmless = row.get("category") == "harmless"
            for key in ["prompt", *needed]:
                # A harmless row that is attacked gets its response from attacks.Attacker.opening.
                if harmless and key != "prompt" and (spare_harmless or key == "response"):
                    continue
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise BadInput(f'{path}, line {line}: expected a "{key}", which --attack {attack} needs')
            for key in ("response", "suffix", "category"):
                if not isinstance(row.get(key, ""), str | None):
                    raise BadInput(f"{path}, line {line}: {key} is {row[key]!r:.40}, but it must be a text")
            if limit is None or i < limit:
                rows[count] = {key: value.strip() if isinstance(value, str) else value
                               for key, value in row.items()} | {"source": source}
            count += 1
    if not rows:
        raise BadInput(f"{', '.join(map(str, paths))}: found no prompts")
    return rows


def finish_arguments(args):
    """Fill in default models and `runs`. Raises BadInput for options out of range."""
    args.guard = args.guard or DEFAULT / "guard.safetensors"
    args.mrm = args.mrm or DEFAULT / "mrm.safetensors"
    args.runs = parse_runs(args.safety, args.width)
    search_options(args, max(width for _, width in args.runs))


def parse_runs(safety, width):
    """[(method, width)] of --safety and --width. Raises BadInput."""
    runs = []
    for entry in safety.split(","):
        method, _, own = entry.partition(":")
        if method not in SEARCHES:
            raise BadInput(f"--safety {entry}: expected some of {', '.join(SEARCHES)}")
        widths = own.split("/") if own else width.split(",")
        if not all(w.isdecimal() and int(w) for w in widths):
            raise BadInput(f"--safety {entry} --width {width}: expected whole numbers above 0, "
                           "such as beam:1/2 or 1,4,16")
        runs += [(method, int(w)) for w in (["1"] if method == "none" else widths)]
    return list(dict.fromkeys(runs))


def same_run(path, args, models, results, processes):
    """Keep beside the results what decides them: options, and models by their content, wherever they are.
    Raises BadInput if the results have others. In half precision the number of rows of a pass decides
    rounding, and so replies: there --batch and the number of processes count too."""
    # free: what may differ between calls that add to one folder
    free = "data safety runs width device limit out batch plot tflop_limit tries suffixes".split()
    run = {key: str(value) for key, value in vars(args).items() if key not in free}
    run |= {"policy": identity(models.policy), "mrm_base": identity(models.base)}
    run |= {key: content_hash(getattr(args, key)) for key in ("guard", "mrm", "judge")}
    if args.dtype in ("bfloat16", "float16"):
        run |= {"batch": str(args.batch), "processes": str(processes)}
    if path.exists() and results:
        there = read_json(path)
        for key in dict.fromkeys([*there, *run]):
            if there.get(key) != run.get(key):
                raise BadInput(f"{path.parent} holds results with {key} = {there.get(key)}, "
                               f"not {run.get(key)}; choose another --out")
    write_file(path, json.dumps(run, indent=1) + "\n")


def read_suffixes(path, of):
    """Attacker.suffixes of an earlier run, or {} if there is no such file. of: {name: value}, what decides
    the suffixes. Raises BadInput if those of the file were learned with other values."""
    if not path.exists():
        return {}
    there = read_json(path)
    with parsing(path, "a file that --suffixes has written"):
        differ = [key for key in of if there["of"].get(key) != of[key]]
        found = {(prompt, response): [[int(token) for token in tokens] for tokens in tries]
                 for prompt, response, tries in there["found"]}
    if differ:
        raise BadInput(f"{path}: its suffixes were learned with another {', '.join(differ)}; "
                       "name another file")
    return found


def write_suffixes(path, of, suffixes):
    """Attacker.suffixes as a file, and what decides them."""
    found = [[*request, tries] for request, tries in suffixes.items()]
    write_file(path, json.dumps({"of": of, "found": found}) + "\n")


def read_tries(path):
    """What attack.py has written so far, each try once; a last line that was cut off is passed over. Raises
    BadInput that names a line which is no result."""
    found = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        with parsing(f"{path}, line {number}", "a result of attack.py"):
            row = dict(json.loads(line).items())
            for key in ("asr", "judge_asr"):
                read_field(row, key, bool)
            read_field(row, "distinct", float, 0, 1)
            read_field(row, "prompt", str)
            read_field(row, "category", str, default=None)
            key = tuple(read_field(row, name, kind) for name, kind in
                        (("safety", str), ("width", int), ("row", int), ("try", int)))
            found.setdefault(key, row)
    return list(found.values())
