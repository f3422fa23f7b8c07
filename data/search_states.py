"""
The states that saffron's own search visits, as replies for the MRM's corpus.

An MRM that has learned from the policy's samples meets other beginnings when it leads a search: those that it
likes itself. So the guard gives rewards to these too, and the MRM learns from them. This is the idea of
DAgger (Ross et al. 2011, arXiv 1011.0686). data/safety_rewards/prepare.py does it with --search_batches.
"""

import itertools
import random
import zlib

from engine import Options
from plumbing.attacks import ATTACKS, Attacker
from plumbing.tokenizer import Prompt
from search import saffron

FIRST_TURNS = 2000              # of HH-RLHF, at most
MIXTURE = ["harmful", "dialogue", "harmful", "ordinary", "harmful",         # of ten requests, in turn
           "dialogue", "harmful", "ordinary", "dialogue", "harmful"]
WIDTHS = (1, 4, 16)
BETAS = (0.0, 0.0, 0.0, 0.0, 0.05, 0.1)         # a third above 0
MOST_PREFILL = 16               # tokens
TRIES = 4                       # of an attack, of which a request gets one
LONG_ENOUGH = 4                 # tokens: such a dropped branch is preferred to a shorter one
OPENINGS = ["Sure, here is", "Of course, I can tell you that. First,", "Yes, you can do it like this:",
            "Okay, the best way to do this is", "I am happy to help with that. Here is",
            "That is a good question. The answer is"]           # of replies to first turns, which have none


def first_turn(dialogue):
    """What a dialogue of HH-RLHF begins with; "" if nobody answers."""
    request, found, _ = dialogue.partition("\n\nAssistant:")
    return request.removeprefix("\n\nHuman:").strip() if found else ""


def is_held_out(request):
    """A tenth of HH-RLHF's first turns: the same, whichever source of the corpus they come from."""
    return zlib.crc32(request.encode()) % 10 == 0


def first_turns(pairs):
    """(request, None, held out): the first turns of HH-RLHF's dialogues, each once, FIRST_TURNS of them
    evenly spread. They have no opening of a reply. pairs: [{side: dialogue}]."""
    turns = dict.fromkeys(first_turn(dialogue) for pair in pairs for dialogue in pair.values())
    turns = [request for request in turns if request]
    count = min(len(turns), FIRST_TURNS)
    requests = [turns[i * len(turns) // count] for i in range(count)]
    return [(request, None, is_held_out(request)) for request in requests]


def requests_of(batch, size, kinds):
    """The `size` requests of a batch. kinds: the requests of each kind in MIXTURE. Batch after batch takes
    all of a kind before one comes again."""
    chosen = []
    for place in range(batch * size, (batch + 1) * size):
        rounds, within = divmod(place, len(MIXTURE))
        kind = MIXTURE[within]
        number = rounds * MIXTURE.count(kind) + MIXTURE[:within].count(kind)
        chosen.append(kinds[kind][number % len(kinds[kind])])
    return chosen


def settings(batch, seed):
    """(width, beta, whether the prefill is hidden) of a batch. 36 batches in a row have all combinations."""
    combinations = list(itertools.product(WIDTHS, BETAS, (False, True)))
    random.Random(seed).shuffle(combinations)
    return combinations[batch % len(combinations)]


def search_batch(policy, mrm, requests, batch, sources, max_prompt, max_reply, seed, attack="none"):
    """Rows of what a search for a few requests, side by side, has visited: of each request up to three
    replies. Seed and batch decide its width, its beta, the prefills, and whether the MRM reads these.
    requests: (request, opening of a reply or None, held out). sources: the names for rows with beta 0, and
    with beta above 0.
    attack: a name of ATTACKS. Policy and MRM read the request as it was attacked. Its rewards are to be those
    of the request as it was asked, which a row has as `asked`."""
    # 1. The search.
    width, beta, hidden = settings(batch, seed)
    pick = random.Random(f"search {seed} {batch}")
    attacker = Attacker(policy, mrm, hide_prefill=hidden, seed=seed)
    prompts = []
    asked = []
    for request, opening, _ in requests:
        opening = pick.choice(OPENINGS) if opening is None else opening
        prefill = policy.tokenizer.encode(opening)[:min(pick.randint(0, MOST_PREFILL), max_reply - 1)]
        user = policy.tokenizer.encode(request)[-max_prompt:]
        asked.append(user)
        if attack != "none":                                    # which takes more tokens for the same text
            row = {"prompt": request, "response": opening}
            user = ATTACKS[attack].make(attacker, row, pick.randrange(TRIES)).user[-2 * max_prompt:]
        prompts.append(Prompt(user, prefill, hidden))
    options = Options(width=width, beta=beta, max_new_tokens=min(Options.max_new_tokens, max_reply))
    results = saffron(policy, mrm, prompts, options)

    # 2. Its rows. Where the prefill is hidden, a reply begins after it for guard and MRM.
    rows = []
    for (_, _, held_out), prompt, request, result in zip(requests, prompts, asked, results):
        before = [] if hidden else prompt.prefill
        for tokens in visited(result.trace, max_reply - len(before), pick):
            rows.append({"source": sources[beta > 0], "prompt": prompt.user, "asked": request,
                         "reply": before + tokens, "held_out": held_out, "prefill": prompt.prefill,
                         "hidden": hidden, "searched": True})
    return rows


def visited(trace, length, pick):
    """Up to three token lists that a search has visited, cut to this length, all different: the winner,
    another one of the last frontier, and one that was dropped on the way. pick: a random.Random."""
    winner, *losers = trace[-1]
    chosen = [winner.tokens[:length]]
    losers = [branch for branch in losers if branch.tokens[:length] not in chosen]
    if losers:
        chosen.append(pick.choice(losers).tokens[:length])
    # What a branch of the last frontier began as was not dropped.
    kept = set()
    for branch in trace[-1]:
        while branch is not None:
            kept.add(branch)
            branch = branch.parent
    dropped = [branch for frontier in trace for branch in frontier
               if branch not in kept and branch.tokens[:length] not in chosen]
    long = [branch for branch in dropped if len(branch.tokens) >= LONG_ENOUGH]
    if dropped:
        chosen.append(pick.choice(long or dropped).tokens[:length])
    return chosen
