"""
Write a student copy of this repository, in which chosen functions are left to be written.

    python tests/assign.py --out DIR                    all exercises
    python tests/assign.py --out DIR --exercise 1 4     some of them
    python -m pytest tests --exercise 4                 in the copy: grade one

The copy has the modules with those bodies replaced by NotImplementedError("exercise N: ..."), signature and docstring
kept; HANDOUT.md, a page for each exercise; the tests that check exercises, without those that would show a solution; and
what is needed to run it. Bodies are found in the syntax tree, so the code needs no markers. An exercise's points are
those of its tests, which carry the mark exercise(N, points=P).
"""

import ast
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from files import BadInput, Parser  # noqa: E402

# All that a copy has, but for the tests of exercises. Nothing else is copied: no history, no file of the lecturer's.
COPIED = ["model.py", "trie_cache.py", "mrm.py", "search.py", "train_mrm.py", "sample.py", "eval.py", "bench.py", "page.py",
          "page.html", "README.md", "page.png", "eval.json", "eval.png", "bench.json", "bench.png", "LICENSE", "CITATION.cff",
          "requirements.txt", ".gitignore", "data/download.py", "data/*/prepare.py", "data/*/readme.md", "data/prompts/*.jsonl",
          "data/smollm2/guard.safetensors", "data/smollm2/judge.safetensors", "data/smollm2/mrm.safetensors",
          "tests/conftest.py", "tests/golden/*", "tests/golden/*/*"]
TESTS = ["tests/test_model.py", "tests/test_trie_cache.py", "tests/test_mrm.py", "tests/test_search.py"]


@dataclass
class Exercise:
    title: str
    level: str
    functions: list             # what is to be written, "file.py:function" or "file.py:Class.function"
    text: str                   # of the handout
    shown_by: list = field(default_factory=list)        # other functions that would show how; they are blanked too


