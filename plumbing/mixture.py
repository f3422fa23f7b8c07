"""
How often a training reads each source of its data: --weights '{"jailbreakbench": 2}'.
"""

import contextlib
import json
import math
from argparse import ArgumentTypeError

from plumbing.errors import BadInput


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
