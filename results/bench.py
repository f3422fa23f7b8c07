"""
How fast the search is, and how near it comes to what this machine's memory allows.

    python results/bench.py                     widths 1, 4, 16, 64 with 32 new tokens, on the default models
    python results/bench.py --length            seconds and memory against the length of the reply, width 4
    python results/bench.py --prompts 8         eight prompts side by side against one after another, width 4
    python results/bench.py --busy              a search alone, beside a busy process, beside another search,
                                                width 4

"copies" is the page saffron.py with keys and values as they are commonly kept: the policy's forward pass,
then the MRM's, each with a batch in which every sequence has a copy of its own, and all of M(s). "KV MB" is
keys and values in use. "of limit" is the share of what memory bandwidth allows where each model reads its own
weights at each step: the bytes of both / the bandwidth, measured at the start / the seconds of a step.
Weights that both share count twice, so that sharing shows as a gain.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

import functools  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from argparse import ArgumentTypeError  # noqa: E402
from importlib.util import find_spec  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from baselines import SEARCHES  # noqa: E402
from engine import Options  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.files import check_output, write_file  # noqa: E402
from plumbing.options import add_model_options, load_models  # noqa: E402
from plumbing.parser import Parser, number  # noqa: E402
from results.draw import seconds_a_step  # noqa: E402
from results.machine import bandwidth, describe_machine, weight_bytes  # noqa: E402
from saffron import PROMPT, saffron_frontiers  # noqa: E402

WIDTHS = [1, 4, 16, 64]
LENGTHS = [32, 64, 128, 256, 512]           # of replies
PROMPT_LENGTHS = [32, 128, 512, 2048]
WIDTH = 4                                   # where the length is swept
LENGTH = 32                                 # where the width is swept
FORMATS = {"seconds": ".2f", "copies": ".2f", "ratio": ".2f", "ms/step": ".0f", "KV MB": ".1f",
           "copies MB": ".1f", "of limit": ".2f"}


class CopyCache:
    """Hidden states of sequences of equal length: each goes on from one of the last call by a token, and has
    a copy of its keys and values."""

    def __init__(self, model):
        self.model = model
        self.rows = {(): 0}                                 # of each sequence of the last call: its row
        self.layers = {}                                    # of each layer: keys and values
        self.peak_bytes = 0

    def __call__(self, sequences):
        """As saffron.states: n token lists -> (n, d)."""
        known = len(next(iter(self.rows)))                  # tokens of each sequence that were read before
        parents = [self.rows[tuple(sequence[:known])] for sequence in sequences]
        self.layers = {layer: (k[parents], v[parents]) for layer, (k, v) in self.layers.items()}
        tokens = torch.tensor([sequence[known:] for sequence in sequences], device=self.model.device)
        positions = torch.arange(known, known + tokens.shape[1], device=tokens.device)[None]
        hidden = self.model(tokens, positions, self)[:, -1]
        self.rows = {tuple(sequence): i for i, sequence in enumerate(sequences)}
        self.peak_bytes = max(self.peak_bytes, sum(k.nbytes + v.nbytes for k, v in self.layers.values()))
        return hidden

    def attend(self, layer, q, k, v):                       # (n, heads, T, head_dim); all T of a row are new
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v                           # (n, kv_heads, S, head_dim) each
        new = q.shape[2]
        known = k.shape[2] - new
        mask = torch.ones(new, known + new, dtype=torch.bool, device=q.device).tril(known)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def prompt_of(policy, length=None):
    """The built-in prompt, or a prompt of that many tokens, template included: its words over and over."""
    prompt = policy.tokenizer.prompt(PROMPT)
    if length is not None:
        rest = length - len(policy.template([]))
        if rest < 1:
            raise BadInput(f"--prompt_length {length}: the template alone takes {length - rest} tokens")
        prompt.user = (prompt.user * length)[:rest]
    return prompt


def reply_of(length, width=WIDTH):
    """The Options of a reply of exactly this length."""
    return Options(width=width, max_new_tokens=length, min_new_tokens=length, beta=0.0)


def timed_row(search, policy, reward_model, limit, width, new, length=None):
    """A row of the table: one search and, of saffron, the copies on the same prompt. No reply ends early.
    limit: seconds that a step takes at least."""
    prompt = prompt_of(policy, length)
    copies = copies_bytes = None
    stats = search(prompt, reply_of(new, width)).stats
    if reward_model is not None and reward_model.kind == "mrm":
        caches = (CopyCache(policy), CopyCache(reward_model.llama))
        started = time.perf_counter()
        saffron_frontiers(policy, reward_model, prompt, width, new, new, read=caches)
        copies = time.perf_counter() - started
        copies_bytes = sum(cache.peak_bytes for cache in caches)
    return {"width": width, "prompt": len(prompt.policy_tokens(policy.template)), "new": new,
            "seconds": stats.seconds, "copies": copies, "ratio": copies and stats.seconds / copies,
            "ms/step": stats.seconds / new * 1e3, "computed": stats.tokens_computed,
            "cached": stats.tokens_cached, "KV MB": stats.peak_kv_bytes / 1e6,
            "copies MB": copies_bytes and copies_bytes / 1e6, "of limit": limit * new / stats.seconds}


def compare_batch(search, policy, count):
    """Print what `count` prompts cost, one after another and all in one search."""
    prompts = [prompt_of(policy, 40 + i) for i in range(count)]
    alone = sum(search(prompt, reply_of(LENGTH)).stats.seconds for prompt in prompts)
    together = search(prompts, reply_of(LENGTH))[-1].stats.seconds
    print(f"{count} prompts, width {WIDTH}, {LENGTH} new tokens: one after another {alone:.2f} s, "
          f"side by side {together:.2f} s, ratio {together / alone:.2f}")


def compare_busy(search, prompt):
    """Print what a step costs alone, beside a process that keeps a core busy, and beside another search."""
    spin = ["-c", "import sys; print(file=sys.stderr, flush=True)\nwhile True: pass"]
    length = ["--max_new_tokens", "2000", "--min_new_tokens", "2000"]
    alone = None
    for name, command in (("alone", ["-c", "print()"]), ("beside a busy process", spin),
                          ("two searches at once", ["sample.py", "--json", "--prompt", PROMPT, *length])):
        other = subprocess.Popen([sys.executable, *command], cwd=Path(__file__).resolve().parents[1],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        other.stderr.readline()                             # until it has begun, or ended
        seconds = sum(search(prompt, reply_of(LENGTH)).stats.seconds for _ in range(5)) / 5
        alone = alone or seconds
        print(f"{name}: {seconds / LENGTH * 1e3:.0f} ms a step, {seconds / alone:.2f} times as long as alone")
        other.kill()


def numbers(text):
    if not all(n.isdecimal() and int(n) for n in text.split(",")):
        raise ArgumentTypeError(f"expected whole numbers above 0, such as 1,4,16, not {text}")
    return [int(n) for n in text.split(",")]


def parse_arguments():
    parser = Parser(description="How fast the search is.")
    add = functools.partial(parser.group("what is timed (lengths in tokens)"), metavar="N,N")
    add("--width", type=numbers, help="widths of the table (default: 1,4,16,64)")
    add("--length", type=numbers, nargs="?", const=LENGTHS, help="reply lengths, at width 4 or --width")
    add("--prompt_length", type=numbers, nargs="?", const=PROMPT_LENGTHS, help="prompt lengths, likewise")
    add = parser.group("instead of the table")
    add("--prompts", type=number(1), metavar="N", help="N prompts side by side, and one after another")
    add("--busy", action="store_true", help="a search alone, beside a busy process, beside another search")
    add = parser.group("output")
    add("--plot", type=Path, metavar="FILE", help="draw width and length: .png, .svg or .pdf")
    add("--out", type=Path, metavar="FILE", help="write the table as JSON too")
    add = parser.group("models")
    add("--safety", choices=list(SEARCHES), default="saffron", help="the search")
    add_model_options(add)
    args = parser.parse_args()
    if args.plot and (args.plot.suffix not in (".png", ".svg", ".pdf") or not find_spec("matplotlib")):
        parser.error(f"--plot {args.plot}: need .png, .svg or .pdf, and matplotlib (pip install matplotlib)")
    for path in filter(None, (args.plot, args.out)):                 # before the measurements, not after them
        check_output(path)
    return args


def main():
    args = parse_arguments()
    models = load_models(args, [args.safety])
    policy = models.policy
    reward_model = models.reward_models[args.safety]
    search = functools.partial(SEARCHES[args.safety].search, policy, reward_model)
    search(prompt_of(policy), reply_of(2, width=2))                     # the first calls are slower
    if args.prompts:
        return compare_batch(search, policy, args.prompts)
    if args.busy:
        return compare_busy(search, prompt_of(policy))
    llamas = [policy] + ([reward_model.llama] if hasattr(reward_model, "llama") else [])
    size = sum(map(weight_bytes, llamas))
    speed = bandwidth(args.device)
    machine = f"{describe_machine()}, {args.dtype} on {args.device}"
    print(f"{machine}\n{args.safety}; memory bandwidth {speed / 1e9:.1f} GB/s; weights {size / 1e9:.2f} GB")
    lengths = [(w, n) for w in args.width or [WIDTH] for n in args.length or LENGTHS]
    cases = lengths if args.length and not args.plot else [(w, LENGTH) for w in args.width or WIDTHS]
    if args.plot:
        cases += [case for case in lengths if case not in cases]
    elif args.prompt_length:
        cases = [(w, LENGTH, n) for w in args.width or [WIDTH] for n in args.prompt_length]
    rows = []
    for case in cases:
        rows.append(timed_row(search, policy, reward_model, size / speed, *case))
        if len(rows) == 1:
            print("".join(f"{name:>11}" for name in rows[0]))
        cells = ("–" if x is None else format(x, FORMATS.get(name, "d")) for name, x in rows[-1].items())
        print("".join(f"{cell:>11}" for cell in cells), flush=True)
    if args.out:
        report = {"safety": args.safety, "machine": machine, "bandwidth": speed, "rows": rows}
        write_file(args.out, json.dumps(report, indent=1) + "\n")
    if args.plot:
        seconds_a_step(args.plot, rows, WIDTH, LENGTH)


if __name__ == "__main__":
    run(main)