EXERCISES = {
    1: Exercise("rotary embedding", "easy", ["model.py:rotary_frequencies", "model.py:rotate"], """
**Read** model.py down to `Attention`; Su et al. 2021 ([arXiv 2104.09864](https://arxiv.org/abs/2104.09864)), section 3.2.

**Write** the frequencies and the rotation. With h = head_dim and pairs i = 0 … h/2 − 1,

    f_i = rope_theta ^ (−2i / h)                          radians a position, in float64
    (a, b) -> (a cos − b sin, b cos + a sin)              for dimensions a = x_i and b = x_(i + h/2) of each head

at the angle position · f_i. The pair is *not* two neighbours: the first half of the dimensions meets the second. Llama 3
changes the frequencies. With C = original_max_position_embeddings, pair i turns t_i = C f_i / 2π times within the first
context, and with s_i = (t_i − low_freq_factor) / (high_freq_factor − low_freq_factor), cut to [0, 1],

    f_i <- s_i f_i + (1 − s_i) f_i / factor

so that fast pairs stay and slow ones are stretched. `config.rope_scaling` is None or a dict that has these four keys."""),
    2: Exercise("grouped-query attention under a tree mask", "medium", ["trie_cache.py:TrieCache.attend"], """
**Read** trie_cache.py, `Attention` in model.py, and the documentation of torch's `scaled_dot_product_attention`; Ainslie
et al. 2023 ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)), section 2.2.

**Write** the attention of the n tokens that wait, in one layer. `self.arena[layer]` holds keys (index 0) and values (1)
of all slots; `self.slots` (n,) says where the new tokens' keys and values belong, and they must be there before anyone
looks. `self.mask` (n, used) is 0 where a token may look at a slot and −∞ where not; used = `self.used` slots are handed
out.

    y = softmax(q Kᵀ / sqrt(head_dim) + mask) V           for each head

Query heads are more than key heads: with 6 and 2, heads 0, 1, 2 use keys and values 0, the others 1. A path's keys may
lie in any order of slots, because their positions were rotated into them.""", ["bench.py:CopyCache.attend"]),
    3: Exercise("trie lookup and slots", "medium",
                ["trie_cache.py:TrieCache.insert", "trie_cache.py:TrieCache.take_slot", "trie_cache.py:TrieCache.keep"], """
**Read** trie_cache.py, first its docstring; in the paper, section 4.4.

**Write** three functions that keep these statements true:

- `root.children` spells all that is stored: a node's `children` maps a token to the node after it. A prefix has one node
  (`TrieNode(token, slot, parent)` knows its depth), and each node but the root one slot, which no other node has.
- `visible[i, j]` is true exactly if slot j belongs to slot i's node or to one above it. (A row is its parent's row and
  one bit more, at the root just that bit; its slot may have belonged to another node before. Rows of slots given back do
  not matter.)
- New nodes stand in `waiting`, parents first, until `compute` has read them. `leaves` is the set of all nodes but the
  root without children.
- `free` is a heap (heapq) of the slots given back, `used` how many different slots were ever handed out. The lowest free
  slot is taken first; when there is none, the next unused one, and if that is beyond the end of the tensors, `arena`
  (dimension 3), `hidden` (0) and `visible` (both) double, with zeros in what is new.
- `insert` adds to `cached` the tokens of the whole path, from the root to the node, that were there already.
- `keep(nodes)` removes from each leaf upwards what is neither one of these nodes nor above one. Whoever still holds a
  removed node sees `node.slot is None`. (That no node may be waiting is a precondition: an assertion is enough.)"""),
    4: Exercise("nucleus candidates", "medium", ["search.py:nucleus", "search.py:candidates"], """
**Read** the sections "distributions" and "the searches" of search.py; Holtzman et al. 2020 ([arXiv
1904.09751](https://arxiv.org/abs/1904.09751)), section 3.1; in the paper, sections 4.1
(Eq. 2) and 4.3.

**Write** both. The nucleus is the smallest set of most likely tokens whose mass reaches top_p:

    a_1, a_2, ... by falling probability, equal ones by id;   a_k is in the nucleus if p(a_1) + ... + p(a_(k−1)) < top_p

A token of probability 0 never is; with top_p = 1 all others are, however their sum is rounded. (It is called on every
row of every step, on a vocabulary of 50,000: a full sort is right, but slow. This repository looks at the 64 largest
first; then mind the ties.) Candidates of a sequence are the tokens of its nucleus that are not in V_unseen (which is
None where no token is unseen); if none is left, the seen token with the highest score in `logits`, also at temperature
0; if all seen ones have the score −∞, BadInput ("the reward model has not seen any token that could come next").
`probabilities` gives p from scores; sums are torch's `cumsum` in p's own precision."""),
    5: Exercise("partial-supervision loss", "easy", ["mrm.py:partial_supervision_loss", "mrm.py:MRM.child_rewards"], """
**Read** the first half of mrm.py; in the paper, section 4.2 (Eq. 5).

**Write** the loss and the one entry of M that it needs. W is the frozen unembedding `llama.lm_head.weight` (V, d), b the
bias (V,), gain a number:

    M(s)_a = gain · (h(s) · W_a) + b_a
    L      = mean over response positions j of (M(s[0:j])_{s_j} − R(s[0:j+1]))²

A batch has thousands of positions and the vocabulary 50,000 tokens: compute the entries that are asked for and no others.
No loop over positions."""),
    6: Exercise("conservative mask", "easy", ["mrm.py:MRM.conservative_rewards"], """
**Read** `MRM` in mrm.py, and in `new_reward_model` of train_mrm.py where V_unseen comes from; in the paper,
section 4.3 (Eq. 7).

**Write** M_cons: what M says of a token that it has never learned from is an extrapolation, and a search for high rewards
finds every extrapolation that is too high.

    M_cons(s)_a = −∞  for a in V_unseen,  M(s)_a  otherwise

for any number of leading dimensions. Before you read on, say in a sentence why end-of-sequence must be a seen token."""),
    7: Exercise("the saffron step", "hard", ["search.py:saffron", "search.py:best"], """
**Read** all of search.py: `side_by_side` (how a search asks to have things read), `beam` (which is given, and differs),
`candidates`, `extend`, `rewarded`; in the paper, section 4.1 (Eq. 3).

**Write** the search and the choice of its next frontier. It begins with the empty reply; then, for the frontier F of at
most N = width sequences:

1. Ask policy and MRM, in one `yield`, about the unfinished sequences s of F. Both answer with a hidden state for each
   s. `next_logits` makes scores of the policy's.
2. C = all s·a with a in `candidates`, as they come. M(s)_a of these entries and no others (`child_rewards`, from the
   hidden state of each entry's s) is the branch's `reward`; its `log_prob` is log π(s·a) = log π(s) + log π(a | s),
   where π is the softmax of all scores of `next_logits`, at temperature 1.
3. score(s·a) = M(s)_a + beta · log π(s·a). With beta > 0, strike from C what repeats itself (`repeats_its_end`), unless
   all of C does. Take the N with the highest score; equal ones in the order of C.
4. Add the finished sequences of F before them, and sort: finished ones before unfinished, within each group by score,
   equal ones as they stand. The first N are the next frontier; append it to `trace`.

The search ends after max_new_tokens steps, or when all of F are finished; the reply is the first of the last frontier.

With a guard as `reward_model` (`kind_of` tells), which predicts nothing, no token is unseen, and the guard reads the
children themselves: the first `yield` asks the policy alone, `_, rewards = yield [], children` the guard.""", ["bench.py:reference"]),
    8: Exercise("reward-balanced search", "hard", ["search.py:rebase", "search.py:shares"], """
**Read** `beam`, `best_of_n`, `sample` and `draw` in search.py; Wu et al. 2024 ([arXiv
2408.00724](https://arxiv.org/abs/2408.00724)), section 3.

**Write** the search and the sharing. It begins with the empty reply, whose reward is 0; then at most max_new_tokens
times, for the unfinished sequences s_1 … s_n with rewards R_i:

1. B = width less the number of finished sequences is shared out (`shares`: a list of floats and B, to a list of ints):

       exact_i = B · softmax(R / REBASE_TEMPERATURE)_i
       count_i = exact_i rounded down; what is left of B goes, one each, to those that lost most (equal ones: the first)

2. Ask the policy about those with count_i > 0; the others are dropped.
3. Each of them draws count_i *different* tokens from its nucleus (as many as it holds, if it holds fewer), in proportion
   to what `probabilities` makes of the policy's scores at the search's `temperature`, with one `torch.Generator` for the
   whole search, seeded by `seed`.
4. The guard reads all new sequences, each once, in one `yield`. What ends is finished and stays out of later steps.
5. The frontier, to be appended to `trace`, is all finished ones and then the unfinished, both in the order they came in.

The search ends early when nothing is unfinished, or as many are finished as the width. The finished sequence with the
highest R is the reply; if there is none, the unfinished one with the highest."""),
    9: Exercise("a better rule for unseen tokens", "research, open-ended", [], """
**The question.** V_unseen is all or nothing: of 49,152 tokens, 5,237 may be said, because they came three times in the
corpus. Words that would make better replies are forbidden, and a token with three occurrences is trusted like one with a
thousand. Find a rule that keeps replies as safe and makes them more fluent, or refuses less.

**Where.** `candidates` in search.py applies the mask; `new_reward_model` in train_mrm.py makes it (`--min_count`).
Ideas: a reward that is lowered by the uncertainty of a token's bias; a bound by the nearest seen token in the
unembedding; trusting an unseen token where the *guard* confirms it, and counting that call.

**Measure** on data/prompts/harmful_dev.jsonl and harmless_dev.jsonl at widths 1, 4 and 16, with the README's command for
its table; use the test files once, at the end.

**Report** in two pages: the rule, its cost, ASR by guard *and judge*, refusals, log-probability a token, with
intervals; five replies that it made better and five worse, read by you. 20 points: idea 5, correctness 5, measurement 5,
honesty about what did not work 5."""),
    10: Exercise("a search of your own", "research, open-ended", [], """
**The question.** At equal compute, can a search be safer than saffron, or refuse less at the same safety?

**Where.** One function in search.py and one line in `SEARCHES`; the README's section "Fork it" has one in 20 lines.
sample.py, eval.py, bench.py and the page then know it. Ideas: the MRM proposes and the guard checks the best few; a width
that follows the margin between the first two; a restart from an earlier step when all rewards fall; rebase with M in
place of R.

**Measure** against the rows of README's table: the commands there, with your method's name, on the dev files; on the test
files once, at the end. `stats` counts calls and FLOPs for you: compare at equal TFLOP.

**Report** in two pages: the algorithm in ten lines, the table's row, the plot, what it does differently on five prompts
(show pages of `sample.py --html`). 20 points: idea 5, correctness 5 (same seed, same reply; no early end; each token
computed once), measurement 5, explanation 5."""),
}


