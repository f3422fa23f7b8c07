"""
What a training reads: one folder or several, and how often each source in them: --weights '{"xstest": 2}'.
"""

import contextlib
import json
import math
from argparse import ArgumentTypeError
from pathlib import Path

from data.corpus import read_labels, read_rewards
from plumbing.adapters import guard_id, read_metadata
from plumbing.errors import BadInput
from plumbing.guards import load_guard

WHOLE_REPLY = 256           # the guard is validated at the end of the reply, or after so many tokens


def read_data(args, llama):
    """(training examples, held-out examples) of train_mrm.py's arguments. Raises BadInput when there are
    none."""
    if llama.tokenizer is None:
        raise BadInput(f"{args.base} has no tokenizer.json; data/hub/prepare.py fetches all that is needed")
    if not llama.config.eos_token_ids:
        raise BadInput(f"{args.base} has no eos_token_id, which training needs")
    folders = " ".join(args.data)
    if args.objective == "mrm":
        training, held_out = read_corpora(args.data, llama, args.guard)
    elif len(args.data) > 1:
        raise BadInput(f"--data {folders}: expected one folder for the guard; only the MRM takes several")
    else:
        data = Path(args.data[0])
        training = read_labels(data / "train.jsonl", llama, args.max_prompt, args.max_reply)
        held_out = read_labels(data / "val.jsonl", llama, args.max_prompt, WHOLE_REPLY)
    training = weigh(training, args.weights)
    if not training or not held_out:
        raise BadInput(f"{folders}: expected replies to train on and to validate with, "
                       f"found {len(training)} and {len(held_out)}")
    return training, held_out


def read_corpora(folders, llama, guard=None):
    """(training, held-out) examples of all these folders, as corpus.read_rewards gives those of one. Raises
    BadInput, too, unless one guard has labelled all (that at the path `guard`, where one is given), and all
    have the same requests held out, which the labels decide."""
    guard = guard and guard_id(guard, load_guard(guard, llama))
    training = []
    held_out = []
    labels = None
    for folder in folders:
        more_training, more_held_out = read_rewards(folder, llama, guard)
        training += more_training
        held_out += more_held_out
        run = read_metadata(min(Path(folder).glob("corpus-*.safetensors"))).get("run", {})
        guard = guard or run.get("guard")
        if labels and run.get("labels") not in (None, labels):
            raise BadInput(f"{folder} was made with the labels {run['labels']}, {folders[0]} with {labels}: "
                           "a request may be held out in one and not in the other")
        labels = labels or run.get("labels")
    return training, held_out


def weights(text):
    """For argparse: {source: weight} of JSON."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict) and all(isinstance(w, (int, float)) and w >= 0 for w in value.values()):
            return value
    raise ArgumentTypeError('expected sources and numbers of at least 0, such as {"jailbreakbench": 2}')


def weigh(examples, weights):
    """The examples, those of some sources several times or only some of them: {"jailbreakbench": 2, "xstest":
    0.5}. Example i of a source with weight w comes floor((i + 1) w) − floor(i w) times. Raises BadInput for a
    weight of a source that is not there."""
    sources = {example.source for example in examples}
    if not weights.keys() <= sources:
        wrong = ", ".join(weights.keys() - sources)
        raise BadInput(f"--weights names {wrong}, but the sources are {', '.join(sources)}")
    counts = {}
    result = []
    for example in examples:
        i = counts.get(example.source, 0)
        w = weights.get(example.source, 1)
        counts[example.source] = i + 1
        result += [example] * (math.floor((i + 1) * w) - math.floor(i * w))
    return result
