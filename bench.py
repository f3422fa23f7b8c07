"""
How fast the search is, and how near it comes to what this machine's memory allows.

    python bench.py                         widths 1, 4, 16, 64 with 32 new tokens, on the default models
    python bench.py --length                seconds and memory against the length of the reply, width 4
    python bench.py --prompt_length         the same against the length of the prompt
    python bench.py --prompts 8             eight prompts side by side against one after another, width 4
    python bench.py --safety rebase         another search than saffron
    python bench.py --plot speed.png        seconds per step against width and against length, drawn
    python bench.py --profile               the ten costliest operators at width 4

"copies" is the same search as it is commonly written: the policy's forward pass, then the MRM's, each with a batch in
which every sequence of the frontier has keys and values of its own, and all of M(s); only saffron is written so. "KV MB" is keys and values in use,
of either. "of limit" is the share of what memory bandwidth allows where each model reads its own weights at each step:
the bytes of both / the bandwidth, which is measured at the start / the seconds of a step. Weights that both share are
counted twice, so that sharing shows as a gain.
"""

import functools
import importlib.util
import json
import platform
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import torch
import torch.nn.functional as F

from model import DTYPES, BadInput, Parser, at_least_1, write_file
from sample import DEFAULT, PROMPT, load_models
from search import SEARCHES, Branch, candidates, extend, next_logits

WIDTHS, LENGTHS, PROMPT_LENGTHS = [1, 4, 16, 64], [32, 64, 128, 256, 512], [32, 128, 512, 2048]
WIDTH, LENGTH = 4, 32                       # where the other one is swept
COLUMNS = {"width": "d", "prompt": "d", "new": "d", "seconds": ".2f", "copies": ".2f", "ratio": ".2f", "ms/step": ".0f",
           "computed": "d", "cached": "d", "KV MB": ".1f", "copies MB": ".1f", "of limit": ".2f"}


class CopyCache:
    """Keys and values of a batch of sequences of equal length, each with a copy of its own."""

    def __init__(self, model):
        self.model, self.layers, self.peak_bytes = model, {}, 0

    def attend(self, layer, q, k, v):                       # (B, heads, T, head_dim); all T of a row are new
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v                                               # (B, kv_heads, S, head_dim) each
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    @torch.no_grad()
    def read(self, tokens, parents):
        """Final hidden states after one more step: row i goes on from row parents[i]. (B, T) -> (B, d)."""
        self.layers = {layer: (k[parents], v[parents]) for layer, (k, v) in self.layers.items()}
        known = self.layers[0][0].shape[2] if self.layers else 0
        positions = torch.arange(known, known + tokens.shape[1], device=tokens.device)[None]
        hidden = self.model(tokens, positions, self)[:, -1]
        self.peak_bytes = max(self.peak_bytes, sum(k.nbytes + v.nbytes for k, v in self.layers.values()))
        return hidden


@torch.no_grad()
def reference(policy, mrm, prompt, width, max_new_tokens, min_new_tokens, top_p=0.8):
    """The search of search.py on CopyCaches: (reply, seconds, peak KV bytes)."""
    started = time.perf_counter()
    ints = lambda rows: torch.tensor(rows, device=policy.device)
    caches = CopyCache(policy), CopyCache(mrm.llama)
    new = [ints([context]) for context in (prompt.policy_tokens(policy.template), prompt.reward_tokens(mrm.template))]
    frontier, growing, parents = [], [Branch()], ints([0])
    for length in range(max_new_tokens):
        h_policy, h_mrm = (cache.read(tokens, parents) for cache, tokens in zip(caches, new))
        logits, m_cons = next_logits(policy, h_policy, length, min_new_tokens), mrm.conservative_rewards(h_mrm)
        rows, tokens = candidates(logits, mrm.unseen, top_p, 1.0)
        pool = [(extend(policy, growing[i], token), i) for i, token in zip(rows.tolist(), tokens.tolist())]
        for (branch, _), reward in zip(pool, m_cons[rows, tokens].tolist()):
            branch.reward = reward
        best = sorted(pool, key=lambda item: -item[0].reward)[:width]
        frontier = [(branch, None) for branch, _ in frontier if branch.finished] + best
        frontier = sorted(frontier, key=lambda item: (not item[0].finished, -item[0].reward))[:width]
        growing = [branch for branch, _ in frontier if not branch.finished]
        if not growing:
            break
        parents = ints([i for branch, i in frontier if not branch.finished])
        new = [ints([[branch.tokens[-1]] for branch in growing])] * 2
    return frontier[0][0].tokens, time.perf_counter() - started, sum(cache.peak_bytes for cache in caches)


