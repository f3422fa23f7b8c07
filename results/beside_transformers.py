"""
How fast this is beside Hugging Face transformers, on the same weights, in turns in one process.

    python -m venv beside && beside/bin/pip install -r requirements.txt transformers==5.24.0
    beside/bin/python results/beside_transformers.py [--dtype bfloat16]

Three comparisons of five turns each: greedy decoding; saffron at width 4 against transformers' greedy
decoding of one reply; saffron at width 16 against transformers sampling 16. "ratio" is ours / theirs, in
each turn: the median, the lowest and the highest. "of limit": the time that reading the weights once takes
at this machine's bandwidth / the time of a step. Their 16 samples read the prompt 16 times, ours once. In
float32 greedy replies must be equal, else it stops. In bfloat16, rounding differs, and so may replies.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from baselines import no_defence  # noqa: E402
from engine import Options  # noqa: E402
from plumbing.adapters import load_adapter  # noqa: E402
from plumbing.checkpoint import DEFAULT, load_llama  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.parser import Parser  # noqa: E402
from plumbing.shared import share_pass  # noqa: E402
from results.machine import bandwidth, describe_machine, weight_bytes  # noqa: E402
from saffron import PREFILL, PROMPT  # noqa: E402
from search import saffron  # noqa: E402

TOKENS = 50
TURNS = 5


def milliseconds(search):
    """What a token of a search takes."""
    started = time.perf_counter()
    search()
    return (time.perf_counter() - started) / TOKENS * 1e3


@torch.no_grad()
def main():
    parser = Parser(description="How fast this is beside Hugging Face transformers.")
    add = parser.group("what is timed")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="number type of both")
    number_type = parser.parse_args().dtype
    import transformers                                     # which is in an environment of its own
    dtype = getattr(torch, number_type)
    policy = load_llama(DEFAULT, dtype)
    mrm = share_pass(policy, load_adapter(DEFAULT / "mrm.safetensors", policy, "mrm"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT, dtype=dtype).eval()
    prompt = policy.tokenizer.prompt(PROMPT, PREFILL)
    context = torch.tensor([prompt.policy_tokens(policy.template)])
    length = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS)

    def ours(search, reward_model, width=1):
        return search(policy, reward_model, prompt, Options(width=width, beta=0.0, **length)).tokens

    def generate(**options):
        tokens = theirs.generate(context, attention_mask=torch.ones_like(context), pad_token_id=0,
                                 **length, **options)
        return tokens[0, context.shape[1]:].tolist()

    def their_greedy():
        return generate(do_sample=False)

    def their_16_samples():
        return generate(do_sample=True, num_return_sequences=16)

    def our_greedy():
        return ours(no_defence, None)

    def our_width_4():
        return ours(saffron, mrm, width=4)

    def our_width_16():
        return ours(saffron, mrm, width=16)

    speed = bandwidth("cpu")
    limit = weight_bytes(policy) / speed * 1e3
    print(f"{describe_machine()}, {number_type}, transformers {transformers.__version__}\n"
          f"memory bandwidth {speed / 1e9:.1f} GB/s, so a step takes at least {limit:.1f} ms\n"
          f"a context of {context.shape[1]} tokens, {TOKENS} new ones; ms a step, medians of {TURNS} turns")
    if dtype == torch.float32 and their_greedy() != our_greedy():
        raise BadInput("the greedy replies differ: data/smollm2 was changed, or two tokens are nearly equal")
    for name, a, b in (("greedy", their_greedy, our_greedy),
                       ("saffron, width 4, against greedy", their_greedy, our_width_4),
                       ("saffron, width 16, against sampling 16", their_16_samples, our_width_16)):
        a()                                                     # the first calls of a kind are slower
        b()
        turns = np.array([(milliseconds(a), milliseconds(b)) for _ in range(TURNS)])
        their, our = np.median(turns, axis=0)
        ratio = turns[:, 1] / turns[:, 0]
        print(f"{name}: transformers {their:.1f} ({limit / their:.2f} of limit), ours {our:.1f} "
              f"({limit / our:.2f}), ratio {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})",
              flush=True)


if __name__ == "__main__":
    run(main)
