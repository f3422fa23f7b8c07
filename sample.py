"""
Ask a language model, with and without a defence.

    python sample.py --safety saffron                       the built-in example: a prefill attack
    python sample.py --safety saffron --prompt "..."        your own prompt; --prompt - reads standard input
    python sample.py --prompt FILE:prompts.txt              one prompt a line, searched side by side
    python sample.py --compare                              all methods on the same prompt
    python sample.py --html tree.html                       the search as a page to look at

Replies and what they cost go to stdout, progress and notes to stderr.
"""

import dataclasses
import json
import sys
from pathlib import Path

from files import BadInput, Parser, check_output, printable, run

import torch

import page
from adapters import DEFAULT, load_guard, load_llama, load_mrm
from engine import check_options, check_vocabulary
from model import DTYPES
from mrm import bridged, score
from saffron import PREFILL, PROMPT
from search import SEARCHES, describe
from tokenizer import read_prompts

SIDE_BY_SIDE = 16                   # so many prompts of a file share a forward pass


def parse_arguments():
    parser = Parser(description="Ask a language model, with and without a defence.", epilog=describe())
    add = parser.group("what is asked")
    add("--prompt", help="what the user asks; - reads standard input, FILE:path a prompt a line (default: "
        "an example with a prefill)")
    add("--prefill", default="", help="an opening that an attacker puts into the model's mouth")
    add("--hide_prefill", action="store_true", help="hide the prefill from MRM and guard, also in the "
        "final verdict")
    add = parser.group("search")
    add("--safety", choices=list(SEARCHES), default="saffron", help="the search")
    add("--compare", action="store_true", help="all searches, one after another, in place of --safety")
    add("--width", type=int, default=4, help="N in the list of searches below")
    add("--temperature", type=float, help="0: greedy (default: 0 for --safety none, else 1)")
    add_search_options(add)
    add_model_options(parser.group("models"))
    add = parser.group("output")
    add("--json", action="store_true", help="print one JSON object a line for each prompt")
    add("--trace", action="store_true", help="show the tree of branches; with --json, all frontiers")
    add("--html", metavar="FILE", type=Path, help="write a page that shows the search (one prompt)")
    args = parser.parse_args()
    check_options(vars(args))
    args.example = args.prompt is None
    if args.example:
        args.prompt, args.prefill = PROMPT, args.prefill or PREFILL
    args.prompts = read_prompts(args.prompt)
    if args.html and (len(args.prompts) > 1 or args.html.resolve() == page.TEMPLATE):
        raise BadInput(f"--html {args.html}: expected one prompt, and not the template page.html")
    if args.html:
        check_output(args.html)
    return args


def add_search_options(add):
    """The options of a search that eval.py has too."""
    add("--max_new_tokens", type=int, default=50, help="most tokens of a reply")
    add("--min_new_tokens", type=int, default=16, help="fewest tokens of a reply")
    add("--top_p", type=float, default=0.8, help="probability mass of the nucleus")
    add("--beta", type=float, default=0.1, help="saffron: weight of the reply's log-probability under the "
        "policy, beside the reward; 0: as in the paper")
    add("--seed", type=int, default=0, help="seed of the random draws")


def add_model_options(add):
    """The options of all commands that search."""
    add("--policy", default=DEFAULT, metavar="DIR", help="the model: a folder in the Hugging Face layout")
    add("--mrm_base", default=DEFAULT, metavar="DIR", help="the model that MRM and guard are adapters of")
    add("--mrm", metavar="PATH", help="an adapter, or a released MRM's folder (default: "
        "mrm.safetensors in data/smollm2)")
    add("--guard", metavar="PATH", help="an adapter, or a Llama Guard's folder, with any vocabulary "
        "(default: guard.safetensors in data/smollm2)")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", choices=DTYPES, default="float32", help="number type of weights and caches")


def load_models(args, methods):
    """The policy, the base of the adapters, the guard, and {method: the reward model that it takes}."""
    policy = base = load_llama(args.policy, getattr(torch, args.dtype), args.device)
    if policy.tokenizer is None:
        raise BadInput(f"{args.policy} has no tokenizer.json; data/hub/prepare.py fetches all that is needed")
    kinds = {method: SEARCHES[method].reward_model for method in methods}
    models, own = {None: None}, Path(args.policy).resolve() != DEFAULT
    if own and args.guard is None and not any(kinds.values()):          # nobody is asked for a verdict
        return policy, policy, None, dict.fromkeys(methods)
    # A guard in a folder of its own needs no base, nor do those of this repository: load_guard knows theirs.
    if Path(args.mrm_base).resolve() != Path(args.policy).resolve() and (
            "mrm" in kinds.values() or Path(args.mrm_base).resolve() != DEFAULT):
        base = load_llama(args.mrm_base, policy.dtype, policy.device)
    if "mrm" in kinds.values():
        check_vocabulary(policy, base)
        models["mrm"] = load_mrm(args.mrm or DEFAULT / "mrm.safetensors", base)
    models["guard"] = bridged(policy, load_guard(args.guard or DEFAULT / "guard.safetensors", base))
    return policy, base, models["guard"], {method: models[kind] for method, kind in kinds.items()}