def weight_bytes(llama):
    """Bytes of the weights that a step reads: all but an embedding that is not the head as well."""
    embedding = llama.model.embed_tokens.weight
    return sum(p.nbytes for p in llama.parameters() if p is not embedding or p is llama.lm_head.weight)


def bandwidth(device):
    """Bytes a second at which this machine reads memory: the best of ten sums over 512 MB."""
    x, best = torch.ones(2 ** 27, device=device), 0.0
    for _ in range(10):
        started = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - started))
    return best


def prompt_of(policy, length):
    """The built-in prompt, or a prompt of that many tokens, template included: its words over and over."""
    prompt = policy.tokenizer.prompt(PROMPT)
    if length is not None:
        rest = length - len(policy.template([]))
        if rest < 1:
            raise BadInput(f"--prompt_length {length}: the template alone takes {length - rest} tokens")
        prompt.user = (prompt.user * length)[:rest]
    return prompt


def measure(method, policy, reward_model, speed, width, new, length=None):
    """A row of the table: one search, and of saffron the reference on the same prompt. No reply ends early."""
    prompt = prompt_of(policy, length)
    stats = SEARCHES[method][0](policy, reward_model, prompt, width=width, max_new_tokens=new, min_new_tokens=new).stats
    step, seconds, ratio, copies = stats.seconds / new, None, None, None
    if method == "saffron":
        _, seconds, copies = reference(policy, reward_model, prompt, width, new, new)
        ratio, copies = stats.seconds / seconds, copies / 1e6
    limit = bytes_of(policy, reward_model) / speed
    return dict(zip(COLUMNS, (width, len(prompt.policy_tokens(policy.template)), new, stats.seconds, seconds, ratio,
                              step * 1e3, stats.tokens_computed, stats.tokens_cached, stats.peak_kv_bytes / 1e6, copies,
                              limit / step)))


def bytes_of(policy, reward_model):
    """Bytes of the weights of both, each by itself."""
    return weight_bytes(policy) + (weight_bytes(reward_model.llama) if hasattr(reward_model, "llama") else 0)


def table(measure_one, cases):
    """Measure (width, new tokens, prompt length) after (width, ...), and print each row when it is there."""
    print("".join(f"{name:>11}" for name in COLUMNS))
    rows = []
    for case in cases:
        rows.append(measure_one(*case))
        print("".join(f"{'–' if row is None else format(row, form):>11}" for row, form in zip(rows[-1].values(), COLUMNS.values())),
              flush=True)
    return rows


def plot(path, rows):
    """Seconds per step against the width (rows of LENGTH new tokens) and against the length (rows of WIDTH)."""
    import matplotlib
    matplotlib.use("Agg")                                   # draws to a file, needs no display
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, x, fixed, value, title in ((axes[0], "width", "new", LENGTH, f"{LENGTH} new tokens"),
                                         (axes[1], "new", "width", WIDTH, f"width {WIDTH}")):
        mine = sorted((r for r in rows if r[fixed] == value), key=lambda r: r[x])
        for label, seconds in (("trie", "seconds"), ("a copy for each sequence", "copies")):
            points = [(r[x], r[seconds] / r["new"]) for r in mine if r[seconds] is not None]
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.set(xlabel={"width": "width", "new": "new tokens"}[x], title=title, xscale="log", ylim=0)
        axis.set_xticks([r[x] for r in mine], [str(r[x]) for r in mine], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds per step")
    axes[0].legend()
    write_file(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))


