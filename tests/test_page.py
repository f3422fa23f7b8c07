"""
The page that `sample.py --html` writes, in a real browser: what is drawn is what the search did, it can be
explored by mouse and by keyboard, it asks nobody for anything, and no text of a user or a model
becomes markup.
"""

import copy
import re

import pytest
import torch

from plumbing import page
from browser import browser                     # noqa: F401: a fixture
from conftest import paper, run_script
from plumbing.tokenizer import Prompt
from search import Branch
from engine import Result, Stats
from baselines import no_defence
from search import saffron

HOSTILE = ('</style><script>document.title = "taken"</script>'
           '<img src="http://127.0.0.1/x" onerror="taken()">&amp;\\u003c')


def prefixes(frontiers):
    """All beginnings of all replies, but the empty one."""
    return {tuple(b.tokens[:n]) for frontier in frontiers for b in frontier
            for n in range(1, len(b.tokens) + 1)}


@pytest.fixture(scope="module")
def searched(smollm2, mrm):
    """The prompt, and (name, Result, Rounds) of two searches on it."""
    prompt = smollm2.tokenizer.prompt("How do I open a lock?", "Sure")
    options, results = paper(width=4, max_new_tokens=10, min_new_tokens=4), []
    for name, search, reward_model in (("none", no_defence, None), ("saffron", saffron, mrm)):
        watch = page.Recorder()
        results.append((name, search(smollm2, reward_model, prompt, options, watch), watch.rounds))
    return prompt, results


@pytest.fixture(scope="module")
def trees(searched, smollm2, mrm):
    prompt, results = searched
    return [{"name": name, "title": name, "verdict": "", **page.tree(result, rounds, prompt, smollm2, mrm)}
            for name, result, rounds in results]


