"""
One table of several runs of eval.py, such as those of three seeds.

    python results/merge.py out/visible out/visible_seed1 out/visible_seed2 --out results/visible.json

The folders may differ in the seed and in the MRM. A search and width has the mean over all of its replies. A
search that asks the MRM draws nothing at random, so of several folders with one MRM the first counts; of any
other search, the first of several folders with one seed. The interval is over different requests. Prints the
table, writes the summary, and draws with --plot.
"""

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

from baselines import SEARCHES  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.files import check_output, read_json, write_file  # noqa: E402
from plumbing.parser import Parser  # noqa: E402
from plumbing.tables import markdown, read_results, summarize  # noqa: E402
from results.draw import attack_success  # noqa: E402


def main():
    parser = Parser(description="One table of several runs of eval.py.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="an --out folder of eval.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the summary to write")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    args = parser.parse_args()
    for path in filter(None, (args.out, args.plot)):
        check_output(path)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib: pip install matplotlib")
    results = []
    seeds = []
    mrms = []
    first = read_json(args.folders[0] / "arguments.json")
    for folder in args.folders:
        # 1. May it stand beside the others?
        arguments = read_json(folder / "arguments.json")
        seed = arguments.get("seed")
        mrm = arguments.get("mrm")
        if (seed, mrm) in zip(seeds, mrms):
            raise BadInput(f"{folder} has the same seed ({seed}) and MRM as an earlier folder; "
                           "its replies would count twice")
        differ = [key for key, value in arguments.items() if first.get(key) != value]
        if set(differ) - {"seed", "mrm"}:
            raise BadInput(f"{folder} and {args.folders[0]} differ in {', '.join(differ)}; "
                           "only seeds and MRMs may differ")
        # 2. Which of its replies are not there yet?
        for result in read_results(folder):
            asks_mrm = SEARCHES[result["safety"]].reward_model == "mrm"
            if mrm not in mrms if asks_mrm else seed not in seeds:
                results.append(result)
        seeds.append(seed)
        mrms.append(mrm)
    summary = summarize(results, None)
    models = {key: Path(first[key]).name for key in ("policy", "mrm_base")}  # without this machine's folders
    decisive = {"seed": list(dict.fromkeys(seeds)), "mrm": list(dict.fromkeys(mrms))}
    merged = {"arguments": first | models | decisive, "rows": summary}
    write_file(args.out, json.dumps(merged, indent=1) + "\n")
    if args.plot:
        attack_success(args.plot, summary)
    print(markdown(summary), end="")


if __name__ == "__main__":
    run(main)
