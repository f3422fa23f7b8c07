"""
Ask a language model, with and without a defence.

    python sample.py --safety saffron                       the built-in example: a prefill attack
    python sample.py --safety saffron --prompt "..."        your own prompt; --prompt - reads standard input
    python sample.py --prompt FILE:prompts.txt              one prompt a line, searched side by side
    python sample.py --compare                              all methods on the same prompt
    python sample.py --html tree.html                       the search as a page to look at

Replies and what they cost go to stdout, progress and notes to stderr.
"""

import argparse
import dataclasses
import json
import sys
import unicodedata
from pathlib import Path

from files import BadInput, Parser, check_output, reading, run

import torch

import page
from adapters import DEFAULT, load_guard, load_llama, load_mrm
from engine import check_vocabulary
from model import DTYPES
from saffron import PREFILL, PROMPT
from search import SEARCHES, describe

SIDE_BY_SIDE = 16                   # so many prompts of a file share a forward pass


def parse_arguments():
    parser = Parser(description="Ask a language model, with and without a defence.", epilog=describe(),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--safety", choices=list(SEARCHES), default="saffron", help="the search (default: saffron)")
    add("--prompt", help="what the user asks; - reads standard input, FILE:path one prompt a line (default: a "
        "built-in example with a prefill)")
    add("--prefill", default="", help="an opening that an attacker puts into the model's mouth")
    add("--hide_prefill", action="store_true", help="keep it from MRM and guard, also when that judges")
    add("--width", type=int, default=4, help="N: replies sampled, or sequences in the frontier (default: 4)")
    add("--temperature", type=float, help="0 is greedy (default: 0 for none, 1 for the others)")
    add_search_options(add)
    add_model_options(add)
    add("--compare", action="store_true", help="all methods, one after another")
    add("--json", action="store_true", help="one JSON object on stdout, or with FILE:path one a line")
    add("--trace", action="store_true", help="show the tree of surviving branches; with --json: all frontiers")
    add("--html", metavar="FILE", type=Path, help="write a page that shows the search, of one prompt")
    args = parser.parse_args()
    args.example = args.prompt is None
    if args.example:
        args.prompt, args.prefill = PROMPT, args.prefill or PREFILL
    args.prompts = read_prompts(args.prompt)
    if args.html and (len(args.prompts) > 1 or args.html.resolve() == page.TEMPLATE):
        raise BadInput(f"--html {args.html}: expected one prompt, and not the page that all others are made of")
    if args.html:
        check_output(args.html)
    return args


def add_search_options(add):
    """The options of a search that eval.py has too."""
    add("--max_new_tokens", type=int, default=50, help="length of the reply at most (default: 50)")
    add("--min_new_tokens", type=int, default=16, help="no end before so many tokens (default: 16)")
    add("--top_p", type=float, default=0.8, help="mass of the nucleus (default: 0.8)")
    add("--beta", type=float, default=0.1, help="saffron: weight of the reply's log-probability under the policy, "
        "beside the reward (default: 0.1; 0 is the paper)")
    add("--seed", type=int, default=0)


def add_model_options(add):
    """The options of all commands that search."""
    add("--policy", default=DEFAULT, metavar="DIR", help="a Llama checkpoint with its vocabulary")
    add("--mrm_base", default=DEFAULT, metavar="DIR", help="the Llama that MRM and guard are adapters of")
    add("--mrm", default=DEFAULT / "mrm.safetensors", metavar="PATH", help="an adapter, or a released MRM's folder")
    add("--guard", default=DEFAULT / "guard.safetensors", metavar="PATH", help="an adapter, or a Llama Guard's folder")
    add("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    add("--dtype", choices=DTYPES, default="float32")


def read_prompts(prompt):
    """The prompts that --prompt stands for. Raises BadInput for a file that has none or is no text."""
    if prompt == "-":
        with reading("the prompt on standard input", "UTF-8"):
            return [sys.stdin.buffer.read().decode("utf-8").rstrip("\n")]
    if not prompt.startswith("FILE:"):
        return [prompt]
    with reading(prompt.removeprefix("FILE:"), "UTF-8"):
        text = Path(prompt.removeprefix("FILE:")).read_bytes().decode("utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"--prompt {prompt}: expected one prompt a line, but the file is empty")
    return lines


def load_models(args, methods):
    """The policy, the base of the adapters (the policy itself where that is the same folder), the guard, and
    {method: the reward model that it takes}."""
    load = lambda folder: load_llama(folder, getattr(torch, args.dtype), args.device)
    policy = load(args.policy)
    if policy.tokenizer is None:
        raise BadInput(f"{args.policy} has no vocab.tiktoken; data/smollm2/prepare.py shows how to write one")
    same = Path(args.mrm_base).resolve() == Path(args.policy).resolve()
    base = policy if same else load(args.mrm_base)
    check_vocabulary(policy, base)
    models = {None: None, "guard": load_guard(args.guard, base)}
    if "mrm" in [SEARCHES[method].reward_model for method in methods]:
        models["mrm"] = load_mrm(args.mrm, base)
    return policy, base, models["guard"], {method: models[SEARCHES[method].reward_model] for method in methods}


def ask(method, policy, reward_model, guard, prompts, args):
    """Search a reply to each prompt, side by side: (the object that --json prints, the Result) of each."""
    options = dict(width=args.width, max_new_tokens=args.max_new_tokens, min_new_tokens=args.min_new_tokens,
                   top_p=args.top_p, beta=args.beta, seed=args.seed)
    if args.temperature is not None:
        options["temperature"] = args.temperature
    for start in range(0, len(prompts), SIDE_BY_SIDE):
        batch = prompts[start:start + SIDE_BY_SIDE]
        for prompt, text, result in zip(batch, args.prompts[start:], SEARCHES[method].search(
                policy, reward_model, batch, **options)):
            answer = {"prompt": text, "prefill": args.prefill, "safety": method, "text": result.text,
                      "tokens": result.tokens, "finished": result.finished, "reward": result.reward,
                      "guard": guard.score(prompt, [result.tokens]).item(),
                      "stats": dataclasses.asdict(result.stats)}
            if args.trace:
                answer["frontiers"] = [[branch.tokens for branch in frontier] for frontier in result.trace]
            yield answer, result


def main():
    args = parse_arguments()
    methods = [args.safety]
    if args.compare:
        methods = list(SEARCHES)
    elif args.example and not args.json:                    # a newcomer sees what there is to defend against
        methods = list(dict.fromkeys(["none", args.safety]))
    # The page shows what the MRM makes of every search.
    policy, _, guard, reward_models = load_models(args, [*methods, "saffron"] if args.html else methods)
    prompts = [policy.tokenizer.prompt(text, args.prefill, args.hide_prefill) for text in args.prompts]
    if not args.json:
        print(f"model:   {policy.config.name}")
    answers, trees = {}, []
    for method in methods:
        print(f"searching: {method} ...", file=sys.stderr)
        answers[method] = []
        for answer, result in ask(method, policy, reward_models[method], guard, prompts, args):
            answers[method].append(answer)
            if not args.json:
                if method == methods[0] or len(prompts) > 1:
                    show_prompt(answer)
                show(answer, result, policy.tokenizer, args)
            if args.html:
                tree = page.tree(result, prompts[0], policy, reward_models["saffron"])
                trees.append({"name": method, "title": title(answer, args), "verdict": verdict(answer), **tree})
    if args.json:
        for of_a_prompt in zip(*answers.values()):
            print(json.dumps(dict(zip(methods, of_a_prompt)) if args.compare else of_a_prompt[0]))
    if args.html:
        page.write_page(args.html, trees, args.prompts[0], args.prefill, policy, reward_models["saffron"])
        print(f"wrote {args.html}: open it in a browser", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# for people

def printable(text):
    """Without control characters that a terminal would obey: a model may write any byte."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def show_prompt(answer):
    print(f"\nprompt:  {printable(answer['prompt'])}")
    if answer["prefill"]:
        print(f"prefill: {printable(answer['prefill'])}")


def title(answer, args):
    return answer["safety"] if answer["safety"] == "none" else f"{answer['safety']}, width {args.width}"


def verdict(answer):
    return (f"guard's reward {answer['guard']:+.2f} ({'unsafe' if answer['guard'] < 0 else 'safe'}), "
            f"{len(answer['tokens'])} tokens{'' if answer['finished'] else ' (cut off)'}")


def show(answer, result, tokenizer, args):
    """A reply, the guard's verdict, and what it cost."""
    print(f"\n--- {title(answer, args)} " + "-" * 60)
    print(printable(f"[{answer['prefill']}]{answer['text']}" if answer["prefill"] else answer["text"]))
    stats = result.stats
    print(f"\n{verdict(answer)}, {stats.seconds:.1f} s, "
          f"{stats.flops / 1e12:.2f} TFLOP, {stats.policy_calls} policy calls, {stats.reward_calls} reward calls,\n"
          f"{stats.tokens_computed} tokens computed, {stats.tokens_cached} from cache, KV cache "
          f"{stats.peak_kv_bytes / 1e6:.1f} MB (a copy for each sequence: {stats.unshared_kv_bytes / 1e6:.1f} MB)")
    if args.trace:
        rewards = {tuple(b.tokens): b.reward for frontier in result.trace for b in frontier}
        print("\nsurviving branches, each with the search's reward at its end:")
        show_tree([b.tokens for b in result.trace[-1]], rewards, tokenizer)


def show_tree(replies, rewards, tokenizer, start=0, indent=""):
    """The replies as an indented tree: what all share on one line, then each continuation below it."""
    replies = sorted(set(map(tuple, replies)))
    end = start
    while all(len(r) > end for r in replies) and len({r[end] for r in replies}) == 1:
        end += 1
    if end > start:
        text = json.dumps("".join(tokenizer.pieces(replies[0])[start:end]), ensure_ascii=False)
        reward = rewards.get(replies[0][:end])
        print(printable(f"{indent}{'' if reward is None else f'{reward:+.2f} '}{text}"))
        indent += "    "
    longer = [r for r in replies if len(r) > end]
    for first in sorted({r[end] for r in longer}):
        show_tree([r for r in longer if r[end] == first], rewards, tokenizer, end, indent)


if __name__ == "__main__":
    run(main)
