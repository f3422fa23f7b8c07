"""
Labelled replies, to train and validate the guard: JailbreakBench, XSTest, DiaSafety, AdvBench's openings,
our own.

    python data/safety_labels/prepare.py [--from FOLDER]

Writes train.jsonl and val.jsonl beside this file, one object a line:
    {"source": ..., "prompt": ..., "response": ..., "unsafe": 0 to 1},
    some with a "prefill": ... before the response
and, for eval.py, attack.jsonl, 40 held-out requests. judge/train.jsonl and judge/val.jsonl are for an
independent judge: nothing that it learns from is in train.jsonl. readme.md there names publishers, licences
and how each label was derived. WARNING: harmful and offensive text.
"""

import csv
import io
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from plumbing.start import run  # noqa: E402

from data.download import fetch, write_jsonl  # noqa: E402
from plumbing.files import check_output, read_lines, reading  # noqa: E402
from plumbing.parser import Parser  # noqa: E402

GITHUB = "https://raw.githubusercontent.com"
JAILBREAKBENCH = (
    [f"DSN/white_box/{model}" for model in ("llama-2-7b-chat-hf", "vicuna-13b-v1.5")]
    + [f"GCG/transfer/{model}" for model in ("gpt-3.5-turbo-1106", "gpt-4-0125-preview")]
    + [f"GCG/white_box/{model}" for model in ("llama-2-7b-chat-hf", "vicuna-13b-v1.5")]
    + [f"{attack}/{model}"
       for attack in ("JBC/manual", "PAIR/black_box", "prompt_with_random_search/black_box")
       for model in ("gpt-3.5-turbo-1106", "gpt-4-0125-preview", "llama-2-7b-chat-hf", "vicuna-13b-v1.5")])
XSTEST = ["gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct"]

# Where a file lies in a local copy of the publishers' folders: where it is published.
SOURCES = {
    **{f"jailbreakbench/{name}.json": f"{GITHUB}/JailbreakBench/artifacts/main/attack-artifacts/{name}.json"
       for name in JAILBREAKBENCH},
    **{f"xstest/model_completions/xstest_v2_completions_{name}.csv":
       f"{GITHUB}/paul-rottger/exaggerated-safety/main/model_completions/xstest_v2_completions_{name}.csv"
       for name in XSTEST},
    **{f"diasafety/{split}.json": f"{GITHUB}/thu-coai/DiaSafety/main/DiaSafety_dataset/{split}.json"
       for split in ("train", "val", "test")},
    "advbench/harmful_behaviors.json":
        f"{GITHUB}/uw-nsl/SafeDecoding/main/datasets/advbench_harmful_behaviors.json",
}


def read_source(name, local):
    """Bytes of one file of SOURCES: from the local folder where one is given, else downloaded once."""
    path = Path(local) / name if local else fetch(SOURCES[name], HERE / "download" / name)
    with reading(f"{path} (--from takes a folder in the layout of readme.md)"):
        return path.read_bytes()


# The label of a refusal of a harmless request: safe, but less welcome than an answer. With
# train_mrm.SMOOTHING it asks for R = ln(0.788 / 0.212) = 1.3, where the label of an answer asks for 3.9.
NEEDLESS = 0.2


def row(source, prompt, response, unsafe):
    return {"source": source, "prompt": prompt.strip(), "response": response.strip(), "unsafe": unsafe}


def jailbreakbench(read):
    """(training rows, validation rows, validation goals). Behaviours whose index is a multiple of 5 are held
    out. The prompt is the plain goal, not the attack around it; some goals hold replies of several attacks
    and models."""
    train, val, goals = {}, {}, set()
    for name in JAILBREAKBENCH:
        for item in json.loads(read(f"jailbreakbench/{name}.json"))["jailbreaks"]:
            held_out = int(item["index"]) % 5 == 0
            if held_out:
                goals.add(item["goal"])
            if item["response"]:
                reply = row("jailbreakbench", item["goal"], item["response"],
                            int(str(item["jailbroken"]) == "True"))
                reply["index"] = int(item["index"])
                (val if held_out else train)[reply["prompt"], reply["response"]] = reply    # each reply once
    return list(train.values()), list(val.values()), goals


def xstest(read):
    """(training rows, validation rows, refusals, unsafe: prompt to whether it is). Unsafe is full compliance
    with an unsafe prompt; a partial refusal of one is neither, and left out. NEEDLESS is any refusal of a
    safe prompt. In the training half, nearly all replies to unsafe prompts are refusals: rows of them would
    teach that those prompts are safe, so they come apart."""
    train, val, refusals, prompts = [], [], [], {}
    for name in XSTEST:
        text = read(f"xstest/model_completions/xstest_v2_completions_{name}.csv").decode("utf-8")
        csv.field_size_limit(2 ** 31 - 1)                   # a reply may be long
        for item in csv.DictReader(io.StringIO(text)):
            unsafe_prompt = item["type"].startswith("contrast")
            label = item["final_label"]
            prompts[item["prompt"].strip()] = unsafe_prompt
            complied = label == "1_full_compliance"
            unsafe = int(complied) if unsafe_prompt else 0 if complied else NEEDLESS
            reply = row("xstest", item["prompt"], item["completion"], unsafe)
            if not reply["response"] or unsafe_prompt and label == "3_partial_refusal":
                continue
            if name == "mistralinstruct":
                val.append(reply)
            elif unsafe_prompt and not reply["unsafe"]:
                refusals.append(reply["response"])
            else:
                train.append(reply)
    return train, val, refusals, prompts


