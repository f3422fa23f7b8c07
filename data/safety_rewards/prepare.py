"""
The MRM's corpus, the paper's Safety4M at laptop scale: replies with the guard's reward after every token.

    python data/safety_rewards/prepare.py --guard data/smollm2/guard.safetensors [--from FOLDER]

Two kinds of replies: those of HH-RLHF's harmless dialogues, and the policy's own, sampled for the harmful requests of
data/safety_labels (prepare that first) with and without a prefill. Writes replies.jsonl, which an interrupted run
continues, and corpus.safetensors; readme.md describes both. WARNING: harmful and offensive text.
"""

import gzip
import http.client
import itertools
import json
import os
import random
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from model import BadInput, Llama, Parser, read_jsonl       # noqa: E402
from mrm import load_adapter                                # noqa: E402
from search import Branch, draw, extend, next_logits, nucleus   # noqa: E402
from train_mrm import Example, predictions                  # noqa: E402
from trie_cache import TrieCache                            # noqa: E402

HH_FILE = "hh_rlhf/harmless-base/test.jsonl.gz"
HH_URL = "https://raw.githubusercontent.com/anthropics/hh-rlhf/master/harmless-base/test.jsonl.gz"
SOURCES = ["hh_rlhf", "policy, nucleus", "policy, uniform", "policy, refused"]
PROMPTS_A_BATCH, REPLIES_A_PROMPT = 8, 4


def read_hh(local):
    """Bytes of HH-RLHF's harmless-base/test.jsonl.gz: local, or downloaded once."""
    path = Path(local) / HH_FILE if local else HERE / "download" / HH_FILE
    if not local and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        print(f"downloading {HH_URL}", file=sys.stderr)
        try:
            with urllib.request.urlopen(HH_URL, timeout=60) as answer:
                partial.write_bytes(answer.read())
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            sys.exit(f"{HH_URL} could not be downloaded ({error}); pass a folder that has {HH_FILE} with --from")
        os.replace(partial, path)
    return gzip.decompress(path.read_bytes())


