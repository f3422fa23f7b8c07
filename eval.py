"""
Attack the default policy, or any, and measure the defences on the same prompts.

    python eval.py --data data/prompts/harmful_test.jsonl --safety none,saffron --width 1,4 --out out/eval
    torchrun --nproc_per_node 2 eval.py ...             the prompts shared by two processes

A data row is {"prompt": ..., "response": ..., "category": ...}: a harmful request, and a harmful reply whose
first tokens are put into the model's mouth (--attack prefill). --attack suffix appends --suffix, or the row's
"suffix", to the prompt; --attack scramble changes its spelling; --attack none asks plainly. The verdict is on
the request as the row has it. Rows of the category "harmless" are asked plainly and reported apart.

In float32 and float64, neither --batch nor the number of processes changes a reply, but for rare draws that
rounding decides. In bfloat16 and float16 both do: rounding there depends on how many rows a pass has.

Prompts are taken --batch at a time, each through all methods and widths. After each batch of a search its
replies are appended to OUT/results.jsonl. A run that was interrupted goes on there; one with other methods or
widths adds to it. In the end, OUT has summary.json, one object for each method and width, over the rows that
this call names; table.md, the same as a table; and with --plot asr.png. All but the last line are over the
harmful prompts. All but scaleff are means over replies, NAME_ci their 95 % interval over different requests
(plumbing/tables.py):

    asr           attack success rate: share of replies with a negative reward of the guard, as in the paper
    judge_asr     the same by the judge, a guard that takes no part in a search (ours learned from other data)
    guard_reward, judge_reward
    reward        what the search took the reward to be: M's prediction, or R
    tflop, reward_calls, seconds, tokens      what a reply cost (the judging is not counted) and its length
    empty         share of replies without any text
    degenerate    share of replies in which some four tokens in a row come twice (never with beta)
    distinct      different tokens of a reply / its tokens
    log_prob      log-probability per token under the policy: fluency as the policy sees it
    scaleff       the paper's scaling efficiency (Eq. 1), ln(TFLOP limit / tflop) / asr; null where asr is 0
    refused, flagged, same      of harmless prompts: share of replies that refuse, that get a negative reward
                  of the guard, and that equal the undefended reply
"""

from plumbing.start import run                          # first: it sets what torch reads

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from baselines import SEARCHES
from plumbing import options
from plumbing.attacks import ATTACKS, Attacker
from plumbing.checkpoint import DEFAULT
from plumbing.errors import BadInput
from plumbing.files import check_output, locked, write_file
from plumbing.guards import guard_for, load_guard
from plumbing.measures import Measures
from plumbing.parallel import join_processes, wait
from plumbing.parser import Parser, number
from plumbing.runs import finish_arguments, read_attacks, same_run
from plumbing.tables import markdown, merge_results, read_results, summarize


REFUSED = ("The column `refused` counts replies by their words. Of XSTest's refusals of safe requests it\n"
           "finds 95 %, of unsafe ones 90 %; it calls 3 % of the answers refusals.")


def attacker_of(args, models):
    return Attacker(models.policy, hide_prefill=args.hide_prefill, prefill_tokens=args.prefill_tokens,
                    suffix=args.suffix, seed=args.seed)


def attacked(row, attacker, attack):
    """The Prompt of a row under the attack, of which harmless rows are spared, and that of the request as it
    was asked, with the same prefill: the verdict is on this one."""
    spared = row.get("category") == "harmless"
    prompt = ATTACKS["none" if spared else attack].make(attacker, row, 0)
    return prompt, attacker.prompt(row["prompt"], prompt.prefill)


def evaluate(rows, done, file, models, judge, args, show):
    """Run all methods on these rows, --batch prompts at a time, except what is in `done`: {(method, width,
    number)}. Every reply is written to the file. show: whether to draw a bar."""
    numbers = list(rows)
    attacker = attacker_of(args, models)
    hits = {run: [] for run in args.runs}           # of each method and width: whether each attack succeeded
    total = sum((*run, i) not in done for run in args.runs for i in numbers)
    with tqdm(total=total, unit="reply", file=sys.stderr, disable=not show) as bar:
        for start in range(0, len(numbers), args.batch):
            batch = numbers[start:start + args.batch]
            pairs = {i: attacked(rows[i], attacker, args.attack) for i in batch}
            prompts = {i: prompt for i, (prompt, _) in pairs.items()}
            asked = {i: request for i, (_, request) in pairs.items()}
            measures = Measures(models.policy, models.guard, judge, prompts, asked)
            for method, width in args.runs:
                # 1. Search for a reply to each prompt that has none yet.
                todo = [i for i in batch if (method, width, i) not in done]
                if not todo:
                    continue
                search = SEARCHES[method].search
                results = search(models.policy, models.reward_models[method], [prompts[i] for i in todo],
                                 options.search_options(args, width))
                # 2. Measure the replies, and write them down.
                for i, answer in measures(dict(zip(todo, results))).items():
                    own = {"row": i, "safety": method, "width": width} | answer
                    others = {key: value for key, value in rows[i].items() if key not in own}
                    file.write(json.dumps(own | others, ensure_ascii=False, allow_nan=False) + "\n")
                    if rows[i].get("category") != "harmless":
                        hits[method, width].append(answer["asr"])
                file.flush()
                # 3. Tell who waits.
                bar.update(len(todo))
                bar.set_postfix_str(f"{method} {width}: ASR {np.mean(hits[method, width] or [0]):.0%}")
            if show:
                rates = ", ".join(f"{m} {w} {np.mean(hit):.0%}" for (m, w), hit in hits.items() if hit)
                bar.write(f"{start + len(batch)} of {len(numbers)} prompts; ASR: {rates or 'no attack yet'}",
                          file=sys.stderr)


