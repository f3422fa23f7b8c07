"""What reward models learn from: labelled replies, replies with rewards, and batches of them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from plumbing.adapters import read_metadata
from plumbing.checkpoint import read_tensors
from plumbing.errors import BadInput
from plumbing.files import parsing, read_field, read_jsonl, reading


@dataclass
class Example:
    """One reply. targets, one for each reply token: the label (1 unsafe), or for the MRM the guard's reward
    (below 0 unsafe). siblings: (position, token, reward) of tokens that could follow reply[:position]."""
    source: str
    context: list               # tokens up to the reply
    reply: list                 # tokens of the reply; the prefill too, but where it is hidden from the MRM
    targets: list
    siblings: list = field(default_factory=list)


@dataclass
class Batch:
    """Some Examples as tensors, padded on the right: attention is causal, so no token sees the padding."""
    tokens: torch.Tensor                # contexts and replies (B, T)
    rows: torch.Tensor                  # of each of the n reply tokens: which example it is in (n,)
    columns: torch.Tensor               # its own column in `tokens` (n,)
    targets: torch.Tensor               # its label (1 unsafe), or the guard's reward (below 0 unsafe) (n,)
    sibling_rows: torch.Tensor          # of each of the m siblings: which example it is of (m,)
    sibling_columns: torch.Tensor       # the column of the token before it (m,)
    sibling_tokens: torch.Tensor        # the token (m,)
    sibling_rewards: torch.Tensor       # the guard's reward if it came next (m,)
    sibling_prefixes: torch.Tensor      # which prefix it follows: a number that its siblings share (m,)

    def supervised(self, hidden):
        """Of each reply token s_j, what Eq. 5 needs: h(s[0:j]) (n, d), s_j (n,) and R(s[0:j+1]) (n,). s:
        context and reply together. hidden: final hidden states of `tokens` (B, T, d)."""
        return hidden[self.rows, self.columns - 1], self.tokens[self.rows, self.columns], self.targets


def collate(examples, device):
    """The Batch of some Examples. Reply tokens and siblings stand in the order of the examples."""
    length = max(len(e.context) + len(e.reply) for e in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    supervised, siblings, prefixes = [], [], {}
    for i, e in enumerate(examples):
        start = len(e.context)
        tokens[i, :start + len(e.reply)] = torch.tensor(e.context + e.reply)
        supervised += [(i, start + j, target) for j, target in enumerate(e.targets)]
        for position, token, reward in e.siblings:
            prefix = prefixes.setdefault((i, position), len(prefixes))
            siblings.append((i, start + position - 1, token, reward, prefix))
    rows, columns, targets = (torch.tensor(values, device=device) for values in zip(*supervised))
    no_column = torch.zeros(0, dtype=torch.long, device=device)
    of_siblings = [torch.tensor(values, device=device) for values in zip(*siblings)] or [no_column] * 5
    return Batch(tokens.to(device), rows, columns, targets, *of_siblings)


def read_labels(path, llama, max_prompt, max_reply):
    """Examples from data/safety_labels: the last max_prompt tokens of each prompt, the first max_reply tokens
    of prefill, response and end-of-sequence. A prefill, where a row has one, is unsafe: its tokens are
    labelled 1, the response after it as the row is. Raises BadInput with the line of a malformed row."""
    examples = []
    template = llama.tokenizer.template("reward")
    for number, row in read_jsonl(path):
        with parsing(f"{path}, line {number}", "a labelled reply"):
            source, prompt, response = (read_field(row, key, str) for key in ("source", "prompt", "response"))
            prefill = read_field(row, "prefill", str, default="")
            label = read_field(row, "unsafe", float, 0, 1)
        context = template(llama.tokenizer.encode(prompt)[-max_prompt:])
        prefill = llama.tokenizer.encode(prefill)
        response = llama.tokenizer.encode(response) + [llama.config.end_of_turn]
        targets = [1.0] * len(prefill) + [label] * len(response)
        reply = (prefill + response)[:max_reply]
        examples.append(Example(source, context, reply, targets[:max_reply]))
    return examples


def read_rewards(folder, llama, guard=None):
    """(training, held-out) examples from the shards of data/safety_rewards, whose readme.md describes them.
    Raises BadInput for a shard that is missing, incomplete, or of another vocabulary, run or guard than it
    must be. guard: the id (adapters.guard_id) of the one that gave the rewards, or None for any."""
    template = llama.tokenizer.template("reward")
    paths = sorted(Path(folder).glob("corpus-*.safetensors"))
    metadata = [read_metadata(path) for path in paths]
    if not paths or metadata[0].get("shards") != len(paths):
        expected = metadata[0].get("shards") if paths else "some"
        raise BadInput(f"{folder}: found {len(paths)} shards of a corpus, expected {expected}; "
                       "data/safety_rewards/prepare.py makes them")
    training, held_out = [], []
    for path, meta in zip(paths, metadata):
        their_guard = meta.get("run", {}).get("guard")
        for what, theirs, ours in (("vocabulary", meta.get("vocabulary"), llama.tokenizer.fingerprint),
                                   ("run", meta.get("run"), metadata[0].get("run")),
                                   ("guard", their_guard, guard or their_guard)):
            if theirs != ours:
                raise BadInput(f"{path} was made with the {what} {theirs}, but here it must be {ours}")
        data = dict(read_tensors(path))
        with reading(path, "a shard of data/safety_rewards"):
            prompts = split(data, "prompts", "prompt_lengths")
            replies = split(data, "replies", "reply_lengths")
            rewards = split(data, "rewards", "reply_lengths")
            siblings = [[] for _ in replies]                                # of a corpus that has none
            if "sibling_counts" in data:
                columns = [split(data, f"sibling_{name}", "sibling_counts")
                           for name in ("positions", "tokens", "rewards")]
                siblings = [list(zip(*labels)) for labels in zip(*columns, strict=True)]
            for i, is_held_out in enumerate(data["held_out"].tolist()):
                source = meta["source_names"][data["sources"][i]]
                example = Example(source, template(prompts[i]), replies[i], rewards[i], siblings[i])
                (held_out if is_held_out else training).append(example)
    return training, held_out


def split(data, name, lengths):
    """data[name], which holds lists one after another, cut into these lists; data[lengths]: their lengths."""
    return [part.tolist() for part in data[name].split(data[lengths].tolist())]
