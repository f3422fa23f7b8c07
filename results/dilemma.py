"""
The exploration-efficiency dilemma in numbers: what a search costs, by its definition alone.

    python results/dilemma.py                           widths 1, 4, 16 on the default models
    python results/dilemma.py --width 1,64 --candidates 100

It runs no search; it reads the sizes of the models. It prints how often four searches ask policy and reward
model, how many tokens these read, and the FLOPs of that, for one prompt. Compare the tables of eval.py, which
count what really happened. The predictions hold where

- no reply ends before its last token;
- each nucleus holds at least as many tokens as the width (for saffron: without what is unseen or repeats
  itself), and for beam --candidates of them;
- rebase gives each of its sequences one expansion, from the second step on (if it gives several to one, it
  asks less);
- no two of best_of_n's replies begin with the same token.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

from plumbing.adapters import default_models  # noqa: E402
from plumbing.parser import Parser, number  # noqa: E402

METHODS = ["best_of_n", "beam", "rebase", "saffron"]


@dataclass
class Cost:
    """What a search for one prompt costs."""
    policy_calls: int           # sequences that the policy is asked about, however many in a forward pass
    reward_calls: int           # the same of the guard, or (saffron) of the MRM
    policy_tokens: int          # tokens that the policy reads; with the trie, each distinct prefix once
    reward_tokens: int          # the same of the guard or the MRM


def predicted_cost(method, width, steps, candidates, context):
    """The Cost of a search that writes `steps` tokens, under the conditions at the top of this file. method:
    one of METHODS. candidates: tokens in a nucleus. context: tokens before the reply, as policy and reward
    model read them, two ints."""
    policy_context, reward_context = context
    # Asked about the empty reply, and then about `width` sequences after each step but the last.
    asked = 1 + (steps - 1) * width
    # The first question reads the context, each later one a new token.
    policy_tokens = policy_context + asked - 1
    if method == "saffron":                             # the MRM is asked what the policy is asked
        return Cost(asked, asked, policy_tokens, reward_context + asked - 1)
    if method == "beam":                                # the guard is asked about each candidate
        return Cost(asked, candidates * asked, policy_tokens, reward_context + candidates * asked)
    if method == "rebase":                              # about `width` expansions in each step
        return Cost(asked, width * steps, policy_tokens, reward_context + width * steps)
    # best_of_n: `width` replies from the first token on, so the first step asks `width` times about the same
    # empty reply, which is read once; the guard reads each reply once, as a whole.
    return Cost(width * steps, width, policy_tokens, reward_context + width * steps)


def predicted_flops(cost, policy, reward_llama):
    """FLOPs of a Cost, without attention and the head of the reward model. For each token that a Llama reads:
    two for each weight of its linear layers, those of LoRA included. For each call of the policy: the same
    for its unembedding."""
    flops = 2 * cost.policy_calls * policy.config.hidden_size * policy.config.vocab_size
    for llama, tokens in ((policy, cost.policy_tokens), (reward_llama, cost.reward_tokens)):
        lora = sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name)
        flops += 2 * (llama.config.linear_params + lora) * tokens
    return flops


def numbers(text):
    """For argparse: whole numbers from 1, with commas between."""
    return [number(1)(word) for word in text.split(",")]


def main():
    parser = Parser(description="Predict what searches cost.")
    add = parser.add_argument
    add("--width", type=numbers, default="1,4,16", help="widths, with commas between")
    add("--steps", type=number(1), default=32, help="tokens of the reply")
    add("--candidates", type=number(1), default=84, help="tokens of a nucleus; beam has so many at "
        "width 1, in the mean of 30 prompts of data/prompts/harmful_dev.jsonl")
    add("--context", type=numbers, default="52,31", help="tokens before the reply, as policy and reward "
        "model read them; with these prompts it is so many in the mean")
    args = parser.parse_args()
    if len(args.context) != 2:
        parser.error("--context: expected two numbers with a comma between")
    if max(args.width) > args.candidates:
        parser.error(f"--width {max(args.width)}: the predictions hold for widths up to --candidates, "
                     f"{args.candidates}")
    policy, guard, mrm = default_models()
    print("| method | width | policy calls | reward calls | tokens | TFLOP |\n|---|---|---|---|---|---|")
    for method in METHODS:
        for width in args.width:
            cost = predicted_cost(method, width, args.steps, args.candidates, args.context)
            flops = predicted_flops(cost, policy, (mrm if method == "saffron" else guard).llama)
            print(f"| {method} | {width} | {cost.policy_calls:,} | {cost.reward_calls:,} | "
                  f"{cost.policy_tokens + cost.reward_tokens:,} | {flops / 1e12:.3f} |")


if __name__ == "__main__":
    run(main)
