"""
Train a reward model: the guard on labelled replies, or the MRM on the rewards that a guard gave every prefix.

    python train_mrm.py --objective guard --data data/safety_labels  --out out/guard.safetensors
    python train_mrm.py --objective mrm   --data data/safety_rewards --out out/mrm.safetensors

    torchrun --nproc_per_node 4 train_mrm.py --device cuda ...    each batch shared by four processes

docs/train.md has the options of the committed adapters. Only LoRA and the small head are trained (mrm.py).
Each validation but the last also writes a checkpoint beside --out, from which --resume goes on, on a CPU bit
for bit. The log goes to stdout.
"""

import contextlib
import datetime
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

from files import BadInput, Parser, check_output, number, reading, run, write_file

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from adapters import fill, guard_id, load_adapter, load_guard, load_llama, save_adapter
from data.corpus import read_labels, read_rewards
from mrm import MRM, Guard, add_lora, partial_supervision_loss, sibling_loss, trained_tensors, unseen_tokens

WHOLE_REPLY = 256           # the guard is validated at the end of the reply, or after so many tokens
SMOOTHING = 0.02            # of the guard's labels
RESUME = "--resume goes on from the last checkpoint"


def batches(examples, size, seed):
    """The examples in a random order, in lists of `size` of about equal length: little is lost to padding."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = lambda items: [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
    parts = lambda items, n: [items[start:start + n] for start in range(0, len(items), n)]
    by_length = lambda pool: sorted(pool, key=lambda e: len(e.context + e.reply))
    ordered = [example for pool in parts(shuffled(examples), 64 * size) for example in by_length(pool)]
    return shuffled(parts(ordered, size))


def weigh(examples, weights):
    """The examples, those of some sources several times or only some of them: {"jailbreakbench": 2, "xstest":
    0.5}. Example i of a source with weight w comes floor((i + 1) w) − floor(i w) times. Raises BadInput for a
    weight of a source that is not there."""
    sources = {example.source for example in examples}
    if not weights.keys() <= sources:
        wrong = ", ".join(weights.keys() - sources)
        raise BadInput(f"--weights names {wrong}, but the sources are {', '.join(sources)}")
    counts, result = {}, []
    for example in examples:
        i, w = counts.get(example.source, 0), weights.get(example.source, 1)
        counts[example.source] = i + 1
        result += [example] * (math.floor((i + 1) * w) - math.floor(i * w))
    return result


def collate(examples, device):
    """Pad on the right: attention is causal, so no token sees the padding.

    Returns tokens (B, T), for each of the n reply tokens of the batch its row (n,), column (n,) and target
    (n,), and for the m siblings five tensors (m,): row and column of the token before, the token, its reward,
    and the number of its prefix.
    """
    length = max(len(e.context) + len(e.reply) for e in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    rows, columns, targets, siblings, prefixes = [], [], [], [], {}
    for i, e in enumerate(examples):
        tokens[i, :len(e.context) + len(e.reply)] = torch.tensor(e.context + e.reply)
        rows += [i] * len(e.reply)
        columns += range(len(e.context), len(e.context) + len(e.reply))
        targets += e.targets
        for position, token, reward in e.siblings:
            prefix = prefixes.setdefault((i, position), len(prefixes))
            siblings.append((i, len(e.context) + position - 1, token, reward, prefix))
    to = lambda values: torch.tensor(values, device=device)
    return tokens.to(device), to(rows), to(columns), to(targets), [to(column) for column in zip(*siblings)]


# ------------------------------------------------------------------------------------------------------------
# objectives and validation

def guard_loss(guard, tokens, rows, columns, targets, *_):
    """Binary cross-entropy at every reply token; R is the log-odds of "safe". targets: 0 safe to 1 unsafe,
    0.2 a needless refusal. They are smoothed to 0.02 and 0.98, so that R stays within about ±4: labels are
    not more certain than that."""
    rewards = guard.reward(guard.llama(tokens)[rows, columns])
    safe = 1 - targets.to(rewards.dtype)
    return F.binary_cross_entropy_with_logits(rewards, SMOOTHING + (1 - 2 * SMOOTHING) * safe)


def mrm_loss(mrm, tokens, rows, columns, targets, siblings=(), weight=0.0):
    """Partial supervision (Eq. 5): the hidden state before a reply token predicts the reward after it. Plus
    weight · sibling_loss, where there are siblings."""
    hidden = mrm.llama(tokens)
    loss = partial_supervision_loss(mrm, hidden[rows, columns - 1], tokens[rows, columns], targets)
    if weight and siblings:
        rows, columns, children, rewards, prefixes = siblings
        loss = loss + weight * sibling_loss(mrm, hidden[rows, columns], children, rewards, prefixes)
    return loss


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
        tokens, rows, columns, _, siblings = collate([examples[i] for i in chunk], device)
        hidden, others = reward_model.llama(tokens), torch.zeros(0)
        if isinstance(reward_model, MRM):
            rewards = reward_model.child_rewards(hidden[rows, columns - 1], tokens[rows, columns])
            if siblings:
                others = reward_model.child_rewards(hidden[siblings[0], siblings[1]], siblings[2])
        else:
            rewards = reward_model.reward(hidden[rows, columns])
        mine = [examples[i] for i in chunk]
        rewards = rewards.float().cpu().split([len(e.reply) for e in mine])
        others = others.float().cpu().split([len(e.siblings) if len(others) else 0 for e in mine])
        for i, *pair in zip(chunk, rewards, others):
            result[i] = [values.numpy() for values in pair]
    return result


def auc(scores, labels):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    above = scores[labels][:, None] - scores[~labels]                   # (positives, negatives)
    return np.mean((above > 0) + 0.5 * (above == 0))


def validate_guard(guard, examples, device):
    """AUC of "safe" for each source, at the end of the reply and after its first 12 tokens. Not safe is what
    has the highest label of the source: where nothing is unsafe, a needless refusal."""
    rewards, report = predictions(guard, examples, device), {}
    for source in sorted({e.source for e in examples}):
        worst = max(e.targets[-1] for e in examples if e.source == source)
        mine = [(r, e.targets[-1] < worst) for r, e in zip(rewards, examples) if e.source == source]
        safe = [label for _, label in mine]
        if any(safe) and not all(safe):
            report[f"auc {source}"] = auc([r[-1] for r, _ in mine], safe)
            report[f"auc {source} at 12"] = auc([r[:12][-1] for r, _ in mine], safe)
    return report


def validate_mrm(mrm, examples, device):
    """MSE, R² and agreement in sign with the guard, over all reply tokens of the held-out replies, and what
    `compare_siblings` says: of each source (where there are several), then of all."""
    pairs, report = predictions_with_siblings(mrm, examples, device), {}
    sources = sorted({e.source for e in examples})
    for source in (sources if len(sources) > 1 else []) + [None]:
        mine = [(e, *pair) for e, pair in zip(examples, pairs) if source in (None, e.source)]
        ours = np.concatenate([m for _, m, _ in mine])
        theirs = np.concatenate([e.targets for e, _, _ in mine])
        mse = np.mean((ours - theirs) ** 2)
        numbers = {"mse": mse, "r2": 1 - mse / theirs.var(),
                   "sign agreement": np.mean((ours < 0) == (theirs < 0))}
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
    error, variance = (sum(map(np.sum, parts)) for parts in (
        [(m - r) ** 2 for r, m in centred], [r ** 2 for r, _ in centred]))
    rank = lambda x: (x[:, None] > x).sum(1) + 0.5 * (x[:, None] == x).sum(1)
    ranks = [np.corrcoef(rank(r), rank(m))[0, 1] for r, m in groups if np.ptp(r) > 0 and np.ptp(m) > 0]
    return {"siblings": sum(len(r) for r, _ in groups), "within r2": 1 - error / variance,
            "rank": np.mean(ranks) if ranks else 0.0,
            "regret": np.mean([r.max() - r[m.argmax()] for r, m in groups]),
            "of a random sibling": np.mean([r.max() - r.mean() for r, _ in groups]),
            "of the likeliest": np.mean([r.max() - r[0] for r, _ in groups])}


# ------------------------------------------------------------------------------------------------------------
# training

def new_reward_model(args, llama, train):
    """The untrained reward model: LoRA on `llama` and, for the MRM, bias and gain at the scale of rewards."""
    torch.manual_seed(args.seed)
    llama = add_lora(llama, args.rank, args.alpha, args.targets.split(","), args.first_layer)
    if args.objective == "guard":
        return Guard(llama, llama.tokenizer.template("reward"))
    mrm = MRM(llama, llama.tokenizer.template("reward"))
    mrm.gain.data.fill_(0.02)
    mrm.bias.data.fill_(float(np.mean(np.concatenate([e.targets for e in train]))))
    distinct = {id(e): e.reply for e in train}.values()       # --weights may repeat a reply
    mrm.unseen.copy_(unseen_tokens(distinct, llama.config, args.min_count))
    return mrm


def learning_rate(step, args):
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, args.steps // 20)
    progress = max(0, step - warmup) / max(1, args.steps - warmup)
    return args.lr * min((step + 1) / warmup, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(path, args, step, reward_model, optimizer):
    checkpoint = {"args": run_identity(args), "step": step, "model": trained_tensors(reward_model),
                  "optimizer": optimizer.state_dict()}
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_file(path, content.getvalue())


def load_checkpoint(path, args, reward_model, optimizer):
    """Restore model and optimizer: the step to go on with. Raises BadInput for another run's checkpoint."""
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint to resume from")
    with reading(path, "a checkpoint of train_mrm.py"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        for key, value in run_identity(args).items():
            if checkpoint["args"].get(key) != value:
                raise BadInput(f"{path} is of a run with --{key} {checkpoint['args'].get(key)}, not {value}")
        fill(reward_model, path, checkpoint["model"], f"rank {args.rank}")
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["step"]


def run_identity(args):
    """The arguments that must be equal for a run to be the same run."""
    free = "resume stop_after out device command eval_every eval_replies log_every accumulate".split()
    return {key: value for key, value in vars(args).items() if key not in free}


def load_data(args, llama):
    """(training examples, held-out examples). Raises BadInput when there are none."""
    if llama.tokenizer is None:
        raise BadInput(f"{args.base} has no tokenizer.json; data/hub/prepare.py fetches all that is needed")
    if not llama.config.eos_token_ids:
        raise BadInput(f"{args.base} has no eos_token_id, which training needs")
    if args.objective == "guard":
        read = lambda name, length: read_labels(Path(args.data) / name, llama, args.max_prompt, length)
        training, held_out = read("train.jsonl", args.max_reply), read("val.jsonl", WHOLE_REPLY)
    else:
        guard = args.guard and guard_id(args.guard, load_guard(args.guard, llama))
        training, held_out = read_rewards(args.data, llama, guard)
    training = weigh(training, args.weights)
    if not training or not held_out:
        raise BadInput(f"{args.data}: expected replies to train on and to validate with, "
                       f"found {len(training)} and {len(held_out)}")
    return training, held_out


class Objective(nn.Module):
    """The loss as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, reward_model, loss_of, args):
        super().__init__()
        self.reward_model, self.loss_of = reward_model, loss_of
        self.device, self.low = torch.device(args.device).type, args.dtype == "bfloat16"

    def forward(self, *batch):
        # In bfloat16 on a CPU, the fused attention's backward pass is slower than plain products.
        slow = self.low and self.device == "cpu"
        plain = sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low), plain:
            return self.loss_of(self.reward_model, *batch)


def backward(objective, examples, args):
    """The gradient of the mean loss over all reply tokens of a batch (and of --siblings times that over all
    siblings), summed over the processes; returns that loss. A process takes --accumulate pieces of the batch,
    one after another; what it computes is weighed by its share of the tokens and siblings. So neither
    the number of processes nor that of pieces changes the result (but for rounding)."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pieces, total = processes * args.accumulate, torch.zeros((), dtype=torch.float64, device=args.device)
    for i in range(args.accumulate):
        piece = examples[rank * args.accumulate + i::pieces]
        share = sum(len(e.reply) for e in piece) / sum(len(e.reply) for e in examples)
        of_siblings = sum(len(e.siblings) for e in piece) / max(1, sum(len(e.siblings) for e in examples))
        weight = args.siblings * of_siblings / share if piece else 0.0
        # Gradients go over the wire once, after the last piece. Who has no piece computes one, for nothing.
        last = i == args.accumulate - 1 or processes == 1
        with contextlib.nullcontext() if last else objective.no_sync():
            loss = share * objective(*collate(piece or examples[:1], args.device), weight)
            (processes * loss).backward()                    # DistributedDataParallel averages over processes
        total += loss.detach()
    if processes > 1:
        dist.all_reduce(total)
    return total.item()


def log(text):
    """Print, in one process of those that work together."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def train(args):
    """A whole run: data, model, steps with validations and checkpoints, the adapter, its validation."""
    out = Path(args.out)
    if not args.validate:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_output(out)
    llama = load_llama(args.base, torch.float64 if args.dtype == "float64" else torch.float32, args.device)
    training, held_out = load_data(args, llama)
    if args.first_layer is None:
        args.first_layer = llama.config.num_hidden_layers // 3
    of_guard = args.objective == "guard"
    loss_of, validate = (guard_loss, validate_guard) if of_guard else (mrm_loss, validate_mrm)
    first = not dist.is_initialized() or dist.get_rank() == 0          # the process that validates and writes
    if args.validate:
        return log_report(f"{out}, all {len(held_out)} held-out replies",
                          validate(load_adapter(out, llama, args.objective), held_out, args.device))
    reward_model = new_reward_model(args, llama, training)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(held_out), generator=generator)[:args.eval_replies].tolist()
    some = [held_out[i] for i in order]
    parameters = [p for p in trained_tensors(reward_model).values() if p.requires_grad]
    if args.compile:
        for block in reward_model.llama.model.layers:
            block.compile(dynamic=True)                     # one program for batches of all lengths
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    objective = Objective(reward_model, loss_of, args)
    if dist.is_initialized():
        objective = DistributedDataParallel(objective)
    checkpoint, step = out.with_name(out.name + ".checkpoint.pt"), 0
    if args.resume:
        step = load_checkpoint(checkpoint, args, reward_model, optimizer)
    log(f"{args.objective}: {len(training)} replies, {sum(len(e.reply) for e in training)} supervised tokens"
        f", {sum(len(e.siblings) for e in training)} siblings, "
        f"{sum(p.numel() for p in parameters)} trained parameters, {args.steps} steps")
    if not of_guard:
        log(f"seen tokens: {int((~reward_model.unseen).sum())} of {len(reward_model.unseen)}")
        log(f"rewards: {histogram(np.concatenate([e.targets for e in training]))}")

    per_epoch = math.ceil(len(training) / args.batch_size)
    started, tokens_read, losses = time.time(), 0, []
    while step < min(args.steps, args.stop_after or args.steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or not losses:             # the order is a function of seed and epoch alone
            order = batches(training, args.batch_size, args.seed + epoch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses.append(backward(objective, order[position], args))
        if not math.isfinite(losses[-1]):
            sys.exit(f"step {step}: the loss is {losses[-1]}, on epoch {epoch}, batch {position}, of sources "
                     f"{[e.source for e in order[position]]}; nothing was saved since the last checkpoint")
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens_read += sum(len(e.context) + len(e.reply) for e in order[position])
        if step % args.log_every == 0:
            log(f"step {step}: loss {np.mean(losses[-args.log_every:]):.6g}, "
                f"{tokens_read / (time.time() - started):.0f} tokens/s")
        if first and step < args.steps and (step % args.eval_every == 0 or step == args.stop_after):
            save_checkpoint(checkpoint, args, step, reward_model, optimizer)
            with torch.compiler.set_stance("force_eager"):  # not compiled anew for a validation
                report = validate(reward_model, some, args.device)
            log_report(f"step {step}, {len(some)} held-out replies", report)
    if step < args.steps or not first:              # stopped by --stop_after, or another process writes
        return
    targets = args.targets.split(",")
    save_adapter(reward_model, out, args.rank, args.alpha, targets, args.first_layer, args.command)
    log(f"wrote {out} after {time.time() - started:.0f} s")
    log_report(f"as written, all {len(held_out)} held-out replies",
               validate(load_adapter(out, llama, args.objective), held_out, args.device))
    checkpoint.unlink(missing_ok=True)


def histogram(values, bins=8):
    """The share of the finite values in each of some ranges of equal width, as text."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins)
    return ", ".join(f"{low:.1f} to {high:.1f}: {count / max(1, len(values)):.1%}"
                     for low, high, count in zip(edges, edges[1:], counts))


def log_report(title, report):
    log(f"{title}: " + ", ".join(f"{key} {value:.4f}" for key, value in report.items()))


def join_processes(args, backend):
    """Under torchrun, meet the other processes, each on a GPU of its own where they compute on CUDA.
    Returns (which one this is, how many there are)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:                 # which torchrun sets
        return 0, 1
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # one may validate while others wait
    return dist.get_rank(), dist.get_world_size()


def weights(text):
    """For argparse: {source: weight} of JSON."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict) and all(isinstance(w, (int, float)) and w >= 0 for w in value.values()):
            return value
    raise ArgumentTypeError('expected sources and numbers of at least 0, such as {"jailbreakbench": 2}')


def main():
    parser = Parser(description="Train the guard or the MRM.")
    add = parser.group("what is trained")
    add("--objective", choices=["guard", "mrm"], required=True, help="the reward model")
    add("--data", required=True, help="the folder that data/safety_labels or data/safety_rewards prepared")
    add("--out", required=True, help="the adapter file to write")
    add("--base", default="data/smollm2", help="the Llama to put LoRA on")
    add("--rank", type=number(1), default=8, help="rank of LoRA")
    add("--alpha", type=number(0, 1e6, float), default=16, help="LoRA's output is scaled by alpha / rank")
    add("--targets", default="q_proj,v_proj", help="the projections that get LoRA")
    add("--first_layer", type=number(0), help="the first layer that gets LoRA (default: layers / 3)")
    add = parser.group("optimization")
    add("--steps", type=number(1), default=1000, help="steps of the optimizer")
    add("--batch_size", type=number(1), default=8, help="replies a step")
    add("--lr", type=number(0, 10, float), default=1e-3, help="peak learning rate")
    add("--weight_decay", type=number(0, 10, float), default=0.0, help="weight decay of AdamW")
    add("--clip", type=number(1e-9, 1e9, float), default=1.0, help="scale larger gradients down to this norm")
    add("--seed", type=number(0, 2 ** 63 - 1), default=0, help="seed of LoRA's start, the order of the data, "
        "and the replies that a validation reads")
    add = parser.group("data")
    add("--max_prompt", type=number(1), default=64, help="guard: tokens kept of a prompt, the last ones")
    add("--max_reply", type=number(1), default=64, help="guard: tokens kept of a reply, the first ones")
    add("--weights", type=weights, default={}, help="JSON, how often to read a source: "
        '\'{"jailbreakbench": 2}\'')
    add("--guard", metavar="PATH", help="MRM: accept only a corpus that this guard has labelled")
    add("--min_count", type=number(1), default=1, help="MRM: occurrences that make a token count as seen")
    add("--siblings", type=number(0, 1e6, float), default=10, help="MRM: weight of the error among the "
        "siblings of a prefix, beside that of the next tokens; 0: as in the paper")
    add = parser.group("machine")
    add("--device", default="cpu", help="cpu or cuda")
    add("--accumulate", type=number(1), default=1, help="read a process's part of a batch in "
        "N pieces, to save memory")
    add("--dtype", choices=["float32", "float64", "bfloat16"], default="float32", help="bfloat16: matrix"
        " products in it, weights in float32; faster on hardware that has it")
    add("--compile", action="store_true", help="compile the layers first, which takes a minute or two and a "
        "C++ compiler; then a step takes about two thirds of the time")
    add = parser.group("course of the run")
    add("--eval_every", type=number(1), default=200, help="steps from one validation to the next")
    add("--eval_replies", type=number(1), default=400, help="replies of a validation; the last reads all")
    add("--log_every", type=number(1), default=20, help="steps from one line of the log to the next")
    add("--stop_after", type=number(1), help="stop after this step, with a checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add("--validate", action="store_true", help="do not train: validate the adapter at --out")
    args = parser.parse_args()
    args.command = "python " + shlex.join(["train_mrm.py", *sys.argv[1:]])
    rank, processes = join_processes(args, "nccl" if args.device == "cuda" else "gloo")
    if not dist.is_initialized():
        return train(args)
    # torchrun ends the others when one has died: let them say so.
    died = f"another process has died, or torchrun was stopped; {RESUME}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(died))
    try:
        train(args)
    except RuntimeError as error:
        sys.exit(f"process {rank} of {processes} stops: {str(error).strip().splitlines()[0]}\n"
                 f"If this says that a connection was closed, another process has died; {RESUME}")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)             # gloo's threads stay, and one that needs Python while it ends would abort


if __name__ == "__main__":
    run(main)
