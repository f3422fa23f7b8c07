"""
The search as a page that one can look at: what `python sample.py --html tree.html` writes.

A tree has a node for each prefix that ever stood in a frontier of the search's trace, and node 0 for the prompt. To
each belong the policy's and the MRM's favourite next tokens, for which both read the finished tree once more.
page.html draws it; the file written is page.html with the trees in it, and needs nothing else.
"""

import json
import math
from pathlib import Path

import torch

from model import write_file
from trie_cache import TrieCache, compute

TEMPLATE = Path(__file__).resolve().parent / "page.html"
FAVOURITES = 5
TOKENS = 512                # so many are read in one forward pass: its mask has a row for each
ROWS = 64                   # so many rows of the vocabulary's size are held at once


@torch.no_grad()
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
    index, parent, token, found = {}, [-1], [None], [None]      # (parent, token) -> node
    first, last, given_back = [0], [len(result.trace)], [None]
    def node_of(tokens, step=None):
        """The node of a prefix, or None; with a step, new nodes are made and it is noted down in all on the way."""
        at = 0
        for a in tokens:
            if (at, a) not in index:
                if step is None:
                    return None
                index[at, a] = len(parent)
                for column, value in ((parent, at), (token, a), (found, None), (first, step), (last, step), (given_back, None)):
                    column.append(value)
            at = index[at, a]
            if step is not None:
                last[at] = step
        return at
    for step, frontier in enumerate(result.trace, 1):
        for branch in frontier:
            found[node_of(branch.tokens, step)] = branch.reward
    for one in result.passes:
        for branch in one.given_back:
            if node := node_of(branch.tokens):                  # neither the prompt, nor a mere look-ahead
                given_back[node] = one.step + 1
    columns = favourites(parent, token, prompt, policy, mrm)
    return {"parent": parent, "token": token, "first": first, "last": last, "given_back": given_back,
            "found": [round(r, 2) if r is not None and math.isfinite(r) else None for r in found],
            "reply": node_of(result.tokens), **columns, "costs": costs(result)}


def favourites(parent, token, prompt, policy, mrm):
    """The columns reward, p, policy and mrm of `tree`."""
    hidden = []
    for llama, context in ((policy, prompt.policy_tokens(policy.template)), (mrm.llama, prompt.reward_tokens(mrm.template))):
        trie = TrieCache(llama)
        nodes = [trie.insert(trie.root, context)]
        for i, a in zip(parent[1:], token[1:]):
            nodes.append(trie.insert(nodes[i], [a]))
            if len(trie.waiting) >= TOKENS:
                compute(llama, [trie])
        compute(llama, [trie])
        hidden.append(trie.states(nodes))                       # (nodes, d)
    columns = {"reward": [0.0] * len(parent), "p": [1.0] * len(parent), "policy": [], "mrm": []}
    for start in range(0, len(parent), ROWS):
        p = policy.logits(hidden[0][start:start + ROWS]).float().softmax(-1)                # (rows, V)
        m = mrm.rewards(hidden[1][start:start + ROWS]).float()                              # (rows, V)
        for i in range(1, len(parent)):
            if start <= parent[i] < start + ROWS:
                columns["reward"][i] = round(m[parent[i] - start, token[i]].item(), 2)
                columns["p"][i] = short(p[parent[i] - start, token[i]].item())
        for name, values, rounded in (("policy", p, short), ("mrm", m, lambda x: round(x, 2))):
            top = values.topk(min(FAVOURITES, values.shape[-1]))
            columns[name] += [[[a, rounded(x)] for a, x in zip(*row)] for row in zip(top.indices.tolist(), top.values.tolist())]
    return columns


def short(x):
    """A number with three digits."""
    return float(f"{x:.3g}")


def costs(result):
    """[tokens computed, tokens served from the cache] when 0, 1, ... frontiers had been found; at the end, all of them."""
    steps = len(result.trace)
    table = [[0, 0]] * (steps + 1)
    for one in result.passes:
        for step in range(min(one.step + 1, steps), steps + 1):
            table[step] = [one.tokens_computed, one.tokens_cached]
    return table


def write_page(path, trees, prompt, prefill, policy, mrm):
    """Write the page with these trees (of `tree`, each with a name, a title and a verdict besides)."""
    tokenizer = policy.tokenizer
    used = {a for tree in trees for a in tree["token"][1:]}
    used |= {a for tree in trees for name in ("policy", "mrm") for row in tree[name] for a, _ in row}
    data = {"prompt": prompt, "prefill": prefill, "trees": trees, "eos": list(policy.config.eos_token_ids),
            # A token is any bytes, not always text: here, a character stands for each.
            "tokens": {a: tokenizer.token_bytes(a).decode("latin-1") for a in sorted(used)},
            "unseen": [a for a in sorted(used) if mrm.unseen[a]]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")     # no tag can begin in it
    page = TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text)
    write_file(path, lambda partial: partial.write_text(page, encoding="utf-8"))
