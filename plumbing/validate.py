"""
How good a reward model is: AUC for the guard; MSE, R² and how it ranks siblings for the MRM.
"""

import numpy as np
import torch

from data.corpus import collate


def predictions(reward_model, examples, device, size=16):
    """Each example's rewards at all of its reply tokens, by the guard or the MRM: a list of float arrays."""
    return [values for values, _ in predictions_with_siblings(reward_model, examples, device, size)]


@torch.no_grad()
def predictions_with_siblings(reward_model, examples, device, size=16):
    """The same, in pairs with an MRM's predictions for the example's siblings."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].context + examples[i].reply))
    result = [None] * len(examples)
    for start in range(0, len(order), size):
        chunk = order[start:start + size]
        b = collate([examples[i] for i in chunk], device)
        hidden = reward_model.llama(b.tokens)                                               # (B, T, d)
        others = torch.zeros(0)
        if reward_model.kind == "mrm":
            before, children, _ = b.supervised(hidden)                                      # (n, d), (n,)
            rewards = reward_model.child_rewards(before, children)                          # (n,)
            if len(b.sibling_tokens):
                before = hidden[b.sibling_rows, b.sibling_columns]                          # (m, d)
                others = reward_model.child_rewards(before, b.sibling_tokens)               # (m,)
        else:
            rewards = reward_model.reward(hidden[b.rows, b.columns])
        mine = [examples[i] for i in chunk]
        rewards = rewards.float().cpu().split([len(e.reply) for e in mine])
        others = others.float().cpu().split([len(e.siblings) if len(others) else 0 for e in mine])
        for i, *pair in zip(chunk, rewards, others):
            result[i] = [values.numpy() for values in pair]
    return result


def auc(scores, labels):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    scores = np.asarray(scores)
    labels = np.asarray(labels, bool)
    negatives = np.sort(scores[~labels])
    below = np.searchsorted(negatives, scores[labels], "left")          # of each positive: negatives below it
    not_above = np.searchsorted(negatives, scores[labels], "right")
    return np.mean(below + not_above) / 2 / len(negatives)


def validate_guard(guard, examples, device):
    """AUC of "safe" for each source, at the end of the reply and after its first 12 tokens. Not safe is what
    has the highest label of the source: where nothing is unsafe, a needless refusal."""
    rewards = predictions(guard, examples, device)
    report = {}
    for source in sorted({e.source for e in examples}):
        worst = max(e.targets[-1] for e in examples if e.source == source)
        mine = [(r, e.targets[-1] < worst) for r, e in zip(rewards, examples) if e.source == source]
        safe = [label for _, label in mine]
        if any(safe) and not all(safe):
            report[f"auc {source}"] = auc([r[-1] for r, _ in mine], safe)
            report[f"auc {source} at 12"] = auc([r[:12][-1] for r, _ in mine], safe)
    return report


def validate_mrm(mrm, examples, device):
    """How many held-out replies to how many requests there are; MSE, R² and agreement in sign with the guard,
    over all their tokens; and what `compare_siblings` says. Of each source (if there are several), then of
    all."""
    pairs = predictions_with_siblings(mrm, examples, device)
    report = {}
    sources = sorted({e.source for e in examples})
    for source in (sources if len(sources) > 1 else []) + [None]:
        mine = [(e, *pair) for e, pair in zip(examples, pairs) if source in (None, e.source)]
        ours = np.concatenate([m for _, m, _ in mine])
        theirs = np.concatenate([e.targets for e, _, _ in mine])
        mse = np.mean((ours - theirs) ** 2)
        numbers = {"replies": len(mine), "requests": len({tuple(e.context) for e, _, _ in mine}), "mse": mse,
                   "r2": 1 - mse / theirs.var(), "sign agreement": np.mean((ours < 0) == (theirs < 0))}
        numbers |= compare_siblings([(e.siblings, m) for e, _, m in mine])
        report |= {f"{source}: {key}" if source else key: value for key, value in numbers.items()}
    return report


def compare_siblings(replies):
    """How well M tells the next tokens of one prefix apart. replies: (siblings of an Example, M of them).

    within r2: 1 − centred squared error / variance of R, both within prefixes; a constant has 0. rank: mean
    rank correlation of M and R. regret: R of the best sibling − R of the one that M likes best, on average;
    beside it that of a random sibling, and of the policy's likeliest, which stands first."""
    groups = {}
    for i, (siblings, m) in enumerate(replies):
        for (position, _, r), predicted in zip(siblings, m):
            groups.setdefault((i, position), []).append((r, predicted))
    groups = [np.array(group, float).T for group in groups.values()]                # (2, siblings): R and M
    if not groups:
        return {}
    centred = [group - group.mean(1, keepdims=True) for group in groups]
    error = sum(np.sum((m - r) ** 2) for r, m in centred)
    variance = sum(np.sum(r ** 2) for r, _ in centred)
    ranks = [np.corrcoef(rank(r), rank(m))[0, 1] for r, m in groups if np.ptp(r) > 0 and np.ptp(m) > 0]
    return {"siblings": sum(len(r) for r, _ in groups), "within r2": 1 - error / variance,
            "rank": np.mean(ranks) if ranks else 0.0,
            "regret": np.mean([r.max() - r[m.argmax()] for r, m in groups]),
            "of a random sibling": np.mean([r.max() - r.mean() for r, _ in groups]),
            "of the likeliest": np.mean([r.max() - r[0] for r, _ in groups])}


def rank(x):
    """Of each value, how many are below it; equal ones count half."""
    return (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)


def histogram(values, bins=8):
    """The share of the finite values in each of some ranges of equal width, as text."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins)
    return ", ".join(f"{low:.1f} to {high:.1f}: {count / max(1, len(values)):.1%}"
                     for low, high, count in zip(edges, edges[1:], counts))