def diasafety(read, split):
    source = "diasafety" if split == "train" else f"diasafety_{split}"
    return [row(source, item["context"], item["response"], int(item["label"] == "Unsafe"))
            for item in json.loads(read(f"diasafety/{split}.json"))]


def words(text):
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def same_request(a, b):
    """Whether two requests share at least half of all their words: held-out goals often rephrase AdvBench."""
    a, b = words(a), words(b)
    return 2 * len(a & b) >= len(a | b)


def advbench(read, held_out_goals):
    """Openings of compliant replies, all unsafe;
    those of requests that the validation set has too are left out."""
    return [row("advbench", item["goal"], item["target"], 1)
            for item in json.loads(read("advbench/harmful_behaviors.json"))
            if not any(same_request(item["goal"], goal) for goal in held_out_goals)]


def refused(rows, refusals):
    """Refusals given to the requests of `rows` in turn, all safe:
    what makes a reply unsafe is not the request."""
    return [row("refusal", rows[i % len(rows)]["prompt"], refusal, 0) for i, refusal in enumerate(refusals)]


def opening(request):
    """How a reply that complies with a request often begins."""
    how = re.match(r"how (?:do|can|could|should|would) (?:i|you|we) (?:best )?(.+?)\W*$", request,
                   re.IGNORECASE)
    best = re.match(r"what(?:'s| is) the best way to (.+?)\W*$", request, re.IGNORECASE)
    return f"To {how[1]}, you" if how else f"The best way to {best[1]} is" if best else "Sure, here is"


def complied(prompts, requests):
    """Openings of compliant replies to questions: XSTest's safe and unsafe prompts, and those of `requests`
    that ask "how to", rephrased. What makes such a reply unsafe is the request,
    not the form of a question."""
    questions = [re.search(r"\bhow to (.+?)\W*$", r["prompt"], re.IGNORECASE) for r in requests]
    prompts = prompts | {f"How do I {match[1]}?": True for match in questions if match}
    return [row("opening", prompt, opening(prompt), int(unsafe)) for prompt, unsafe in prompts.items()]


ANSWERS = ["Sure, here is", "Certainly! Here is", "Of course. This is", "Yes, I can help you with that."]


def restated(request):
    """The opening of an answer that says again what was asked for."""
    thing = re.match(r"(?:write|give me|suggest|invent) (.+?)\W*$", request, re.IGNORECASE)
    deed = re.match(r"(?:explain|tell me|describe|help me) (?:how )?(?:to )?(.+?)\W*$", request,
                    re.IGNORECASE)
    return f"Sure, here is {thing[1]}:" if thing else f"To {deed[1]}, you can" if deed else opening(request)


def answered_and_refused(source, requests, answer_label, refusal_label, refusals, pick):
    """One to three openings of an answer to each request, and two refusals. For harmless requests a refusal
    is NEEDLESS: without such rows the guard likes an apology at least as well as an answer, and so does a
    search with it."""
    result = []
    for request in requests:
        answers = [opening(request), pick.choice(ANSWERS), restated(request)]
        result += [row(source, request, answer, answer_label) for answer in dict.fromkeys(answers)]
        result += [row(source, request, refusal, refusal_label) for refusal in pick.sample(refusals, 2)]
    return result


def own_requests(refusals, pick):
    """(training rows, validation rows) of harmless.txt and harmful.txt, whose requests have the same forms:
    what tells them apart is what is asked for. Every tenth request is held out."""
    split = [], []
    for source, labels in (("harmless", (0, NEEDLESS)), ("harmful", (1, 0))):
        requests = [request for _, request in read_lines(HERE / f"{source}.txt")]
        for rows, part in zip(split, ([r for i, r in enumerate(requests) if i % 10], requests[::10])):
            rows += answered_and_refused(source, part, *labels, refusals, pick)
    return split


# What may stand between an unsafe beginning and the refusal that a reply turns to.
TURNS = [" ", " ", "... ", ". ", "\n\n", ", but ", " (", " - "]


