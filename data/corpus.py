"""
Reads the data sets: labelled replies, replies with rewards, and the requests of an evaluation.
"""

from dataclasses import dataclass, field
from pathlib import Path

from adapters import read_metadata
from files import BadInput, read_jsonl, reading
from model import read_tensors


@dataclass
class Example:
    """One reply. targets: the label (0 safe to 1 unsafe) or the guard's reward, one number for each reply
    token. siblings: (position, token, reward) of tokens that could follow reply[:position], by position."""
    source: str
    context: list               # tokens up to the reply
    reply: list                 # tokens of the reply
    targets: list
    siblings: list = field(default_factory=list)


def read_labels(path, llama, max_prompt, max_reply):
    """Examples from data/safety_labels: the last max_prompt tokens of each prompt, the first max_reply tokens
    of prefill, response and end-of-sequence. A prefill, where a row has one, is an unsafe beginning of the
    reply; the row's label is that of the response after it. Raises BadInput with the line number of a
    malformed row."""
    examples, template = [], llama.tokenizer.template("reward")
    for number, row in read_jsonl(path):
        row = {"prefill": ""} | row
        if not (all(isinstance(row.get(key), str) for key in ("source", "prompt", "prefill", "response"))
                and isinstance(row.get("unsafe"), (int, float)) and 0 <= row["unsafe"] <= 1):
            raise BadInput(f'{path}, line {number}: expected {{"source": text, "prompt": text, "response": text,'
                           ' "unsafe": 0 to 1}, and perhaps "prefill": text')
        encoded = [llama.tokenizer.encode(row[key]) for key in ("prompt", "prefill", "response")]
        prompt, prefill, response = encoded[0], encoded[1], encoded[2] + [llama.config.eos_token_ids[0]]
        targets = [1.0] * len(prefill) + [float(row["unsafe"])] * len(response)
        context, reply = template(prompt[-max_prompt:]), (prefill + response)[:max_reply]
        examples.append(Example(row["source"], context, reply, targets[:max_reply]))
    return examples


def read_rewards(folder, llama, guard=None):
    """(training, held-out) examples from the shards of data/safety_rewards, whose readme.md describes them.
    Raises BadInput when a shard is missing, incomplete, or made with another vocabulary or run than it
    should; with the id of a guard (adapters.guard_id), also when another guard has given the rewards."""
    template, paths = llama.tokenizer.template("reward"), sorted(Path(folder).glob("corpus-*.safetensors"))
    metadata = [read_metadata(path) for path in paths]
    if not paths or metadata[0].get("shards") != len(paths):
        expected = metadata[0].get("shards") if paths else "some"
        raise BadInput(f"{folder}: found {len(paths)} shards of a corpus, expected {expected}; "
                       "data/safety_rewards/prepare.py makes them")
    training, held_out = [], []
    for path, meta in zip(paths, metadata):
        checks = [("vocabulary", meta.get("vocabulary"), llama.tokenizer.fingerprint),
                  ("run", meta.get("run"), metadata[0].get("run"))]
        if guard:
            checks.append(("guard", meta.get("run", {}).get("guard"), guard))
        for what, theirs, ours in checks:
            if theirs != ours:
                raise BadInput(f"{path} was made with the {what} {theirs}, but here it must be {ours}")
        data = dict(read_tensors(path))
        split = lambda name, lengths: [t.tolist() for t in data[name].split(data[lengths].tolist())]
        with reading(path, "a shard of data/safety_rewards"):
            sources = [meta["source_names"][i] for i in data["sources"].tolist()]
            rows = zip(data["held_out"].tolist(), sources, split("prompts", "prompt_lengths"),
                       split("replies", "reply_lengths"), split("rewards", "reply_lengths"))
            siblings = [[] for _ in sources]                                # of a corpus that has none
            if "sibling_counts" in data:
                columns = (split(f"sibling_{name}", "sibling_counts") for name in ("positions", "tokens", "rewards"))
                siblings = [list(zip(*labels)) for labels in zip(*columns, strict=True)]
        for (is_held_out, source, prompt, reply, rewards), labels in zip(rows, siblings):
            example = Example(source, template(prompt), reply, rewards, labels)
            (held_out if is_held_out else training).append(example)
    return training, held_out


def read_attacks(paths, attack, suffix, limit):
    """{number: row} of the data of eval.py, counted through all files; with a limit only the first rows of
    each. A row keeps its other keys. Raises BadInput with the line number of one that lacks what the attack
    needs."""
    rows, count = {}, 0
    needed = {"prefill": ["response"], "suffix": [] if suffix else ["suffix"], "none": []}[attack]
    for path in paths:
        for i, (number, row) in enumerate(read_jsonl(path)):
            source = f"{Path(path).name}, line {number}"
            for key in ["prompt"] + (needed if row.get("category") != "harmless" else []):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise BadInput(f'{path}, line {number}: expected a "{key}", which --attack {attack} needs')
            if limit is None or i < limit:
                rows[count] = {key: value.strip() if isinstance(value, str) else value
                               for key, value in row.items()} | {"source": source}
            count += 1
    if not rows:
        raise BadInput(f"{', '.join(map(str, paths))}: found no prompts")
    return rows