# ---------------------------------------------------------------------------------------------------------------
# source code without some of its parts

def find(tree, name):
    """The function of a syntax tree that is called so, "f" or "Class.f"."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def blank(source, name, message):
    """The source, with that function's body replaced by raise NotImplementedError(message); its docstring stays."""
    node, lines = find(ast.parse(source), name), source.splitlines(keepends=True)
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    first = docstring.end_lineno if docstring else node.body[0].lineno - 1
    indent = " " * node.body[0].col_offset
    return "".join(lines[:first] + [f'{indent}raise NotImplementedError("{message}")\n'] + lines[node.end_lineno:])


def points_of(test):
    """(exercise, points) that a test function is marked with, or None."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.exercise":
            return mark.args[0].value, mark.keywords[0].value.value
    return None


def tests_of(number):
    """(name, points, first paragraph of its docstring) of the tests that check an exercise."""
    for path in TESTS:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (points_of(node) or [None])[0] == number:
                yield node.name, points_of(node)[1], " ".join((ast.get_docstring(node) or "").split())


def exercise_tests(source):
    """The source of a test module with nothing left but the tests that check exercises, and what these use."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    named = lambda node: isinstance(node, (ast.FunctionDef, ast.ClassDef))
    start = lambda node: min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    kept = [node for node in tree.body if not (named(node) and node.name.startswith("test_") and not points_of(node))]
    while True:
        words = {word for node in kept for child in ast.walk(node) for word in (
            getattr(child, "id", None), getattr(child, "arg", None), getattr(child, "attr", None))}
        unused = [node for node in kept if named(node) and not node.name.startswith("test_") and node.name not in words]
        if not unused:
            break
        kept = [node for node in kept if node not in unused]
    dropped = {number for node in tree.body if node not in kept for number in range(start(node), node.end_lineno + 1)}
    text = "".join(line for number, line in enumerate(lines, 1) if number not in dropped)
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text.rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------------
# the copy

