"""
The MRM's corpus, the paper's Safety4M: replies with the guard's reward after every token.
At laptop scale, or in full.

    python data/safety_rewards/prepare.py [--from FOLDER]
    python data/safety_rewards/prepare.py --hh_replies all --policy_batches 0 --refused_batches 0
        --ordinary_batches 0 ...
    torchrun --nproc_per_node 4 data/safety_rewards/prepare.py ...  the same shards, made by four processes

Two kinds of replies: those of HH-RLHF's harmless dialogues, and the policy's own, sampled for the harmful
requests of data/safety_labels (prepare that first) with and without a prefill, and for ordinary requests.
With --search_batches a third: what saffron's search with an earlier MRM visits (data/search_states.py).
Writes the shards corpus-*.safetensors and manifest.json, which readme.md describes; shards that are there
already are not made again. WARNING: harmful and offensive text.
"""

import gzip
import json
import random
import re
import sys
from argparse import ArgumentTypeError
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from plumbing.start import run  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402
from tqdm import tqdm  # noqa: E402

from baselines import draw_tokens  # noqa: E402
from data.corpus import Example  # noqa: E402
from data.download import fetch, sha256  # noqa: E402
from data.search_states import first_turn, first_turns, is_held_out, requests_of, search_batch  # noqa: E402
from engine import Options  # noqa: E402
from mrm import Guard  # noqa: E402
from plumbing.adapters import guard_id, load_adapter, read_metadata  # noqa: E402
from plumbing.attacks import ATTACKS  # noqa: E402
from plumbing.checkpoint import load_llama  # noqa: E402
from plumbing.checkpoint import read_tensors  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.errors import check_finite  # noqa: E402
from plumbing.shared import share_pass  # noqa: E402
from plumbing.files import check_output, read_jsonl, reading, write_file  # noqa: E402
from plumbing.guards import guard_for  # noqa: E402
from plumbing.guards import load_guard  # noqa: E402
from plumbing.options import DTYPES  # noqa: E402
from plumbing.parallel import place_among_processes  # noqa: E402
from plumbing.parser import Parser, number  # noqa: E402
from plumbing.templates import opens_thinking  # noqa: E402
from plumbing.tokenizer import Prompt  # noqa: E402
from plumbing.validate import predictions  # noqa: E402
from search import next_logits, nucleus  # noqa: E402
from trie_cache import TrieCache, compute  # noqa: E402

HH_FILE = "hh_rlhf/harmless-base/{}.jsonl.gz"
HH_URL = "https://raw.githubusercontent.com/anthropics/hh-rlhf/master/harmless-base/{}.jsonl.gz"
SOURCES = ["hh_rlhf", "policy, nucleus", "policy, uniform", "policy, refused", "policy, ordinary",
           "policy, hidden prefill", "search, beta 0", "search, beta above 0"]
HIDDEN_PREFILL = SOURCES.index("policy, hidden prefill")
SEARCHES = (SOURCES.index("search, beta 0"), SOURCES.index("search, beta above 0"))
PROMPTS_A_BATCH = 8
REPLIES_A_PROMPT = 4
SIBLINGS_EVERY = 4              # tokens of a reply; where siblings are labelled
SEARCH_SIBLINGS_EVERY = 3       # the same of a search's reply
SEARCH_SIBLINGS = 7             # at most, after a prefix
BEST_SIBLINGS = 4               # of these, those that the MRM likes best


def read_hh(local, split):
    """The pairs of dialogues of HH-RLHF's harmless-base, "train" or "test": local, or downloaded once."""
    name = HH_FILE.format(split)
    path = Path(local) / name if local else fetch(HH_URL.format(split), HERE / "download" / name)
    with reading(path, "a file of HH-RLHF"):
        pairs = [json.loads(line)
                 for line in gzip.decompress(path.read_bytes()).decode("utf-8").strip().split("\n")]
        return [{side: pair[side] for side in ("chosen", "rejected")} for pair in pairs]