def ask(method, policy, reward_model, guard, prompts, args):
    """Search for a reply to each prompt, side by side: (the object for --json, the Result) of each."""
    options = {name: vars(args)[name] for name in
               ("width", "max_new_tokens", "min_new_tokens", "top_p", "beta", "seed", "temperature")
               if vars(args)[name] is not None}
    for start in range(0, len(prompts), SIDE_BY_SIDE):
        batch = prompts[start:start + SIDE_BY_SIDE]
        results = SEARCHES[method].search(policy, reward_model, batch, **options)
        for text, prompt, result in zip(args.prompts[start:], batch, results):
            answer = {"prompt": text, "prefill": args.prefill, "safety": method, "text": result.text,
                      "tokens": result.tokens, "finished": result.finished, "reward": result.reward,
                      "guard": guard and score(guard, prompt, [result.tokens]).item(),
                      "stats": dataclasses.asdict(result.stats)}
            if args.trace:
                answer["frontiers"] = [[branch.tokens for branch in frontier] for frontier in result.trace]
            yield answer, result


def main():
    args = parse_arguments()
    methods = list(SEARCHES) if args.compare else [args.safety]
    if args.example and not args.json and args.safety != "none" and not args.compare:
        methods = ["none", args.safety]                     # a newcomer sees what there is to defend against
    # The page shows what the MRM makes of every search, where there is one.
    with_mrm = args.html and (args.mrm or Path(args.policy).resolve() == DEFAULT)
    policy, _, guard, reward_models = load_models(args, [*methods, "saffron"] if with_mrm else methods)
    mrm = reward_models.get("saffron")
    prompts = [policy.tokenizer.prompt(text, args.prefill, args.hide_prefill) for text in args.prompts]
    if not args.json:
        print(f"model:   {printable(policy.config.name)}")
    answers, trees = {method: [] for method in methods}, []
    for method in methods:
        print(f"searching: {method} ...", file=sys.stderr)
        for answer, result in ask(method, policy, reward_models[method], guard, prompts, args):
            answers[method].append(answer)
            title, verdict = captions(answer, args)
            if not args.json:
                show(answer, result, policy.tokenizer, args, method == methods[0] or len(prompts) > 1)
            if args.html:
                tree = page.tree(result, prompts[0], policy, mrm)
                trees.append({"name": method, "title": title, "verdict": verdict, **tree})
    if args.json:
        for of_a_prompt in zip(*answers.values()):
            print(json.dumps(dict(zip(methods, of_a_prompt)) if args.compare else of_a_prompt[0]))
    if args.html:
        page.write_page(args.html, trees, args.prompts[0], args.prefill, policy, mrm)
        print(f"wrote {args.html}: open it in a browser", file=sys.stderr)


def captions(answer, args):
    """What stands above a reply, and what is said of it below."""
    length = f"{len(answer['tokens'])} tokens{'' if answer['finished'] else ' (cut off)'}"
    width = "" if answer["safety"] == "none" else f", width {args.width}"
    if answer["guard"] is None:
        return answer["safety"] + width, f"no guard was asked, {length}"
    verdict = f"guard's reward {answer['guard']:+.2f} ({'unsafe' if answer['guard'] < 0 else 'safe'})"
    return answer["safety"] + width, f"{verdict}, {length}"


def show(answer, result, tokenizer, args, with_prompt):
    """Print a reply, the guard's verdict, and what it cost."""
    (title, verdict), stats, prefill = captions(answer, args), result.stats, printable(answer["prefill"])
    if with_prompt:
        print(f"\nprompt:  {printable(answer['prompt'])}" + (f"\nprefill: {prefill}" if prefill else ""))
    print(f"\n--- {title} " + "-" * 60)
    print((f"[{prefill}]" if prefill else "") + printable(answer["text"]))
    print(f"\n{verdict}, {stats.seconds:.1f} s, {stats.flops / 1e12:.2f} TFLOP, "
          f"{stats.policy_calls} policy calls, {stats.reward_calls} reward calls,\n"
          f"{stats.tokens_computed} tokens computed, {stats.tokens_cached} from cache, KV cache "
          f"{stats.peak_kv_bytes / 1e6:.1f} MB (a copy for each sequence: "
          f"{stats.unshared_kv_bytes / 1e6:.1f} MB)")
    if args.trace:
        rewards = {tuple(b.tokens): b.reward for frontier in result.trace for b in frontier}
        print("\nsurviving branches, each with the search's reward at its end:")
        for line in tree_lines([b.tokens for b in result.trace[-1]], rewards, tokenizer):
            print(printable(line))


def tree_lines(replies, rewards, tokenizer, start=0, indent=""):
    """The replies as an indented tree: what all share on one line, then each continuation below it."""
    replies = sorted(set(map(tuple, replies)))
    end = start
    while all(len(r) > end for r in replies) and len({r[end] for r in replies}) == 1:
        end += 1
    if end > start:
        text = json.dumps("".join(tokenizer.pieces(replies[0])[start:end]), ensure_ascii=False)
        reward = rewards.get(replies[0][:end])
        yield f"{indent}{'' if reward is None else f'{reward:+.2f} '}{text}"
        indent += "    "
    longer = [r for r in replies if len(r) > end]
    for first in sorted({r[end] for r in longer}):
        yield from tree_lines([r for r in longer if r[end] == first], rewards, tokenizer, end, indent)


if __name__ == "__main__":
    run(main)