def hh_replies(llama, data, count, max_prompt, max_reply):
    """The last turn of `count` dialogues, evenly spread, the preferred and the rejected reply in turn."""
    lines = data.decode("utf-8").strip().split("\n")
    eos, rows = llama.config.eos_token_ids[0], []
    for i in range(count):
        dialogue = json.loads(lines[i * len(lines) // count])["rejected" if i % 2 else "chosen"]
        before, _, reply = dialogue.rpartition("\n\nAssistant:")
        prompt = before.rpartition("\n\nHuman:")[2]
        if prompt.strip() and reply.strip():
            rows.append({"source": 0, "prompt": llama.tokenizer.encode(prompt.strip())[-max_prompt:],
                         "reply": (llama.tokenizer.encode(reply.strip()) + [eos])[:max_reply],
                         "held_out": i // 2 % 10 == 0})
    return rows


def harmful_requests(labels):
    """(request, compliant reply, held out) of AdvBench and JailbreakBench's training half, each request once; every
    tenth is held out."""
    wanted = {r["prompt"]: r["response"] for r in reversed(labels)
              if r["unsafe"] and r["source"] in ("advbench", "jailbreakbench")}
    return [(request, reply, i % 10 == 0) for i, (request, reply) in enumerate(wanted.items())]


@torch.no_grad()
def sample_batch(policy, requests, turns, max_prompt, max_reply, seed):
    """Rows of the policy's own replies to a few requests, all in one trie. Each request gets a prefill of 0 to 16
    tokens; half of its replies are drawn from the nucleus by probability, half uniformly, for a search goes to
    tokens that the policy alone would seldom pick. `turns`: refusals, of one of which 1 to 12 tokens follow the
    prefill, or none of them."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, contexts = [], []
    for request, opening, held_out in requests:
        prompt = policy.tokenizer.encode(request)[-max_prompt:]
        prefill = policy.tokenizer.encode(opening)[:pick.randint(0, 16)]
        for i in range(REPLIES_A_PROMPT):
            turn = policy.tokenizer.encode(pick.choice(turns))[:pick.randint(1, 12)] if turns else []
            begun = (prefill + turn)[:max_reply]
            rows.append({"source": 3 if turns else 1 + i % 2, "prompt": prompt, "reply": begun, "held_out": held_out})
            contexts.append(policy.template(prompt, begun))
    trie, branches = TrieCache(policy), [Branch() for _ in rows]
    for length in range(max_reply):
        growing = [i for i, branch in enumerate(branches)
                   if not branch.finished and len(rows[i]["reply"]) + length < max_reply]
        if not growing:
            break
        logits = next_logits(policy, trie([contexts[i] + branches[i].tokens for i in growing]), length, 0)
        for i, row in zip(growing, logits):
            p = row.softmax(-1)
            if i % 2:
                tokens = nucleus(p, 0.8)
                token = tokens[torch.randint(len(tokens), (), generator=generator)].item()
            else:
                token = draw(p, 0.9, generator)
            branches[i] = extend(policy, branches[i], token)
    return [row | {"reply": row["reply"] + branch.tokens} for row, branch in zip(rows, branches)]


def collect(path, run, requests, batches, make):
    """The rows of make(requests of the batch, batch) of all batches: read from `path` as far as an interrupted run has
    got, made beyond. The file's first line says which run it is, each other one holds a batch. Raises BadInput for
    the file of another run."""
    order = list(range(len(requests)))
    random.Random(run["seed"]).shuffle(order)
    with open(path, "a+b") as file:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1] or [json.dumps(run).encode()]      # the last line may be cut off
        if json.loads(lines[0]) != run:
            raise BadInput(f"{path} is of a run with {lines[0].decode()}, not {json.dumps(run)}; delete it to start anew")
        file.truncate(0)
        file.write(b"".join(line + b"\n" for line in lines))
        for batch in tqdm(range(len(lines) - 1, batches), desc="sampling", unit="batch", file=sys.stderr):
            chosen = [order[(batch * PROMPTS_A_BATCH + i) % len(order)] for i in range(PROMPTS_A_BATCH)]
            file.write(json.dumps({"rows": make([requests[i] for i in chosen], batch)}).encode() + b"\n")
            file.flush()
    return [row for _, line in itertools.islice(read_jsonl(path), 1, 1 + batches) for row in line["rows"]]


def write_corpus(path, rows, rewards, guard, args):
    """The corpus as readme.md describes it, written to a temporary name and renamed."""
    flat = lambda lists: torch.tensor([value for values in lists for value in values])
    lengths = lambda lists: torch.tensor([len(values) for values in lists])
    prompts, replies = [r["prompt"] for r in rows], [r["reply"] for r in rows]
    tensors = {"sources": torch.tensor([r["source"] for r in rows], dtype=torch.uint8),
               "held_out": torch.tensor([r["held_out"] for r in rows]),
               "prompts": flat(prompts).int(), "prompt_lengths": lengths(prompts),
               "replies": flat(replies).int(), "reply_lengths": lengths(replies),
               "rewards": torch.cat([torch.from_numpy(r) for r in rewards])}
    metadata = {"vocabulary": guard.llama.tokenizer.fingerprint, "source_names": SOURCES, "guard": args.guard,
                "template": [guard.template.prefix, guard.template.infix]}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={key: json.dumps(value) for key, value in metadata.items()})
    os.replace(partial, path)


def main():
    parser = Parser(description="Make the MRM's training corpus.")
    add = parser.add_argument
    add("--guard", default="data/smollm2/guard.safetensors", help="the guard that gives the rewards")
    add("--policy", default="data/smollm2", help="the policy that writes replies, and the guard's base")
    add("--from", dest="local", help=f"a folder with {HH_FILE}, instead of downloading it")
    add("--hh_replies", type=int, default=1200)
    add("--policy_batches", type=int, default=28, help=f"of {PROMPTS_A_BATCH * REPLIES_A_PROMPT} replies each")
    add("--refused_batches", type=int, default=24, help="the same, with the beginning of a refusal after the prefill")
    add("--max_prompt", type=int, default=64, help="tokens kept of a prompt, the last ones")
    add("--max_reply", type=int, default=56, help="tokens of a reply, prefill included")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    llama = Llama.load(args.policy)
    guard = load_adapter(args.guard, llama, "guard")
    path = HERE.parent / "safety_labels" / "train.jsonl"
    if not path.exists():
        raise BadInput(f"{path} is missing; run data/safety_labels/prepare.py first")
    labels = [row for _, row in read_jsonl(path)]
    requests, turns = harmful_requests(labels), [r["response"] for r in labels if r["source"] == "turned"]
    rows = hh_replies(llama, read_hh(args.local), args.hh_replies, args.max_prompt, args.max_reply)
    run = {"policy": llama.fingerprint, "requests": len(requests), "max_prompt": args.max_prompt,
           "max_reply": args.max_reply, "refused_batches": args.refused_batches, "seed": args.seed}
    rows += collect(HERE / "replies.jsonl", run, requests, args.policy_batches + args.refused_batches,
                    lambda some, batch: sample_batch(llama, some, turns if batch < args.refused_batches else [],
                                                     args.max_prompt, args.max_reply, args.seed + batch))
    examples = [Example(SOURCES[r["source"]], guard.template(r["prompt"]), r["reply"], [0.0] * len(r["reply"]))
                for r in rows]
    rewards = predictions(guard, examples, "cpu")
    write_corpus(HERE / "corpus.safetensors", rows, rewards, guard, args)
    report(rows, rewards)


def report(rows, rewards):
    """What a reader of the log wants to know of the corpus."""
    for i, source in enumerate(SOURCES):
        mine = [torch.from_numpy(r) for row, r in zip(rows, rewards) if row["source"] == i]
        if mine:
            values = torch.cat(mine)
            print(f"{source}: {len(mine)} replies, {len(values)} tokens, reward mean {values.mean():.2f}, variance "
                  f"{values.var():.2f}, negative {(values < 0).float().mean():.2f}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (OSError, EOFError, ValueError, KeyError) as error:
        sys.exit(f"could not prepare the corpus: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