def handout(numbers):
    """HANDOUT.md: how to work, and a page for each exercise."""
    pages = ["""# Exercises

Each exercise leaves some functions of this repository to you: their bodies are `raise NotImplementedError`, signature and
docstring say what they must do. Change these bodies (with helper functions of your own, if you like),
and nothing else. "The paper" is Qiu et al. 2025, "Saffron-1"
([arXiv 2506.06444](https://arxiv.org/abs/2506.06444)). (README.md counts
the lines of the whole repository, and names some tests that are not in this copy.) To grade
exercise N:

    pip install -r requirements.txt
    python -m pytest tests --exercise N

It prints the points of each test; a test counts when all of its cases pass. One that needs another exercise's function is
skipped and says which. Work in the order of the numbers, or ask for a copy with fewer exercises. When all is written,
`python sample.py --safety saffron` runs. (It downloads a language model of 93 MB; the tests need none.)

| exercise | level | points |
|---|---|---|
""" + "".join(f"| {n}. {EXERCISES[n].title} | {EXERCISES[n].level} | "
              f"{sum(points for _, points, _ in tests_of(n)) or 'by report'} |\n" for n in numbers)]
    for n in numbers:
        exercise, tests = EXERCISES[n], list(tests_of(n))
        page = f"# Exercise {n}: {exercise.title}\n\nLevel: {exercise.level}."
        if exercise.functions:
            names = ", ".join("`{1}` in {0}".format(*function.split(":")) for function in exercise.functions)
            page += f" Points: {sum(points for _, points, _ in tests)}. To write: {names}."
        for file, name in (function.split(":") for function in exercise.shown_by):
            page += f" (`{name}` in {file} is blank in this copy too, since it would show how. You need not write it.)"
        page += "\n" + exercise.text + "\n"
        if tests:
            page += "\n**What the tests check**\n\n" + "".join(
                f"- {points} point{'s' * (points > 1)}: `{name}`{'. ' + text if text else ''}\n" for name, points, text in tests)
        pages.append(page)
    return "\n---\n\n".join(pages)


def write_copy(out, numbers):
    """Write a student copy with these exercises. Raises BadInput when there is something at `out` already."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {out}: there is something already; expected a name that is free, or an empty folder")
    if not out.resolve().parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.resolve().parent}")
    with tempfile.TemporaryDirectory(dir=out.resolve().parent) as folder:
        copy = Path(folder) / "copy"
        for pattern in COPIED:
            for path in filter(Path.is_file, ROOT.glob(pattern)):
                (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / path.relative_to(ROOT))
        for path in TESTS:
            (copy / path).write_text(exercise_tests((ROOT / path).read_text(encoding="utf-8")), encoding="utf-8")
        for n in numbers:
            for function in EXERCISES[n].functions + EXERCISES[n].shown_by:
                file, name = function.split(":")
                note = "" if function in EXERCISES[n].functions else " (not to be written)"
                source = (copy / file).read_text(encoding="utf-8")
                (copy / file).write_text(blank(source, name, f"exercise {n}: {EXERCISES[n].title}{note}"), encoding="utf-8")
        (copy / "HANDOUT.md").write_text(handout(numbers), encoding="utf-8")
        for path in copy.iterdir():                             # all is written by now, and has only to be renamed
            out.mkdir(exist_ok=True)
            path.rename(out / path.name)


def main():
    parser = Parser(description="Write a student copy of this repository.")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there yet, or is empty")
    parser.add_argument("--exercise", type=int, nargs="+", choices=list(EXERCISES), default=list(EXERCISES), metavar="N",
                        help="1 to 10 (default: all)")
    args = parser.parse_args()
    numbers = sorted(set(args.exercise))
    write_copy(args.out, numbers)
    print(f"wrote {args.out} with exercise{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: begin with HANDOUT.md there")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"assign.py: {error}", file=sys.stderr)
        sys.exit(2)