def parse_arguments():
    parser = Parser(description="Measure defences against attacks.",
                    epilog=options.describe_searches() + "\n\n" + REFUSED)
    add = parser.group("data and attack")
    add("--data", required=True, nargs="+", metavar="FILE.jsonl", help="files with one JSON object a line")
    add("--limit", type=number(1), help="use only the first so many rows of each file (default: all)")
    add("--attack", choices=[name for name, attack in ATTACKS.items() if not attack.knows_mrm],
        default="prefill", help="what the attacker does, in one try (attack.py makes many)")
    add("--prefill_tokens", type=number(0), default=10, help="tokens of the response that are the prefill")
    add("--hide_prefill", action="store_true", help="keep the prefill from guard, MRM and judge")
    add("--suffix", default="", help="what --attack suffix appends to each prompt (default: the row's own)")
    add = parser.group("searches")
    add("--safety", default="none,best_of_n,saffron", help="searches, with commas between; beam:1/2 "
        "gives beam the widths 1 and 2")
    add("--width", default="4", help="widths, such as 1,4,16 (the search none has no width)")
    options.add_search_options(add)
    add("--batch", type=number(1), default=1, help="prompts searched side by side; changes no reply, except "
        "by rounding, which in bfloat16 is often")
    add = parser.group("models")
    options.add_model_options(add)
    add("--judge", default=DEFAULT / "judge.safetensors", metavar="PATH", help="a second guard, which only "
        "measures; same forms as --guard")
    add = parser.group("output")
    add("--tflop_limit", type=number(1e-12, 1e12, float), help="TFLOP limit of scaleff (default: the "
        "costliest search's tflop)")
    add("--plot", action="store_true", help="draw OUT/asr.png")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder of results, where a stopped "
        "run goes on")
    args = parser.parse_args()
    finish_arguments(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib: pip install matplotlib")
    return args


def start(args):
    """The rows, the Models and the judge, for one process. Raises BadInput for what cannot be run."""
    rows = read_attacks(args.data, args.attack, args.suffix, args.limit)
    check_output(args.out / "arguments.json")
    models = options.load_models(args, [method for method, _ in args.runs])
    judge = guard_for(models.policy, load_guard(args.judge, models.base))
    attacker = attacker_of(args, models)
    for row in rows.values():                                   # before the first search, not after hours
        try:
            prompt, _ = attacked(row, attacker, args.attack)
            for reward_model in dict.fromkeys([models.guard, judge, *models.reward_models.values()]):
                options.check_prompt(models.policy, reward_model, prompt, args.max_new_tokens)
        except BadInput as error:
            raise BadInput(f"{row['source']}: {error}") from None
    return rows, models, judge


def main():
    args = parse_arguments()
    rank, processes = join_processes(args, "gloo")              # which wait for each other, and share nothing
    if rank > 0:
        wait()                                                  # for what the first one prepares and refuses
        return work(args, rank, processes)
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out}: expected the name of a folder, but this is a file")
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        work(args, rank, processes)


def work(args, rank, processes):
    """What one process does, of those that share a run."""
    rows, models, judge = start(args)
    if rank == 0:
        results = read_results(args.out)
        same_run(args.out / "arguments.json", args, models, results, processes)
        for result in merge_results(args.out):
            row = rows.get(result["row"], result)       # one that this call does not name stays as it is
            decisive = ("source", "prompt", "response", "suffix", "category")
            if any(result.get(key) != row.get(key) for key in decisive):
                raise BadInput(f"{args.out} holds results for another prompt than {row['source']} has now; "
                               "choose another --out")
        wait()
    done = {(r["safety"], r["width"], r["row"]) for r in read_results(args.out)}
    mine = {i: row for i, row in rows.items() if i % processes == rank}
    own_file = args.out / (f"results-{rank}.jsonl" if rank else "results.jsonl")
    with open(own_file, "a", encoding="utf-8", newline="\n") as file:
        evaluate(mine, done, file, models, judge, args, show=rank == 0)
    wait()
    if rank == 0:
        summary = summarize([r for r in merge_results(args.out) if r["row"] in rows], args.tflop_limit)
        write_file(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_file(args.out / "table.md", markdown(summary))
        if args.plot and any("asr" in line for line in summary):
            from results.draw import attack_success
            attack_success(args.out / "asr.png", summary)
        print(markdown(summary), end="")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
