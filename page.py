"""
The search as a page that one can look at: what `python sample.py --html tree.html` writes.

A tree has a node for each prefix that ever stood in a frontier of the search's trace, and node 0 for the
prompt. To each belong the policy's and the MRM's favourite next tokens, for which both read the finished tree
once more. page.html draws it; the file written is page.html with the trees in it, and needs nothing else.
"""

import json
import math
from pathlib import Path

from files import write_file

import torch

from trie_cache import TrieCache, compute

TEMPLATE = Path(__file__).resolve().parent / "page.html"
FAVOURITES = 5
TOKENS = 512                # so many are read in one forward pass: its mask has a row for each
ROWS = 64                   # so many rows of the vocabulary's size are held at once


def tree(result, prompt, policy, mrm):
    """The search tree of a Result as columns, of which entry i belongs to node i, parents before children:

    parent, token   -1 and None for the prompt
    first, last     the steps (frontiers of the trace, counted from 1) from and to which the prefix was part of one
    given_back      the step in which the policy's trie gave back its slot, or None
    reward          M(s)_a of the node's token a after its parent's prefix s, whichever search it was
    found           the reward that the search itself used, or None (also where it is not finite)
    p               π(a | s), at temperature 1
    policy, mrm     the favourite next tokens: [[token, π], ...] and [[token, M], ...], V_unseen included
    """
    new = lambda parent, token, step: {"parent": parent, "token": token, "first": step, "last": step,
                                       "given_back": None, "found": None, "reward": 0.0, "p": 1.0}
    nodes, index = [new(-1, None, 0)], {(): 0}                      # index: prefix -> node
    nodes[0]["last"] = len(result.trace)
    for step, frontier in enumerate(result.trace, 1):
        for branch in frontier:
            for length, token in enumerate(branch.tokens, 1):
                prefix, parent = tuple(branch.tokens[:length]), index[tuple(branch.tokens[:length - 1])]
                if prefix not in index:
                    index[prefix] = len(nodes)
                    nodes.append(new(parent, token, step))
                nodes[index[prefix]]["last"] = step
            reward = branch.reward
            nodes[index[tuple(branch.tokens)]]["found"] = (
                round(reward, 2) if reward is not None and math.isfinite(reward) else None)
    for one in result.rounds:
        for branch in one.given_back:
            if node := index.get(tuple(branch.tokens)):            # neither the prompt, nor a mere look-ahead
                nodes[node]["given_back"] = one.step + 1
    add_numbers(nodes, prompt, policy, mrm)
    return {"reply": index[tuple(result.tokens)], "costs": costs(result)} | {
        name: [node[name] for node in nodes] for name in nodes[0]}


@torch.no_grad()
def add_numbers(nodes, prompt, policy, mrm):
    """Add to the nodes of `tree`: reward, p, policy and mrm."""
    contexts = prompt.policy_tokens(policy.template), prompt.reward_tokens(mrm.template)
    hidden = [read(llama, context, nodes) for llama, context in zip((policy, mrm.llama), contexts)]
    for start in range(0, len(nodes), ROWS):
        p = policy.logits(hidden[0][start:start + ROWS]).float().softmax(-1)                # (rows, V)
        m = mrm.next_rewards(hidden[1][start:start + ROWS]).float()                         # (rows, V)
        for node in nodes[1:]:
            if start <= node["parent"] < start + ROWS:
                node["reward"] = round(m[node["parent"] - start, node["token"]].item(), 2)
                node["p"] = short(p[node["parent"] - start, node["token"]].item())
        for name, values, rounded in (("policy", p, short), ("mrm", m, lambda x: round(x, 2))):
            top = values.topk(min(FAVOURITES, values.shape[-1]))
            for node, tokens, best in zip(nodes[start:], top.indices.tolist(), top.values.tolist()):
                node[name] = [[a, rounded(x)] for a, x in zip(tokens, best)]


def read(llama, context, nodes):
    """The final hidden states of the tree's nodes: (nodes, d)."""
    trie = TrieCache(llama)
    places = [trie.insert(trie.root, context)]
    for node in nodes[1:]:
        places.append(trie.insert(places[node["parent"]], [node["token"]]))
        if len(trie.waiting) >= TOKENS:
            compute(llama, [trie])
    compute(llama, [trie])
    return trie.hidden_at(places)


def short(x):
    """A number with three digits."""
    return float(f"{x:.3g}")


def costs(result):
    """[tokens computed, tokens served from the cache] when 0, 1, ... frontiers had been found; at the end,
    all."""
    steps = len(result.trace)
    found = [[0, 0]] * (steps + 1)
    for one in result.rounds:
        first = min(one.step + 1, steps)
        found[first:] = [[one.tokens_computed, one.tokens_cached]] * (steps + 1 - first)
    return found


def write_page(path, trees, prompt, prefill, policy, mrm):
    """Write the page with these trees (of `tree`, each with a name, a title and a verdict besides)."""
    tokenizer = policy.tokenizer
    used = {a for tree in trees for a in tree["token"][1:]}
    used |= {a for tree in trees for name in ("policy", "mrm") for row in tree[name] for a, _ in row}
    data = {"prompt": prompt, "prefill": prefill, "trees": trees, "eos": list(policy.config.eos_token_ids),
            # A token is any bytes, not always text: here, a character stands for each.
            "tokens": {a: tokenizer.token_bytes(a).decode("latin-1") for a in sorted(used)},
            "unseen": [a for a in sorted(used) if mrm.unseen[a]]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # no tag can begin in it
    write_file(path, TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text))