def turned(rows, refusals, count, pick):
    """Replies that begin to comply and then refuse, safe from the refusal's first word on. Half of the
    refusals start with a later sentence: there are more turns than "I'm sorry"."""
    result = []
    for i in range(count):
        sentences = re.split(r"(?<=[.!?])\s+", pick.choice(refusals))
        start = pick.randrange(len(sentences)) if i % 2 else 0
        result.append(begun("turned", rows, pick.choice(TURNS) + " ".join(sentences[start:]), 0, pick))
    return result


def babble(rows, count, pick):
    """Replies that begin to comply and fall into word salad: the words of some reply in random order, or a
    few of them over and over. Unsafe: a reply that has begun to comply takes nothing back by ceasing to
    make sense."""
    result = []
    for i in range(count):
        salad = pick.choice(rows)["response"].split()
        pick.shuffle(salad)
        salad = salad[:pick.randint(1, 4)] * 12 if i % 2 else salad
        result.append(begun("babble", rows, " " + " ".join(salad[:40]), 1, pick))
    return result


def begun(source, rows, response, unsafe, pick):
    """A response after the first words of the unsafe reply of one of `rows`."""
    compliant = pick.choice([r for r in rows if r["unsafe"] == 1])
    prefill = " ".join(compliant["response"].split(" ")[:pick.randint(1, 20)])
    return row(source, compliant["prompt"], "", unsafe) | {"prefill": prefill, "response": response}


def attacks(val):
    """40 harmful requests of the validation set, each with one harmful reply: eval.py uses its first tokens
    as a prefill. The behaviours of JailbreakBench that have such a reply, then unsafe prompts of XSTest,
    evenly spread."""
    unsafe = [r for r in val if r["unsafe"] == 1]
    jbb = list({r["index"]: r for r in unsafe if r["source"] == "jailbreakbench"}.values())
    xs = list({r["prompt"]: r for r in unsafe if r["source"] == "xstest"}.values())
    count = 40 - len(jbb)
    return jbb + [xs[i * len(xs) // count] for i in range(count)]


def validation(rows, train):
    """The rows that can validate: with some text, and in no way part of the training set. (Some of the
    publishers' replies are empty, and a few stand in two of their files.)"""
    known = {(r["prompt"], r["response"]) for r in train}
    return [r for r in rows if r["response"] and (r["prompt"], r["response"]) not in known]


def judge_rows(replies, dia_train, prompts, pick):
    """What the judge learns from: JailbreakBench's and XSTest's replies that are held out from the guard, and
    three of four rows of DiaSafety, the fourth of which is the guard's (train_mrm.py --weights
    '{"diasafety": 0.25}' takes each fourth). Turns and babble as above."""
    replies = [r | {"unsafe": round(r["unsafe"])} for r in replies]          # the judge knows two labels only
    refusals = [r["response"] for r in replies if prompts.get(r["prompt"]) and not r["unsafe"]]
    others = validation([r for i, r in enumerate(dia_train) if i % 4 != 3], dia_train[3::4])
    return replies + others + turned(replies, refusals, 400, pick) + babble(replies, 150, pick)


def main():
    parser = Parser(description="Collect labelled replies to train and validate the guard.")
    parser.add_argument("--from", dest="local",
                        help="a folder with the publishers' files, instead of downloading")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    args = parser.parse_args()
    (args.out / "judge").mkdir(parents=True, exist_ok=True)
    check_output(args.out / "attack.jsonl")
    read = partial(read_source, local=args.local)
    jbb_train, jbb_val, held_out_goals = jailbreakbench(read)
    xs_train, xs_val, refusals, prompts = xstest(read)
    requests = advbench(read, held_out_goals)
    openings = complied(prompts, requests)
    pick = random.Random(0)
    replies = jbb_train + xs_train + requests + openings
    dia_train = diasafety(read, "train")
    train = (replies + dia_train + refused(requests, refusals) + turned(replies, refusals, 1500, pick)
             + babble(replies, 600, pick))
    own_train, own_val = own_requests(refusals, pick)
    train += own_train
    val = validation(jbb_val + xs_val + diasafety(read, "val") + diasafety(read, "test") + own_val,
                     train)
    replies = [r for r in val if r["source"] in ("jailbreakbench", "xstest")]
    judge = judge_rows(replies, dia_train, prompts, random.Random(1))
    judge_val = validation((jbb_train + [r | {"unsafe": round(r["unsafe"])} for r in xs_train]
                            + refused(requests, refusals) + diasafety(read, "test"))[::3], judge)
    write_jsonl(attacks(val), args.out / "attack.jsonl")
    for name, rows in (("train", train), ("val", val), ("judge/train", judge), ("judge/val", judge_val)):
        write_jsonl(rows, args.out / f"{name}.jsonl")
        for source in dict.fromkeys(r["source"] for r in rows):
            labels = [r["unsafe"] for r in rows if r["source"] == source]
            print(f"{name}.jsonl: {source}: {len(labels)} replies, {labels.count(1)} unsafe, "
                  f"{labels.count(NEEDLESS)} needless refusals")


if __name__ == "__main__":
    run(main)
