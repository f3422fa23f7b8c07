"""
What the commands share: options, the models that these name, and what a user may get wrong.

A command checks all of that before its work begins: the algorithm itself only asserts.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from baselines import SEARCHES
from engine import Options
from mrm import Guard
from plumbing.adapters import check_vocabulary
from plumbing.checkpoint import DEFAULT, load_llama
from plumbing.errors import BadInput
from plumbing.shared import share_pass
from plumbing.files import parsing, read_lines
from plumbing.guards import guard_for, load_guard
from plumbing.released import load_mrm
from plumbing.templates import opens_thinking

DTYPES = ["float32", "float64", "bfloat16", "float16"]      # what --dtype takes


def describe_searches():
    """What the searches do, for --help."""
    lines = [f"  {name:14} {method.what}{f' (asks the {method.reward_model})' if method.reward_model else ''}"
             for name, method in SEARCHES.items()]
    return "searches:\n" + "\n".join(lines)


def add_search_options(add):
    """The options of a search that sample.py and eval.py have. Their defaults are engine.Options'."""
    default = Options()
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="most tokens of a reply")
    add("--min_new_tokens", type=int, default=default.min_new_tokens, help="fewest tokens of a reply")
    add("--top_p", type=float, default=default.top_p, help="probability mass of the nucleus")
    add("--beta", type=float, default=default.beta, help="saffron: weight of the reply's log-probability "
        "under the policy, beside the reward; 0: as in the paper")
    add("--seed", type=int, default=default.seed, help="seed of the random draws")


def add_model_options(add):
    """The options of all commands that search."""
    add("--policy", default=DEFAULT, metavar="DIR", help="the model: a folder in the Hugging Face layout")
    add("--mrm_base", default=DEFAULT, metavar="DIR", help="the model that MRM and guard are adapters of")
    add("--mrm", metavar="PATH", help="an adapter, or a released MRM's folder (default: "
        "mrm.safetensors in data/smollm2)")
    add("--guard", metavar="PATH", help="an adapter, or a Llama Guard's folder, with any vocabulary "
        "(default: guard.safetensors in data/smollm2)")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", choices=DTYPES, default="float32", help="number type of weights and caches")


LIMITS = (      # of engine.Options: name, whether a value fits, what is allowed
    ("width", lambda x: 1 <= x <= 10_000, "at least 1, and at most 10,000"),
    ("max_new_tokens", lambda x: 1 <= x <= 10 ** 6, "at least 1, and at most a million"),
    ("min_new_tokens", lambda x: x >= 0, "at least 0"),
    ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("temperature", lambda x: x == 0 or 0.01 <= x <= 100, "0, or from 0.01 to 100"),
    ("beta", lambda x: 0 <= x <= 100, "from 0 to 100"),
    ("seed", lambda x: 0 <= x < 2 ** 63, "at least 0 and below 2^63"))


def search_options(args, width):
    """The Options of a command's arguments. Raises BadInput for a value outside its range."""
    names = [one.name for one in fields(Options) if hasattr(args, one.name)]
    values = {name: getattr(args, name) for name in names} | {"width": width}
    for name, fits, allowed in LIMITS:
        if values.get(name) is not None and not fits(values[name]):
            raise BadInput(f"{name} is {str(values[name])[:40]}, but it must be {allowed}")
    return Options(**values)


@dataclass
class Models:
    """What the options of a command name."""
    policy: object
    base: object                # the Llama that MRM and guard are adapters of
    guard: object               # None if nobody asks for a verdict
    reward_models: dict         # of each search: the reward model that it takes, or None


def load_models(args, searches):
    """The Models for these searches (names of SEARCHES). Raises BadInput for what does not fit together."""
    policy = load_llama(args.policy, getattr(torch, args.dtype), args.device)
    if policy.tokenizer is None:
        raise BadInput(f"{args.policy} has no tokenizer.json; data/hub/prepare.py fetches all that is needed")
    kinds = {SEARCHES[name].reward_model for name in searches} - {None}
    if opens_thinking(policy):
        said = f"the chat format of {policy.config.name} opens <think>: its replies begin with reasoning"
        if kinds:
            raise BadInput(f"{said}, which no guard or MRM here was made for; only --safety none works")
        print(f"note: {said}", file=sys.stderr)
    with_guard = bool(kinds) or args.guard is not None or Path(args.policy).resolve() == DEFAULT
    base = policy
    # A guard in a folder of its own needs no base, nor do those of this repository: load_guard knows theirs.
    if with_guard and Path(args.mrm_base).resolve() != Path(args.policy).resolve() and (
            "mrm" in kinds or Path(args.mrm_base).resolve() != DEFAULT):
        base = load_llama(args.mrm_base, policy.dtype, policy.device)
    by_kind = {None: None, "guard": None}
    if "mrm" in kinds:
        check_vocabulary(policy, base)
        by_kind["mrm"] = share_pass(policy, load_mrm(args.mrm or DEFAULT / "mrm.safetensors", base))
    if with_guard:
        guard = guard_for(policy, load_guard(args.guard or DEFAULT / "guard.safetensors", base))
        if isinstance(guard, Guard):
            check_vocabulary(policy, guard.llama, for_mrm=False)
        by_kind["guard"] = share_pass(policy, guard)
    return Models(policy, base, by_kind["guard"], {s: by_kind[SEARCHES[s].reward_model] for s in searches})


def check_prompt(policy, reward_model, prompt, max_new_tokens):
    """Raises BadInput for a prompt that is too long, or a policy without a chat format."""
    if policy.template is None:
        policy.tokenizer.template("chat")                   # raises BadInput: it says where one could be
    contexts = [(policy, prompt.policy_tokens(policy.template))]
    if reward_model is not None:
        reader = reward_model.reader(prompt)
        if reader.trie:                                     # else it has a length of its own
            contexts.append((reader.trie.model, reader.context + reader.suffix))
    for llama, context in contexts:
        limit = llama.config.max_position_embeddings
        if len(context) + max_new_tokens > limit:
            raise BadInput(f"the prompt takes {len(context)} tokens and the reply may take {max_new_tokens} "
                           f"(max_new_tokens), but {llama.config.name} reads at most {limit} together")


def read_prompts(prompt):
    """The prompts that an argument stands for: for - all of standard input, for FILE:path each line, else
    itself. Raises BadInput for a file that has none or is no text."""
    if prompt == "-":
        with parsing("standard input", "UTF-8 text"):
            return [sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")]
    if not prompt.startswith("FILE:"):
        return [prompt]
    lines = [line for _, line in read_lines(prompt.removeprefix("FILE:"))]
    if not lines:
        raise BadInput(f"--prompt {prompt}: expected one prompt a line, but the file is empty")
    return lines
