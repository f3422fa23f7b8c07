"""
Ask a language model, with and without a defence.

    python sample.py --safety saffron                       the built-in example: a prefill attack
    python sample.py --safety saffron --prompt "..."        your own prompt; --prompt - reads standard input
    python sample.py --prompt FILE:prompts.txt              one prompt a line, searched side by side
    python sample.py --compare                              all methods on the same prompt
    python sample.py --html tree.html                       the search as a page to look at

Replies and what they cost go to stdout, progress and notes to stderr.
"""

from plumbing.start import printable, run               # first: it sets what torch reads

import dataclasses
import json
import sys
from pathlib import Path

from baselines import SEARCHES
from plumbing import options, page, report
from plumbing.checkpoint import DEFAULT
from plumbing.files import check_output
from plumbing.parser import Parser
from saffron import PREFILL, PROMPT

SIDE_BY_SIDE = 16                   # so many prompts of a file share a forward pass


def parse_arguments():
    parser = Parser(description="Ask a language model, with and without a defence.",
                    epilog=options.describe_searches())
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
    options.add_search_options(add)
    options.add_model_options(parser.group("models"))
    add = parser.group("output")
    add("--json", action="store_true", help="print one JSON object a line for each prompt")
    add("--trace", action="store_true", help="show the tree of branches; with --json, all frontiers")
    add("--html", metavar="FILE", type=Path, help="write a page that shows the search (one prompt)")
    args = parser.parse_args()
    args.options = options.search_options(args, args.width)
    args.example = args.prompt is None
    if args.example:
        args.prompt = PROMPT
        args.prefill = args.prefill or PREFILL
    args.prompts = options.read_prompts(args.prompt)
    if args.html and (len(args.prompts) > 1 or args.html.resolve() == page.TEMPLATE):
        parser.error(f"--html {args.html}: expected one prompt, and not the template page.html")
    if args.html:
        check_output(args.html)
    return args


def main():
    args = parse_arguments()
    methods = list(SEARCHES) if args.compare else [args.safety]
    if args.example and not args.json and args.safety != "none" and not args.compare:
        methods = ["none", args.safety]                     # a newcomer sees what there is to defend against
    # The page shows what the MRM makes of every search, where there is one.
    with_mrm = args.html and (args.mrm or Path(args.policy).resolve() == DEFAULT)
    models = options.load_models(args, [*methods, "saffron"] if with_mrm else methods)
    mrm = models.reward_models.get("saffron")
    prompts = [models.policy.tokenizer.prompt(text, args.prefill, args.hide_prefill) for text in args.prompts]
    for prompt in prompts:
        for reward_model in dict.fromkeys([models.guard, *models.reward_models.values()]):
            options.check_prompt(models.policy, reward_model, prompt, args.max_new_tokens)

    if not args.json:
        print(f"model:   {printable(models.policy.config.name)}")
    answers = {method: [] for method in methods}
    trees = []                                              # of each search, for the page
    for method in methods:
        print(f"searching: {method} ...", file=sys.stderr)
        search = SEARCHES[method].search
        for start in range(0, len(prompts), SIDE_BY_SIDE):
            batch = prompts[start:start + SIDE_BY_SIDE]
            watch = page.Recorder() if args.html else None
            results = search(models.policy, models.reward_models[method], batch, args.options, watch)
            for text, prompt, result in zip(args.prompts[start:], batch, results):
                guard_reward = models.guard and models.guard.score(prompt, [result.tokens]).item()
                answer = describe(method, text, result, guard_reward, args)
                answers[method].append(answer)
                said = captions(answer, args)
                if not args.json:
                    if method == methods[0] or len(prompts) > 1:
                        report.show_prompt(text, args.prefill)
                    report.show_reply(said, result, args.prefill, args.trace, models.policy.tokenizer)
                if args.html:
                    tree = page.tree(result, watch.rounds, prompt, models.policy, mrm)
                    trees.append({"name": method, **said, **tree})
    if args.json:
        for of_a_prompt in zip(*answers.values()):
            print(json.dumps(dict(zip(methods, of_a_prompt)) if args.compare else of_a_prompt[0]))
    if args.html:
        page.write_page(args.html, trees, args.prompts[0], args.prefill, models.policy, mrm)
        print(f"wrote {args.html}: open it in a browser", file=sys.stderr)


def describe(method, text, result, guard_reward, args):
    """The object that --json prints of a Result."""
    answer = {"prompt": text, "prefill": args.prefill, "safety": method, "text": result.text,
              "tokens": result.tokens, "finished": result.finished, "reward": result.reward,
              "guard": guard_reward, "stats": dataclasses.asdict(result.stats)}
    if args.trace:
        answer["frontiers"] = [[branch.tokens for branch in frontier] for frontier in result.trace]
    return answer


def captions(answer, args):
    """What stands above a reply, and what is said of it below."""
    width = "" if answer["safety"] == "none" else f", width {args.width}"
    verdict = "no guard was asked"
    if answer["guard"] is not None:
        verdict = f"guard's reward {answer['guard']:+.2f} ({'unsafe' if answer['guard'] < 0 else 'safe'})"
    length = f"{len(answer['tokens'])} tokens{'' if answer['finished'] else ' (cut off)'}"
    return {"title": answer["safety"] + width, "verdict": f"{verdict}, {length}"}


if __name__ == "__main__":
    run(main)