def profile(search, policy):
    """Print the ten operators that take the most time, themselves, in a search of width 4."""
    from torch.profiler import ProfilerActivity
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (policy.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        search(prompt_of(policy, None), width=WIDTH, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]:
        print(f"{event.key[:50]:50} {event.self_cpu_time_total / 1e3:8.0f} ms  {event.self_cpu_time_total / total:4.0%}  "
              f"{event.count:6d} calls")


def side_by_side(search, policy, count):
    """Print what so many prompts cost, one after another and all in one search."""
    prompts = [prompt_of(policy, 40 + i) for i in range(count)]
    options = dict(width=WIDTH, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    alone = sum(search(prompt, **options).stats.seconds for prompt in prompts)
    together = search(prompts, **options)[-1].stats.seconds
    print(f"{count} prompts, width {WIDTH}, {LENGTH} new tokens: one after another {alone:.2f} s, side by side {together:.2f} s, "
          f"ratio {together / alone:.2f}")


def numbers(text):
    if not all(n.isdecimal() and int(n) for n in text.split(",")):
        raise ArgumentTypeError(f"{text} is not whole numbers such as 1,4,16")
    return [int(n) for n in text.split(",")]


def main():
    parser = Parser(description="How fast the search is.")
    add = parser.add_argument
    add("--width", type=numbers, default=WIDTHS, metavar="N,N", help="widths of the table (default: 1,4,16,64)")
    add("--length", type=numbers, nargs="?", const=LENGTHS, metavar="N,N", help="reply lengths, at width 4 or --width")
    add("--prompt_length", type=numbers, nargs="?", const=PROMPT_LENGTHS, metavar="N,N", help="the same of prompts")
    add("--prompts", type=at_least_1, metavar="N", help="so many prompts side by side, and one after another")
    add("--plot", type=Path, metavar="FILE", help="draw the table and the sweep of --length: .png, .svg or .pdf")
    add("--profile", action="store_true")
    add("--out", type=Path, metavar="FILE", help="write the table as JSON too")
    add("--safety", choices=list(SEARCHES), default="saffron", help="the search (default: saffron)")
    for name, path in (("policy", ""), ("mrm_base", ""), ("mrm", "mrm.safetensors"), ("guard", "guard.safetensors")):
        add(f"--{name}", default=DEFAULT / path, metavar="PATH")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cpu")
    args = parser.parse_args()
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    for path in filter(None, (args.plot, args.out)):        # before the measurements, not after them
        if not path.parent.is_dir():
            parser.error(f"{path.parent} is no folder")
    policy, _, _, reward_models = load_models(args, [args.safety])
    reward_model = reward_models[args.safety]
    search = functools.partial(SEARCHES[args.safety][0], policy, reward_model)
    search(prompt_of(policy, None), width=2, max_new_tokens=2)                          # the first calls are slower
    if args.profile:
        return profile(search, policy)
    if args.prompts:
        return side_by_side(search, policy, args.prompts)
    speed = bandwidth(args.device)
    machine = (f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, "
               f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {args.dtype} on {args.device}")
    print(f"{machine}\n{args.safety}; memory bandwidth {speed / 1e9:.1f} GB/s; weights {bytes_of(policy, reward_model) / 1e9:.2f} GB")
    swept = args.width if args.width is not WIDTHS else [WIDTH]
    lengths = [(w, n) for w in swept for n in args.length or LENGTHS]
    widths = [(w, LENGTH) for w in args.width]
    if args.plot:
        cases = widths + [case for case in lengths if case not in widths]
    elif args.prompt_length:
        cases = [(w, LENGTH, n) for w in swept for n in args.prompt_length]
    else:
        cases = lengths if args.length else widths
    rows = table(functools.partial(measure, args.safety, policy, reward_model, speed), cases)
    if args.out:
        text = json.dumps({"safety": args.safety, "machine": machine, "bandwidth": speed, "rows": rows}, indent=1) + "\n"
        write_file(args.out, lambda partial: partial.write_text(text))
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
