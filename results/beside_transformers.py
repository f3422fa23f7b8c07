"""
How fast this is beside Hugging Face transformers, on the same weights, in turns in one process.

    python -m venv beside && beside/bin/pip install -r requirements.txt transformers==5.24.0
    beside/bin/python results/beside_transformers.py

Three comparisons, each the median of five turns: greedy decoding; saffron at width 4 against transformers'
greedy decoding of one reply; saffron at width 16 against transformers sampling 16. Greedy replies must be
equal, else it stops.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the modules are at top level, one folder up

from plumbing.start import run  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from baselines import no_defence  # noqa: E402
from engine import Options  # noqa: E402
from plumbing.adapters import default_models  # noqa: E402
from plumbing.checkpoint import DEFAULT  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from saffron import PREFILL, PROMPT  # noqa: E402
from search import saffron  # noqa: E402

TOKENS = 50
TURNS = 5


@torch.no_grad()
def main():
    policy, _, mrm = default_models()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT, dtype=torch.float32).eval()
    prompt = policy.tokenizer.prompt(PROMPT, PREFILL)
    context = torch.tensor([prompt.policy_tokens(policy.template)])
    length = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS)

    def ours(search, reward_model, width=1):
        return search(policy, reward_model, prompt, Options(width=width, beta=0.0, **length)).tokens

    def generate(**options):
        tokens = theirs.generate(context, attention_mask=torch.ones_like(context), pad_token_id=0,
                                 **length, **options)
        return tokens[0, context.shape[1]:].tolist()

    def greedy():
        return generate(do_sample=False)

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} "
          f"threads, float32, a context of {context.shape[1]} tokens, {TOKENS} new ones; ms a step")
    for name, a, b in (
            ("greedy", greedy, lambda: ours(no_defence, None)),
            ("saffron, width 4, against greedy", greedy, lambda: ours(saffron, mrm, width=4)),
            ("saffron, width 16, against sampling 16",
             lambda: generate(do_sample=True, num_return_sequences=16),
             lambda: ours(saffron, mrm, width=16))):
        if name == "greedy" and a() != b():
            raise BadInput("the greedy replies differ: check that data/smollm2 is unchanged")
        seconds = []
        for _ in range(TURNS):
            seconds.append([])
            for search in (a, b):
                started = time.perf_counter()
                search()
                seconds[-1].append((time.perf_counter() - started) / TOKENS * 1e3)
        their, our = np.median(seconds, axis=0)
        print(f"{name}: transformers {their:.1f}, ours {our:.1f}, ratio {our / their:.2f}", flush=True)


if __name__ == "__main__":
    run(main)
