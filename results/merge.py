"""
One table of several runs of eval.py, such as those of three seeds.

    python results/merge.py out/visible out/visible_seed1 out/visible_seed2 --out results/visible.json

A search and width that stands in several folders has the mean over all of their replies. This is for
searches that draw at random (best_of_n, rebase): of the others, every seed has the same replies. The
intervals take all replies for independent. Those to one prompt are not quite, so true intervals are somewhat
wider. Prints the table, writes the summary, and draws with --plot.
"""

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

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
    first = read_json(args.folders[0] / "arguments.json")
    for folder in args.folders:
        arguments = read_json(folder / "arguments.json")
        if arguments.get("seed") in seeds:
            raise BadInput(f"{folder} has the same seed as an earlier folder, {arguments.get('seed')}; "
                           "its replies would count twice")
        seeds.append(arguments.get("seed"))
        differ = [key for key, value in arguments.items() if first.get(key) != value]
        if set(differ) - {"seed"}:
            raise BadInput(f"{folder} and {args.folders[0]} differ in {', '.join(differ)}; "
                           "only seeds may differ")
        results += read_results(folder)
    summary = summarize(results, None)
    models = {key: Path(first[key]).name for key in ("policy", "mrm_base")}  # without this machine's folders
    merged = {"arguments": first | models | {"seed": seeds}, "rows": summary}
    write_file(args.out, json.dumps(merged, indent=1) + "\n")
    if args.plot:
        attack_success(args.plot, summary)
    print(markdown(summary), end="")


if __name__ == "__main__":
    run(main)
