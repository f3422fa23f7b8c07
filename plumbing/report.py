"""
A reply as text for a terminal: what sample.py prints.
"""

import json

from plumbing.start import printable


def show_prompt(prompt, prefill):
    print(f"\nprompt:  {printable(prompt)}")
    if prefill:
        print(f"prefill: {printable(prefill)}")


def show_reply(said, result, prefill, with_trace, tokenizer):
    """Print a reply, the guard's verdict, and what it cost. said: {"title": ..., "verdict": ...}."""
    stats = result.stats
    print(f"\n--- {said['title']} " + "-" * 60)
    print((f"[{printable(prefill)}]" if prefill else "") + printable(result.text))
    print(f"\n{said['verdict']}, {stats.seconds:.1f} s, {stats.flops / 1e12:.2f} TFLOP, "
          f"{stats.policy_calls} policy calls, {stats.reward_calls} reward calls,\n"
          f"{stats.tokens_computed} tokens computed, {stats.tokens_cached} from cache, KV cache "
          f"{stats.peak_kv_bytes / 1e6:.1f} MB (a copy for each sequence: "
          f"{stats.unshared_kv_bytes / 1e6:.1f} MB)")
    if with_trace:
        rewards = {tuple(branch.tokens): branch.reward for frontier in result.trace for branch in frontier}
        print("\nsurviving branches, each with the search's reward at its end:")
        for line in tree_lines([branch.tokens for branch in result.trace[-1]], rewards, tokenizer):
            print(printable(line))


def tree_lines(replies, rewards, tokenizer, start=0, indent=""):
    """The replies as an indented tree: what all share on one line, then each continuation below it."""
    replies = sorted(set(map(tuple, replies)))
    end = start
    while all(len(r) > end for r in replies) and len({r[end] for r in replies}) == 1:
        end += 1
    if end > start:
        text = json.dumps("".join(tokenizer.pieces(replies[0])[start:end]), ensure_ascii=False)
        reward = rewards.get(replies[0][:end])
        yield f"{indent}{'' if reward is None else f'{reward:+.2f} '}{text}"
        indent += "    "
    longer = [r for r in replies if len(r) > end]
    for first in sorted({r[end] for r in longer}):
        yield from tree_lines([r for r in longer if r[end] == first], rewards, tokenizer, end, indent)