def hh_dialogues(local, count):
    """(dialogue, held out): of `count` pairs of the test split, evenly spread, the preferred and the rejected
    one in turn, a tenth held out by their first turns; or, count being "all", both of all pairs, the test
    split held out."""
    if count == "all":
        return [(pair[side], split == "test") for split in ("train", "test") for pair in read_hh(local, split)
                for side in ("chosen", "rejected")]
    pairs = read_hh(local, "test") if count else []
    if count > len(pairs):
        raise BadInput(f"--hh_replies {count}: expected at most {len(pairs)}, or all")
    dialogues = [pairs[i * len(pairs) // count]["rejected" if i % 2 else "chosen"] for i in range(count)]
    return [(dialogue, is_held_out(first_turn(dialogue))) for dialogue in dialogues]


def hh_replies(llama, dialogues, max_prompt, max_reply):
    """The last turn of each dialogue as a row; dialogues that have none are left out."""
    eos = llama.config.end_of_turn
    rows = []
    for dialogue, held_out in dialogues:
        before, _, reply = dialogue.rpartition("\n\nAssistant:")
        prompt = before.rpartition("\n\nHuman:")[2]
        if prompt.strip() and reply.strip():
            rows.append({"source": 0, "prompt": llama.tokenizer.encode(prompt.strip())[-max_prompt:],
                         "reply": (llama.tokenizer.encode(reply.strip()) + [eos])[:max_reply],
                         "held_out": held_out})
    return rows


def harmful_requests(labels):
    """(request, compliant reply, held out) of AdvBench, JailbreakBench's training half, the unsafe questions
    that the labels have openings for, and harmful.txt, each request once; every tenth is held out, in
    whatever words."""
    wanted = {r["prompt"]: r["response"] for r in reversed(labels)  # the first reply of each request stays
              if r["unsafe"] == 1 and r["source"] in ("advbench", "jailbreakbench", "opening", "harmful")}

    def deed(request):                              # the same for "How do I ...?" and "Explain how to ..."
        return re.sub(r"^.*?\bhow (to|do i) ", "", request.lower()).strip(" .?!")

    number = {name: i for i, name in enumerate(dict.fromkeys(map(deed, wanted)))}
    return [(request, reply, number[deed(request)] % 10 == 0) for request, reply in wanted.items()]


def ordinary_requests(policy, labels, synthetic, seed):
    """(request, opening of a reply, held out) of requests that are no attack: XSTest's safe prompts, the
    labels' other harmless requests, and as many as `synthetic` says that the policy makes up when it is to
    write the user's turn (Magpie, Xu et al. 2024, arXiv 2406.08464). Every tenth is held out."""
    requests = list({r["prompt"]: r["response"] for r in reversed(labels)
                     if r["source"] in ("opening", "harmless") and not r["unsafe"]}.items())
    trie = TrieCache(policy)
    generator = torch.Generator().manual_seed(seed)
    made_up = {}
    root = trie.insert(trie.root, policy.template.opening())
    for _ in range(synthetic):
        if len(made_up) >= synthetic:
            break
        # about half of them end
        texts = [[] for _ in range(min(2 * synthetic, PROMPTS_A_BATCH * REPLIES_A_PROMPT))]
        go_on(policy, [trie] * len(texts), [root] * len(texts), texts, 40, generator)
        made_up |= {policy.tokenizer.decode(t[:-1]).strip(): ""
                    for t in texts if t[-1] in policy.config.eos_token_ids}
        made_up.pop("", None)
    if len(made_up) < synthetic:
        raise BadInput("the policy does not end a user's turn within 40 tokens, "
                       "so it can make up no requests; pass --ordinary_batches 0 --synthetic 0")
    requests += list(made_up.items())[:synthetic]
    return [(request, opening, i % 10 == 0) for i, (request, opening) in enumerate(requests)]


@torch.no_grad()
def go_on(policy, tries, nodes, texts, limit, generator, uniform=lambda i: False):
    """Lengthen each text in place until end-of-sequence or `limit` tokens: text i stands in tries[i] and ends
    at nodes[i]. Tokens are drawn from the nucleus by probability or, where uniform(i), uniformly."""
    nodes = list(nodes)
    growing = list(range(len(texts)))
    while growing := [i for i in growing if len(texts[i]) < limit]:
        compute(policy, list(dict.fromkeys(tries)))
        hidden = torch.cat([tries[i].hidden_at([nodes[i]]) for i in growing])
        for i, p in zip(growing, next_logits(policy, hidden, length=0, min_new_tokens=0).softmax(-1)):
            if uniform(i):
                tokens = nucleus(p, 0.8)
                token = tokens[torch.randint(len(tokens), (), generator=generator)].item()
            else:
                token, = draw_tokens(p, 0.9, 1, generator)
            texts[i].append(token)
            nodes[i] = tries[i].insert(nodes[i], [token])
        growing = [i for i in growing if texts[i][-1] not in policy.config.eos_token_ids]


def sample_batch(policy, requests, turns, source, max_prompt, max_reply, seed):
    """Rows of the policy's own replies to a few requests, side by side. Each request gets a prefill of 0 to
    16 tokens; half of its replies are drawn from the nucleus by probability, half uniformly, for a search
    goes to tokens that the policy alone would seldom pick. `turns`: refusals, of one of which 1 to 12 tokens
    follow the prefill; an empty list: nothing does. source: index of SOURCES;
    None: how the reply is drawn."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, tries, nodes = [], [], []                         # a row's trie, and its reply's node there
    for request, opening, held_out in requests:
        trie = TrieCache(policy)
        prompt = policy.tokenizer.encode(request)[-max_prompt:]
        prefill = policy.tokenizer.encode(opening)[:pick.randint(0, 16)]
        for i in range(REPLIES_A_PROMPT):
            turn = policy.tokenizer.encode(pick.choice(turns))[:pick.randint(1, 12)] if turns else []
            begun = (prefill + turn)[:max_reply]
            rows.append({"source": 1 + i % 2 if source is None else source, "prompt": prompt, "reply": begun,
                         "held_out": held_out, "prefill": prefill})
            tries.append(trie)
            nodes.append(trie.insert(trie.root, policy.template(prompt, begun)))
    go_on(policy, tries, nodes, [r["reply"] for r in rows], max_reply, generator,
          uniform=lambda i: i % 2 == 1)
    return rows


def own_replies(policy, harmful, ordinary, turns, batches, args):
    """The policy's own replies in the batches of these numbers: first the --refused_batches, which turn to a
    refusal, then the --policy_batches, then the --ordinary_batches, every third of which turns to a
    refusal too."""
    rows = []
    first_ordinary = args.refused_batches + args.policy_batches
    for requests in (harmful, ordinary):
        random.Random(args.seed).shuffle(requests)
    for batch in tqdm(batches, desc="sampling", unit="batch", file=sys.stderr):
        requests, start = (ordinary, batch - first_ordinary) if batch >= first_ordinary else (harmful, batch)
        chosen = [requests[(start * PROMPTS_A_BATCH + i) % len(requests)] for i in range(PROMPTS_A_BATCH)]
        refused = batch < args.refused_batches
        source = 3 if refused else 4 if batch >= first_ordinary else None
        apologizes = refused or batch >= first_ordinary and batch % 3 == 0
        new = sample_batch(policy, chosen, turns if apologizes else [], source, args.max_prompt,
                           args.max_reply, args.seed + batch)
        pick = random.Random(args.seed + batch)
        rows += new + [hide_prefill(row) for row in new
                       if 0 < len(row["prefill"]) < len(row["reply"]) and pick.random() < args.hidden]
    return rows


def hide_prefill(row):
    """The reply as guard and MRM see it under --hide_prefill: it begins after the prefill."""
    return row | {"source": HIDDEN_PREFILL, "reply": row["reply"][len(row["prefill"]):], "hidden": True}


def search_replies(policy, mrm, kinds, batches, args):
    """What searches with the MRM visit, in the --search_batches of these numbers. kinds: as requests_of takes
    them."""
    rows = []
    for batch in tqdm(batches, desc="searching", unit="batch", file=sys.stderr, disable=not batches):
        requests = requests_of(batch, PROMPTS_A_BATCH, kinds)
        rows += search_batch(policy, mrm, requests, batch, SEARCHES, args.max_prompt, args.max_reply,
                             args.seed, args.attack)
    return rows


@torch.no_grad()
def sibling_labels(policy, guard, row, most, generator, mrm=None):
    """[(position, token, R)]: at every SIBLINGS_EVERY-th position of a reply, from a random one on, up to
    `most` tokens of the policy's nucleus, with the guard's reward if that token came next. The likeliest
    stands first, the others are drawn uniformly. Where a search with the MRM has visited the reply: at every
    SEARCH_SIBLINGS_EVERY-th position, those of its candidates that `best_and_others` chooses.
    The guard reads the whole in a trie, where each costs one token."""
    # 1. Nucleus, and M of it, at some positions: where a search has chosen, after the prefill.
    reply = row["reply"]
    labels = []
    searched = row.get("searched", False)
    every = SEARCH_SIBLINGS_EVERY if searched else SIBLINGS_EVERY
    before = row["prefill"] if row.get("hidden") else []                        # what the policy alone reads
    forced = len(row["prefill"]) if searched and not before else 0
    start = torch.randint(every, (), generator=generator).item()
    positions = range(forced + start, len(reply), every)
    if not positions:
        return []
    hidden = hidden_before(policy, policy.template(row["prompt"], before), reply, positions)
    if searched:
        of_mrm = hidden_before(mrm.llama, mrm.template(row["prompt"]), reply, positions)
    p = next_logits(policy, hidden, length=0, min_new_tokens=0).softmax(-1)
    for n, position in enumerate(positions):
        tokens = nucleus(p[n], 0.8)
        # 2. The siblings: places in the nucleus, the likeliest first.
        if searched:
            tokens = tokens[~mrm.unseen[tokens]]
            if position - forced < Options.min_new_tokens:      # a search does not let a reply end so soon
                tokens = tokens[[token not in policy.config.eos_token_ids for token in tokens.tolist()]]
            m = mrm.child_rewards(of_mrm[n].expand(len(tokens), -1), tokens)
            chosen = best_and_others(m, generator)
        else:
            others = torch.randperm(len(tokens) - 1, generator=generator)[:most - 1].sort().values.tolist()
            chosen = [0, *(1 + i for i in others)]
        if len(chosen) > 1:
            labels += [(position, token) for token in tokens[chosen].tolist()]
    if not labels:
        return []
    # 3. Their rewards.
    asked = Prompt(row.get("asked", row["prompt"]))
    rewards = guard.score(asked, [reply[:position] + [token] for position, token in labels])
    return [(*label, reward) for label, reward in zip(labels, rewards.tolist())]


def hidden_before(llama, context, reply, positions):
    """The final hidden states before the reply's tokens at these n positions: (n, d)."""
    hidden = llama(torch.tensor([context + reply], device=llama.device))[0]
    return hidden[[len(context) + position - 1 for position in positions]]


def best_and_others(m, generator):
    """Which of m candidates become siblings, up to SEARCH_SIBLINGS: the first, which is the likeliest, the
    BEST_SIBLINGS with the highest M, others drawn uniformly. Their places, ascending. m: M of each (m,)."""
    if not len(m):
        return []
    order = m.sort(descending=True, stable=True).indices.tolist()
    chosen = {0, *order[:BEST_SIBLINGS]}
    others = [i for i in torch.randperm(len(m), generator=generator).tolist() if i not in chosen]
    return sorted([*chosen, *others[:SEARCH_SIBLINGS - len(chosen)]])


def beginnings(reply):
    return [reply[:end] for end in range(1, len(reply) + 1)]


def rewards_after_each_token(guard, examples, device, size=16):
    """The guard's R of each beginning of each example's reply: a list of float arrays. A Llama Guard's suffix
    comes after each of them: `size` of these are read at a time, in a trie."""
    suffix = guard.template.suffix
    result = []
    if not suffix:
        return predictions(guard, examples, device)
    for e in examples:
        trie = TrieCache(guard.llama)
        rewards = []
        for start in range(0, len(e.reply), size):
            ends = range(start + 1, min(start + size, len(e.reply)) + 1)
            prefixes = [trie.insert(trie.root, e.context + e.reply[:end]) for end in ends]
            asked = [trie.insert(prefix, suffix) for prefix in prefixes]
            compute(guard.llama, [trie])
            rewards.append(guard.reward(trie.hidden_at(asked)).float().cpu())
            trie.prune(prefixes)
        result.append(torch.cat(rewards).numpy())
    return result


def flat(lists):
    return torch.tensor([value for values in lists for value in values])


def lengths(lists):
    return torch.tensor([len(values) for values in lists])


def write_shard(path, rows, rewards, siblings, metadata):
    """A shard as readme.md describes it, written to a temporary name and renamed. siblings: of each row its
    `sibling_labels`."""
    prompts = [r["prompt"] for r in rows]
    replies = [r["reply"] for r in rows]
    tensors = {"sources": torch.tensor([r["source"] for r in rows], dtype=torch.uint8),
               "held_out": torch.tensor([r["held_out"] for r in rows]),
               "prompts": flat(prompts).int(), "prompt_lengths": lengths(prompts),
               "replies": flat(replies).int(), "reply_lengths": lengths(replies),
               "rewards": check_finite(torch.cat([torch.from_numpy(r) for r in rewards]),
                                       "the guard gives rewards")}
    if any(siblings):
        positions, tokens, values = zip(*(label for labels in siblings for label in labels))
        tensors |= {"sibling_counts": lengths(siblings), "sibling_positions": torch.tensor(positions).int(),
                    "sibling_tokens": torch.tensor(tokens).int(), "sibling_rewards": torch.tensor(values)}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    write_file(path, save(tensors, metadata))


def write_manifest(out, paths, metadata):
    """What is in the shards, for whoever reads them, when all are there."""
    if not all(path.exists() for path in paths):
        return                                              # another process still works, and will write it
    shards = []
    for path in paths:
        lengths = dict(read_tensors(path))["reply_lengths"]
        shards.append({"file": path.name, "replies": len(lengths), "tokens": int(lengths.sum()),
                       "sha256": sha256(path)})
    manifest = {**metadata, "shards": shards, "replies": sum(s["replies"] for s in shards),
                "tokens": sum(s["tokens"] for s in shards)}
    write_file(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def count_or_all(text):
    """For argparse: a number of replies, or "all"."""
    if text != "all" and not text.isdecimal():
        raise ArgumentTypeError("expected a whole number of at least 0, or all")
    return text if text == "all" else int(text)


def main():
    parser = Parser(description="Make the MRM's training corpus.")
    add = parser.group("models")
    add("--guard", default="data/smollm2/guard.safetensors", help="what gives the rewards: an "
        "adapter on --policy, our guard (which reads another policy's text), or a Llama Guard's folder")
    add("--policy", default="data/smollm2", help="the policy that writes replies")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", choices=DTYPES, default="float32", help="number type of weights and caches")
    add = parser.group("files")
    add("--labels", default=HERE.parent / "safety_labels" / "train.jsonl",
        help="what data/safety_labels prepared")
    add("--from", dest="local", help=f"a folder with {HH_FILE.format('test')}, instead of downloading it")
    add("--out", type=Path, default=HERE, help="the folder for the shards")
    add("--shards", type=number(1), default=8, help="files that the corpus is made of")
    add = parser.group("replies")
    add("--hh_replies", type=count_or_all, default=800,
        help="replies of HH-RLHF's test split; all: both splits in full")
    add("--policy_batches", type=number(0), default=48,
        help=f"batches of {PROMPTS_A_BATCH * REPLIES_A_PROMPT} replies to harmful requests")
    add("--refused_batches", type=number(0), default=20,
        help="the same, with the beginning of a refusal after the prefill")
    add("--ordinary_batches", type=number(0), default=20, help="the same, of replies to ordinary requests")
    add("--search_batches", type=number(0), default=0,
        help=f"searches for {PROMPTS_A_BATCH} requests with --mrm, each of which gives up to three replies")
    add("--mrm", metavar="PATH", help="the MRM of --search_batches: an adapter on --policy")
    add("--attack", choices=list(ATTACKS), default="none", help="what is done to the requests of "
        "--search_batches; the rewards are those of the requests as they were asked")
    add("--hidden", type=number(0, 1, float), default=0.5,
        help="share of prefilled replies that are repeated without the prefill")
    add("--siblings", type=number(0), default=6, help="most next tokens that are labelled at every fourth "
        "position (0: none)")
    add("--synthetic", type=number(0), default=160,
        help="ordinary requests that the policy makes up, beside XSTest's safe ones")
    add("--max_prompt", type=number(1), default=64, help="tokens kept of a prompt, the last ones")
    add("--max_reply", type=number(1), default=56, help="tokens of a reply, prefill included")
    add("--seed", type=number(0, 2 ** 63 - 1), default=0, help="seed of the random draws")
    args = parser.parse_args()
    own = args.policy_batches + args.refused_batches + args.ordinary_batches
    needs_labels = own or args.search_batches
    needs_ordinary = args.ordinary_batches or args.search_batches
    if needs_labels and not Path(args.labels).exists():
        raise BadInput(f"{args.labels} is missing; run data/safety_labels/prepare.py first")
    if bool(args.search_batches) != bool(args.mrm):
        raise BadInput("--search_batches N and --mrm PATH go together: the searches take that MRM")
    if args.attack != "none" and not args.search_batches:
        raise BadInput(f"--attack {args.attack} is of --search_batches, of which there are none")
    if args.ordinary_batches and args.synthetic < 1:
        raise BadInput(f"--synthetic is {args.synthetic}, but it must be at least 1")
    if not args.out.is_dir():
        raise BadInput(f"--out {args.out}: no such folder")
    check_output(args.out / "manifest.json")
    rank, world = place_among_processes(args)
    policy = load_llama(args.policy, getattr(torch, args.dtype), args.device)
    if policy.template is None or not policy.config.eos_token_ids:
        raise BadInput(f"--policy {args.policy}: expected a model with a chat format and an end of sequence")
    if opens_thinking(policy):
        raise BadInput(f"--policy {args.policy}: its chat format opens <think>: replies begin with reasoning")
    guard = load_guard(args.guard, policy)
    asked = guard_for(policy, guard)
    mrm = share_pass(policy, load_adapter(args.mrm, policy, "mrm")) if args.search_batches else None
    labels = [row for _, row in read_jsonl(args.labels)] if needs_labels else []
    requests = harmful_requests(labels)
    turns = [r["response"] for r in labels if r["source"] == "turned"]
    if args.policy_batches + args.refused_batches and not requests:
        raise BadInput(f"{args.labels} has no harmful request for replies of the policy's own")
    if args.refused_batches and not turns:
        raise BadInput(f"{args.labels} has no rows of the source `turned`, which --refused_batches needs")
    kinds = {}
    if args.search_batches:     # read before the policy makes up requests, which takes minutes
        # With --hh_replies all, the test split is held out.
        pairs = read_hh(args.local, "train" if args.hh_replies == "all" else "test")
        kinds = {"harmful": list(requests), "dialogue": first_turns(pairs)}
    ordinary = ordinary_requests(policy, labels, args.synthetic, args.seed) if needs_ordinary else []
    if args.search_batches:
        kinds["ordinary"] = list(ordinary)
        for kind, of_kind in kinds.items():
            if not of_kind:
                raise BadInput(f"--search_batches: found no {kind} requests")
            random.Random(args.seed).shuffle(of_kind)
    dialogues = hh_replies(policy, hh_dialogues(args.local, args.hh_replies), args.max_prompt, args.max_reply)
    reads_tokens = isinstance(asked, Guard)                 # else a Bridge, or any guard with `score`
    template = guard.template if reads_tokens else policy.tokenizer.template("reward")
    metadata = {"vocabulary": policy.tokenizer.fingerprint, "source_names": SOURCES,
                "template": [template.prefix, template.infix], "shards": args.shards,
                "run": {"policy": policy.fingerprint, "guard": guard_id(args.guard, guard),
                        "mrm": guard_id(args.mrm, mrm) if mrm else None,
                        "labels": sha256(args.labels)[:12] if needs_labels else None} | {
                    key: value for key, value in vars(args).items()
                    if key not in ("guard", "policy", "mrm", "labels", "local", "out", "device")}}
    paths = [args.out / f"corpus-{k:02d}-of-{args.shards:02d}.safetensors" for k in range(args.shards)]
    for k in range(rank, args.shards, world):
        path = paths[k]
        if path.exists():
            there = read_metadata(path)
            if there != metadata:
                raise BadInput(f"{path} is of a run with {there.get('run')}, not {metadata['run']}; "
                               "delete it to start anew")
            print(f"{path.name} is there already", flush=True)
            continue
        rows = dialogues[k::args.shards]
        rows += own_replies(policy, list(requests), list(ordinary), turns, range(k, own, args.shards), args)
        rows += search_replies(policy, mrm, kinds, range(k, args.search_batches, args.shards), args)
        if not rows:
            raise BadInput(f"--shards {args.shards}: shard {k} would be empty; choose fewer")
        if reads_tokens:
            examples = [Example("", guard.template(r.get("asked", r["prompt"])), r["reply"],
                                [0.0] * len(r["reply"])) for r in rows]
            rewards = rewards_after_each_token(guard, examples, args.device)
        else:                                               # it reads each beginning alone
            rewards = [asked.score(Prompt(r.get("asked", r["prompt"])),
                                   beginnings(r["reply"])).float().cpu().numpy() for r in rows]
        generator = torch.Generator().manual_seed(args.seed + k)
        siblings = [[] for _ in rows]
        if args.siblings:
            siblings = [sibling_labels(policy, asked, row, args.siblings, generator, mrm)
                        for row in tqdm(rows, desc="siblings", unit="reply", file=sys.stderr)]
        write_shard(path, rows, rewards, siblings, metadata)
        report(path.name, rows, rewards)
        print(f"{path.name}: {sum(map(len, siblings))} siblings", flush=True)
    write_manifest(args.out, paths, metadata)


def report(name, rows, rewards):
    """What a reader of the log wants to know of a shard."""
    for i, source in enumerate(SOURCES):
        mine = [torch.from_numpy(r) for row, r in zip(rows, rewards) if row["source"] == i]
        if mine:
            values = torch.cat(mine)
            print(f"{name}: {source}: {len(mine)} replies, {len(values)} tokens, "
                  f"reward mean {values.mean():.2f}, variance {values.var():.2f}, "
                  f"negative {(values < 0).float().mean():.2f}", flush=True)


if __name__ == "__main__":
    run(main)
