"""
The search as a page that one can look at: what `python sample.py --html tree.html` writes.

Its tree has a node for each prefix that ever stood in a frontier, and node 0 for the prompt. To each
belong the policy's and the MRM's favourite next tokens. The file written is page.html with the trees in it.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from plumbing.files import write_file
from trie_cache import TrieCache

TEMPLATE = Path(__file__).with_name("page.html")
FAVOURITES = 5
ROWS = 128                                      # nodes that are read at once


@dataclass
class Round:
    """What one Ask of a search did."""
    step: int                           # frontiers that stood in the trace before it
    tokens_computed: int                # by it and all earlier ones
    tokens_cached: int                  # not computed so far, because a trie had them
    given_back: list                    # branches whose slots the policy's trie gave back just before it


@dataclass
class Recorder:
    """Watches a search for one prompt (engine.lockstep): a Round for each Ask."""
    rounds: list = field(default_factory=list)

    def __call__(self, search):
        tries = [reader.trie for reader in search.readers if reader.trie]
        computed = sum(trie.computed for trie in tries)
        cached = sum(trie.cached for trie in tries)
        self.rounds.append(Round(len(search.trace), computed, cached, search.readers[0].given_back))


def tree(result, rounds, prompt, policy, mrm):
    """The search tree of a Result as columns, of which entry i belongs to node i, parents before children.
    rounds: what a Recorder saw of the search.

    parent, token   -1 and None for the prompt
    first, last     the first and last step (frontier of the trace, from 1) of which the prefix was a part
    given_back      the step in which the policy's trie gave back its slot, or None
    reward          M(s)_a of the node's token a after its parent's prefix s, whichever search it was, or
                    None where no MRM is at hand, here and in all of this
    found           the reward that the search itself used, or None (also where it is not finite)
    p               π(a | s), at temperature 1
    policy, mrm     the favourite next tokens: [[token, π], ...] and [[token, M], ...], V_unseen included
    """
    nodes = [new_node(-1, None, 0)]
    index = {}                                                          # (parent, token) -> node
    for step, frontier in enumerate(result.trace, 1):
        nodes[0]["last"] = step
        for branch in frontier:
            node = 0
            for token in branch.tokens:
                if (node, token) not in index:
                    index[node, token] = len(nodes)
                    nodes.append(new_node(node, token, step))
                node = index[node, token]
                nodes[node]["last"] = step
            if branch.reward is not None and math.isfinite(branch.reward):
                nodes[node]["found"] = round(branch.reward, 2)

    # [tokens computed, tokens from the cache] when 0, 1, ... frontiers had been found; at the end, all
    costs = [[0, 0] for _ in range(len(result.trace) + 1)]
    for one in rounds:
        for cost in costs[min(one.step + 1, len(result.trace)):]:
            cost[:] = one.tokens_computed, one.tokens_cached
        for branch in one.given_back:
            if node := find_node(index, branch.tokens):                 # neither the prompt, nor a look-ahead
                nodes[node]["given_back"] = one.step + 1
    add_numbers(nodes, prompt, policy, mrm)
    columns = {name: [node[name] for node in nodes] for name in nodes[0]}
    return {"reply": find_node(index, result.tokens), "costs": costs} | columns


def new_node(parent, token, step):
    return {"parent": parent, "token": token, "first": step, "last": step, "given_back": None, "found": None,
            "reward": None, "p": 1.0, "mrm": []}


def find_node(index, tokens):
    """The node at the end of these tokens, or None."""
    node = 0
    for token in tokens:
        node = index.get((node, token))
    return node


@torch.no_grad()
def add_numbers(nodes, prompt, policy, mrm):
    """Add to the nodes of `tree`: reward, p, policy and mrm."""
    of_policy = read(policy, prompt.policy_tokens(policy.template), nodes)
    of_mrm = read(mrm.llama, prompt.reward_tokens(mrm.template), nodes) if mrm else None
    for start in range(0, len(nodes), ROWS):
        rows = slice(start, start + ROWS)
        p = policy.logits(of_policy[rows]).float().softmax(-1)                          # (rows, V)
        add_column(nodes, start, "p", "policy", p, lambda x: float(f"{x:.3g}"))
        if mrm:
            rewards = mrm.next_rewards(of_mrm[rows]).float()                            # (rows, V)
            add_column(nodes, start, "reward", "mrm", rewards, lambda x: round(x, 2))


def add_column(nodes, start, own, favourites, values, rounded):
    """Add to the nodes from `start` on their favourites, and to their children each one's own value. values:
    (rows, V)."""
    for node in nodes[1:]:
        if start <= node["parent"] < start + ROWS:
            node[own] = rounded(values[node["parent"] - start, node["token"]].item())
    top = values.topk(FAVOURITES)
    for node, tokens, best in zip(nodes[start:], top.indices.tolist(), top.values.tolist()):
        node[favourites] = [[a, rounded(x)] for a, x in zip(tokens, best)]


def read(llama, context, nodes):
    """The final hidden states of the tree's nodes: (nodes, d)."""
    trie = TrieCache(llama)
    sequences = [context]
    for node in nodes[1:]:
        sequences.append(sequences[node["parent"]] + [node["token"]])
    return torch.cat([trie(sequences[start:start + ROWS]) for start in range(0, len(nodes), ROWS)])


def write_page(path, trees, prompt, prefill, policy, mrm):
    """Write the page with these trees (of `tree`, each with a name, a title and a verdict besides)."""
    used = {a for tree in trees for a in tree["token"][1:]}
    used |= {a for tree in trees for name in ("policy", "mrm") for row in tree[name] for a, _ in row}
    data = {"prompt": prompt, "prefill": prefill, "trees": trees, "eos": list(policy.config.eos_token_ids),
            # A token is any bytes, not always text: here, a character stands for each.
            "tokens": {a: policy.tokenizer.token_bytes(a).decode("latin-1") for a in sorted(used)},
            "unseen": [a for a in sorted(used) if mrm and mrm.unseen[a]]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")                                 # no tag can begin in it
    write_file(path, TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", text))
