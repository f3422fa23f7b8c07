"""
The same MRM under another V_unseen, to measure what the conservative constraint is worth.

    python results/masks.py --data data/safety_rewards --min_count 30 --out out/mrm_30.safetensors

A token is unseen if it occurs fewer than --min_count times in the training replies (0: no token is unseen).
With --siblings, labelled siblings are counted too. Everything but the mask is as in --mrm. With the data,
--min_count and --weights of its training, the mask is the same, unless it was trained with --init.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

from safetensors.torch import save  # noqa: E402

from mrm import unseen_tokens  # noqa: E402
from plumbing.adapters import read_metadata  # noqa: E402
from plumbing.checkpoint import DEFAULT, load_llama  # noqa: E402
from plumbing.checkpoint import read_tensors  # noqa: E402
from plumbing.files import check_output, write_file  # noqa: E402
from plumbing.parser import Parser, number  # noqa: E402
from plumbing.mixture import read_corpora, weigh, weights  # noqa: E402


def main():
    parser = Parser(description="Give an MRM another mask of unseen tokens.")
    add = parser.add_argument
    add("--mrm", default=DEFAULT / "mrm.safetensors", help="the adapter to start from")
    add("--base", default=DEFAULT, help="the Llama that it is on")
    add("--data", required=True, nargs="+", metavar="DIR", help="the corpora that it has learned from")
    add("--min_count", type=number(0), required=True, help="occurrences that make a token count as seen")
    add("--weights", type=weights, default={}, help="as in training: a source of weight 0 is not counted")
    add("--siblings", action="store_true", help="count labelled siblings as occurrences")
    add("--out", type=Path, required=True, help="the adapter file to write")
    args = parser.parse_args()
    check_output(args.out)
    llama = load_llama(args.base)
    tensors = dict(read_tensors(args.mrm))
    training, _ = read_corpora(args.data, llama)
    distinct = {id(e): e for e in weigh(training, args.weights)}.values()       # --weights may repeat a reply
    texts = [e.reply + [token for _, token, _ in e.siblings if args.siblings] for e in distinct]
    tensors["unseen"] = unseen_tokens(texts, llama.config, args.min_count)
    write_file(args.out, save(tensors, {k: json.dumps(v) for k, v in read_metadata(args.mrm).items()}))
    print(f"{args.out}: seen tokens: {int((~tensors['unseen']).sum())} of {len(tensors['unseen'])}")


if __name__ == "__main__":
    run(main)