@pytest.fixture(scope="module")
def written(trees, smollm2, mrm, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tree.html"
    page.write_page(path, trees, "How do I open a lock?", "Sure", smollm2, mrm)
    return path


def paths(tree):
    """The prefix of each node."""
    found = [()]
    for parent, token in zip(tree["parent"][1:], tree["token"][1:]):
        found.append((*found[parent], token))
    return found


def test_a_tree_is_the_trace(searched, trees):
    for (_, result, rounds), tree in zip(searched[1], trees):
        nodes = paths(tree)
        assert len(nodes) == len(set(nodes)) and set(nodes[1:]) == prefixes(result.trace)
        assert nodes[tree["reply"]] == tuple(result.tokens)
        for node, first, last in zip(nodes[1:], tree["first"][1:], tree["last"][1:]):
            steps = [t for t, frontier in enumerate(result.trace, 1) if node in prefixes([frontier])]
            assert (first, last) == (steps[0], steps[-1])


def test_a_slot_is_given_back_when_no_later_frontier_needs_it(searched, trees):
    """It is by the search itself, one step after the frontier that left its branch behind was found."""
    _, result, _ = searched[1][1]
    nodes, tree = paths(trees[1]), trees[1]
    finished = {tuple(b.tokens) for frontier in result.trace for b in frontier if b.finished}
    growing = [prefixes([[b for b in frontier if not b.finished]]) for frontier in result.trace]
    assert sum(step is not None for step in tree["given_back"]) > 5
    for node, given_back in zip(nodes[1:], tree["given_back"][1:]):
        needed = [t for t, frontier in enumerate(growing, 1) if node in frontier]
        expected = needed[-1] + 2 if needed and needed[-1] + 2 <= len(result.trace) else None
        assert given_back == (None if node in finished else expected)


def test_costs_are_those_of_the_search(searched, trees):
    for (_, result, rounds), tree in zip(searched[1], trees):
        assert tree["costs"][0] == [0, 0] and len(tree["costs"]) == len(result.trace) + 1
        assert tree["costs"][-1] == [result.stats.tokens_computed, result.stats.tokens_cached]
        assert tree["costs"] == sorted(tree["costs"])


def test_numbers_are_the_models_own(searched, trees, smollm2, mrm):
    """Reward, probability and favourites, against a plain forward pass over each prefix."""
    prompt, _ = searched
    for tree in trees:
        nodes = paths(tree)
        for i in range(1, len(nodes), 7):
            *before, token = nodes[i]
            with torch.no_grad():
                read = lambda llama, context: llama(torch.tensor([context + before]))[0, -1]
                p = smollm2.logits(read(smollm2, prompt.policy_tokens(smollm2.template))).softmax(-1)
                m = mrm.next_rewards(read(mrm.llama, prompt.reward_tokens(mrm.template)))
            parent = tree["parent"][i]
            assert tree["p"][i] == pytest.approx(p[token].item(), abs=2e-3)
            assert tree["reward"][i] == pytest.approx(m[token].item(), abs=2e-2)
            assert ([a for a, _ in tree["policy"][parent]][0] == p.argmax()
                    and [a for a, _ in tree["mrm"][parent]][0] == m.argmax())
            assert [x for _, x in tree["mrm"][parent]] == pytest.approx(m.topk(5).values.tolist(), abs=2e-2)


def test_the_page_draws_each_node_and_steps_through_time(browser, written, searched, trees):
    browser.open(written)
    count = lambda which, classes: browser.js(
        f"document.querySelectorAll('svg[role=tree]')[{which}].querySelectorAll('{classes}').length")
    for which, (_, result, _) in enumerate(searched[1]):
        assert count(which, ".node:not(.later)") == len(prefixes(result.trace)) + 1
        assert count(which, ".edge") == len(prefixes(result.trace))
        assert count(which, ".node.reply") == len(result.tokens) + 1
        for step in range(1, 11):
            browser.js(f"slider.value = {step}; slider.dispatchEvent(new Event('input'))")
            assert count(which, ".node:not(.later)") == len(prefixes(result.trace[:step])) + 1
            assert (count(which, ".node:not(.later):not(.pruned)")
                    == len(prefixes([result.trace[step - 1]])) + 1)
            assert (count(which, ".node.given-back")
                    == sum((at or 99) <= step for at in trees[which]["given_back"]))
        browser.js("slider.value = slider.max; slider.dispatchEvent(new Event('input'))")
        said = browser.js(f"document.querySelectorAll('section')[{which}].textContent").replace(",", "")
        assert (f"{result.stats.tokens_computed} tokens computed" in said
                and f"{result.stats.tokens_cached} served" in said)
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_at_a_node_shows_what_it_is(browser, written, trees, smollm2, mrm, width):
    browser.open(written, width=width)
    tree = trees[1]
    # One of whose five the search may not select all, near the left edge.
    node = next(i for i in range(1, len(tree["mrm"]))
                if 0 < sum(bool(mrm.unseen[a]) for a, _ in tree["mrm"][i]) < 5)
    x, y = browser.js("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                      "(document.querySelectorAll('svg[role=tree]')[1]"
                      f".querySelector('[data-node=\"{node}\"] circle').getBoundingClientRect())")
    browser.point_at(x, y)
    said = browser.js("document.getElementById('detail').innerText")
    # one is only on the way to another:
    assert browser.js("document.getElementById('detail').ariaLive") == "off"
    assert "[Sure]" + smollm2.tokenizer.decode(paths(tree)[node]) in said
    assert f"MRM reward {tree['reward'][node]:+.2f}".replace("-", "−") in said
    columns = [browser.js(f"Array.from(document.querySelectorAll('#detail ol')[{i}].children, "
                          "li => [li.textContent, li.className])")
               for i in (0, 1)]
    for column, pairs in zip(columns, (tree["policy"][node], tree["mrm"][node])):
        assert [name == "unseen" for _, name in column] == [bool(mrm.unseen[a]) for a, _ in pairs]
        assert all(smollm2.tokenizer.decode([a]).strip() in text for (text, _), (a, _) in zip(column, pairs))
    assert browser.complaints() == []


def test_the_keyboard_alone_is_enough(browser, written, searched):
    browser.open(written)
    active = lambda what: browser.js(f"document.activeElement.{what}")
    for _ in range(3):
        browser.press("Tab")
        if active("id") == "step":
            break
    browser.press("ArrowLeft")
    assert active("value") == str(len(searched[1][1][1].trace) - 1)
    while active("dataset.node") is None or browser.js("shown.tree.name") != "saffron":
        browser.press("Tab")
        assert active("tagName") != "BODY", "no node of the tree can be reached by Tab"
    assert active("dataset.node") == "0"
    for key, says in (("ArrowRight", "token 1"), ("ArrowRight", "token 2"), ("ArrowDown", "token 2"),
                      ("ArrowLeft", "token 1"), ("End", "token 9"), ("Home", "start")):
        browser.press(key)
        assert browser.js("document.querySelector('#detail h3').textContent") == f"saffron, {says}"
        assert browser.js("document.getElementById('detail').ariaLive") == "polite"  # a screen reader says so
        assert active("tabIndex") == 0 and active("getAttribute('aria-label')")


def test_of_many_trees_two_are_chosen(browser, trees, smollm2, mrm, tmp_path):
    """none and saffron at first; each place has a choice of all."""
    page.write_page(tmp_path / "three.html",
                    [trees[0], trees[1] | {"name": "other", "title": "other"}, trees[1]],
                    "", "", smollm2, mrm)
    browser.open(tmp_path / "three.html")
    chosen = "Array.from(document.querySelectorAll('select'), s => s.selectedOptions[0].textContent)"
    assert browser.js(chosen) == ["none", "saffron"]
    browser.js("s = document.querySelectorAll('select')[0]; s.value = 1; "
               "s.dispatchEvent(new Event('change'))")
    assert (browser.js(chosen) == ["other", "saffron"]
            and browser.js("drawn.map(tree => tree.name)") == ["other", "saffron"])
    browser.js("s = document.querySelectorAll('select')[0]; s.value = 2; "
               "s.dispatchEvent(new Event('change'))")
    assert browser.js(chosen) == ["saffron", "other"]               # they change places
    browser.js("slider.value = 0; slider.dispatchEvent(new Event('input'))")
    assert browser.js("document.querySelectorAll('.node:not(.later)').length") == 2
    assert browser.complaints() == []


def test_dark_mode(browser, written):
    colours = []
    for dark in (False, True):
        browser.open(written, dark=dark)
        colours.append(browser.js("[getComputedStyle(document.body).backgroundColor, "
                                  "getComputedStyle(document.body).color]"))
    brightness = lambda rgb: sum(map(int, re.findall(r"\d+", rgb)))
    (light_back, light_text), (dark_back, dark_text) = colours
    assert brightness(light_back) > brightness(light_text) and brightness(dark_back) < brightness(dark_text)


def reply_of(tokens):
    """A Result that says these tokens, as if a search had found them."""
    branch, trace = Branch(), []
    for token in tokens:
        branch = Branch(branch.tokens + [token], 0.0, False, branch)
        trace.append([branch])
    return Result(tokens, "", 0.0, False, Stats(), trace)


def test_no_text_becomes_markup(browser, smollm2, mrm, tmp_path):
    result = reply_of(smollm2.tokenizer.encode(HOSTILE))
    prompt = smollm2.tokenizer.prompt(HOSTILE, HOSTILE)
    tree = page.tree(result, [], prompt, smollm2, mrm)
    page.write_page(tmp_path / "hostile.html",
                    [{"name": HOSTILE, "title": HOSTILE, "verdict": HOSTILE, **tree}],
                    HOSTILE, HOSTILE, smollm2, mrm)
    browser.open(tmp_path / "hostile.html")
    browser.js("tree = data.trees[0]; show(tree, tree.nodes[tree.reply])")
    assert browser.js("document.getElementById('prompt').textContent") == HOSTILE
    assert browser.js("document.querySelector('#detail p').textContent") == f"[{HOSTILE}]{HOSTILE}"
    assert browser.js("document.title") == "A search for a safe reply"
    assert browser.js("[document.querySelectorAll('script').length, "
                      "document.querySelectorAll('style').length, document.images.length]") == [2, 1, 0]
    assert browser.complaints() == []
    text = (tmp_path / "hostile.html").read_text()
    assert text.count("<script") == 2 and text.count("</style>") == 1 and "<img" not in text


def test_a_reward_that_is_not_finite_is_left_out(smollm2, mrm):
    result = reply_of([5, 6])
    result.trace[0][0].reward = float("inf")
    assert (page.tree(result, [], smollm2.tokenizer.prompt("Hello"), smollm2, mrm)["found"]
            == [None, None, 0.0])


def test_a_tree_is_read_in_pieces_as_in_one(searched, trees, smollm2, mrm, monkeypatch):
    monkeypatch.setattr(page, "ROWS", 5)
    _, result, rounds = searched[1][1]
    again = page.tree(result, rounds, searched[0], smollm2, mrm)
    assert (again["reward"] == pytest.approx(trees[1]["reward"], abs=2e-2)
            and again["p"] == pytest.approx(trees[1]["p"], abs=2e-3))


@pytest.mark.slow
def test_a_page_of_width_16_and_128_tokens_is_small(tiny_policy, tiny_mrm, smollm2, golden_search, tmp_path,
                                                    browser):
    """Half of what it may be, since a larger vocabulary has longer numbers."""
    policy = copy.copy(tiny_policy)
    policy.tokenizer = smollm2.tokenizer    # the tiny models have none: their ids are read as its first 512
    prompt = Prompt([1, 2, 3])
    watch = page.Recorder()
    result = saffron(policy, tiny_mrm, prompt, paper(width=16, max_new_tokens=128, min_new_tokens=128), watch)
    tree = page.tree(result, watch.rounds, prompt, policy, tiny_mrm)
    assert len(tree["parent"]) > 1500
    path = tmp_path / "tree.html"
    page.write_page(path, [{"name": "saffron", "title": "", "verdict": "", **tree}] * 2,
                    "", "", policy, tiny_mrm)
    assert path.stat().st_size < 1_000_000
    browser.open(path)
    assert (browser.js("document.querySelectorAll('svg[role=tree]')[0].querySelectorAll('.node').length")
            == len(tree["parent"]))


@pytest.mark.slow
def test_the_command_writes_it(browser, smollm2_folder, tmp_path):
    path = tmp_path / "tree.html"
    status, out, err = run_script("sample.py", "--html", path, "--max_new_tokens", 3, "--width", 2)
    assert status == 0 and str(path) in err and "--- saffron, width 2" in out
    browser.open(path)
    assert (browser.js("Array.from(document.querySelectorAll('h2'), h => h.textContent)")
            == ["none", "saffron, width 2"])
    assert browser.js("document.getElementById('prompt').textContent") in out
    assert browser.complaints() == [] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options, said", [
    (["no-such-folder/tree.html"], "in a folder that is there"), (["."], "name of a file"),
    (["plumbing/page.html"], "not the template page.html"),
    (["tree.html", "--prompt", "FILE:README.md"], "one prompt")])
def test_bad_names_are_refused_before_the_search(options, said):
    before = (page.TEMPLATE).read_bytes()
    status, out, err = run_script("sample.py", "--html", *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert (page.TEMPLATE).read_bytes() == before
