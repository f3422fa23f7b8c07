"""The tests of the exercises tell wrong from right: each of these wrong solutions loses points in its
exercise, and right solutions that look otherwise lose none.

A wrong solution is the reference's function with one piece of its source replaced. Each function belongs to
one exercise, and grading takes right code for all others: so a wrong one can lose points nowhere else."""

import ast
import functools
import importlib
import inspect
import textwrap
from collections import Counter

import pytest
from conftest import ROOT

import assign

# exercise, function, a piece of its source, what stands there instead, a test that fails with it
WRONG = [
    # 1. rotary embedding
    (1, "model.py:rotate", "a * cos - b * sin", "a * cos + b * sin",
     "test_rope_turns_pairs_and_keeps_lengths"),
    (1, "model.py:rotate", "x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])",
     "test_rope_turns_pairs_and_keeps_lengths"),
    (1, "model.py:rotary_frequencies", "dtype=torch.float64", "dtype=torch.float32", "test_rope_frequencies"),
    (1, "model.py:rotary_frequencies", "-pairs / config.head_dim", "-pairs / (2 * config.head_dim)",
     "test_rope_frequencies"),
    (1, "model.py:rotary_frequencies", "blend.clamp(0, 1)", "blend", "test_rope_frequencies"),
    (1, "model.py:rotary_frequencies", "blend * frequency + (1 - blend)", "(1 - blend) * frequency + blend",
     "test_rope_frequencies"),

    # 2. attention
    (2, "trie_cache.py:TrieCache.attend", "(q, keys, values, attn_mask=mask, enable_gqa=True)",
     "(q, keys.repeat(1, q.shape[1] // keys.shape[1], 1, 1), "
     "values.repeat(1, q.shape[1] // keys.shape[1], 1, 1), attn_mask=mask)",
     "test_a_token_that_sees_one_slot_gets_its_value"),
    (2, "trie_cache.py:TrieCache.attend", "(q, keys, values, attn_mask=mask, enable_gqa=True)",
     "(q, keys.repeat(1, q.shape[1] // keys.shape[1], 1, 1), "
     "values.repeat(1, q.shape[1] // keys.shape[1], 1, 1), attn_mask=mask)",
     "test_attention_looks_at_visible_slots_only_by_softmax_of_scaled_products"),
    (2, "trie_cache.py:TrieCache.attend", "enable_gqa=True)", "enable_gqa=True, scale=1.0)",
     "test_attention_looks_at_visible_slots_only_by_softmax_of_scaled_products"),
    (2, "trie_cache.py:TrieCache.attend", "arena[:, :, slots] = torch.cat((k, v))",
     "arena[0][:, slots] = k[0]", "test_a_token_that_sees_one_slot_gets_its_value"),
    (2, "trie_cache.py:TrieCache.attend", "self.arena[layer]", "self.arena[0 * layer - 1]",
     "test_a_token_that_sees_one_slot_gets_its_value"),
    (2, "trie_cache.py:TrieCache.attend", "attn_mask=mask, ", "is_causal=True, ",
     "test_attention_looks_at_visible_slots_only_by_softmax_of_scaled_products"),

    # 3. the trie
    (3, "trie_cache.py:TrieCache.prune", "assert not self.waiting", "return\n    assert not self.waiting",
     "test_slots_are_given_back_and_used_again"),
    (3, "trie_cache.py:TrieCache.prune", "assert not self.waiting", "return\n    assert not self.waiting",
     "test_random_trees"),
    (3, "trie_cache.py:TrieCache.prune", "heapq.heappush(self.free, node.slot)", "pass",
     "test_slots_are_given_back_and_used_again"),
    (3, "trie_cache.py:TrieCache.prune", "unwanted += node.children.values()", "pass",
     "test_slots_are_given_back_and_used_again"),
    (3, "trie_cache.py:TrieCache.prune", "node.slot = None", "pass",
     "test_slots_are_given_back_and_used_again"),
    (3, "trie_cache.py:TrieCache.prune", "del node.parent.children[node.token]", "pass", "test_random_trees"),
    (3, "trie_cache.py:TrieCache.take_slot", "heapq.heappop(self.free)", "self.free.pop()",
     "test_the_lowest_free_slot_is_taken_first"),
    (3, "trie_cache.py:TrieCache.take_slot", "self.hidden = F.pad(self.hidden, (0, 0, 0, self.used))",
     "self.hidden = self.hidden.new_zeros(2 * self.used, self.hidden.shape[1])",
     "test_the_tensors_double_and_keep_what_is_in_them"),
    (3, "trie_cache.py:TrieCache.mask", "row[above.slot] = True", "row[:above.slot + 1] = True",
     "test_new_nodes_wait_to_be_computed_and_see_their_path_only"),
    (3, "trie_cache.py:TrieCache.mask", "self.paths[node] = row",
     "self.paths[node] = row\n        row[node.slot] = False",
     "test_new_nodes_wait_to_be_computed_and_see_their_path_only"),
    (3, "trie_cache.py:TrieCache.mask", "while above not in self.paths:", "if above.parent in self.paths:\n"
     "            row[above.slot] = True\n            above = self.root\n"
     "        while above not in self.paths:",
     "test_new_nodes_wait_to_be_computed_and_see_their_path_only"),
    (3, "trie_cache.py:TrieCache.insert", "node.depth - (len(self.waiting) - before)",
     "len(tokens) - (len(self.waiting) - before)", "test_a_prefix_has_one_node_and_each_node_one_slot"),
    (3, "trie_cache.py:TrieCache.insert", "child = node.children.get(token)", "child = None",
     "test_a_prefix_has_one_node_and_each_node_one_slot"),
    (3, "trie_cache.py:TrieCache.insert", "self.waiting.append(child)", "self.waiting.insert(0, child)",
     "test_new_nodes_wait_to_be_computed_and_see_their_path_only"),

    # 4. candidates
    (4, "search.py:nucleus", "values.cumsum(0) - values < limit", "values.cumsum(0) - values <= limit",
     "test_a_nucleus_ends_when_its_mass_reaches_top_p"),
    (4, "search.py:nucleus", "values.cumsum(0) - values < limit", "values.cumsum(0) <= limit",
     "test_a_nucleus_ends_when_its_mass_reaches_top_p"),
    (4, "search.py:nucleus", "limit = top_p if top_p < 1 else math.inf", "limit = top_p",
     "test_with_top_p_1_a_nucleus_is_all_that_is_possible"),
    (4, "search.py:nucleus", "& (p > 0)", "", "test_with_top_p_1_a_nucleus_is_all_that_is_possible"),
    (4, "search.py:nucleus", "values, order = p[tokens].sort(descending=True, stable=True)",
     "tokens = tokens.flip(0); values, order = p[tokens].sort(descending=True, stable=True)",
     "test_a_nucleus_is_the_smallest_set_of_most_likely_tokens"),
    (4, "search.py:nucleus", "threshold = top[-1] if k < len(p) else 0.0",
     "return p.topk(k).indices[top.cumsum(0) - top < limit]\n    threshold = 0",
     "test_a_nucleus_is_the_smallest_set_of_most_likely_tokens"),
    (4, "search.py:candidates", "probabilities(logits, temperature)", "probabilities(logits, 1.0)",
     "test_the_temperature_shapes_the_nucleus"),
    (4, "search.py:candidates", "seen = logits[i].masked_fill(unseen, -math.inf)",
     "seen = p.masked_fill(unseen, -math.inf)", "test_candidates_of_an_unseen_nucleus"),
    (4, "search.py:candidates", "torch.full_like(inside, fallback, dtype=torch.bool)",
     "torch.zeros_like(inside, dtype=torch.bool)", "test_candidates_of_an_unseen_nucleus"),
    (4, "search.py:candidates", "if seen[inside] == -math.inf:", "if False:",
     "test_candidates_of_an_unseen_nucleus"),
    (4, "search.py:candidates", "inside[~unseen[inside]]", "inside[unseen[inside]]",
     "test_candidates_of_an_unseen_nucleus"),

    # 5. partial supervision
    (5, "mrm.py:partial_supervision_loss", "tokens), rewards)", "tokens), rewards, reduction='sum')",
     "test_loss_equals_the_naive_one"),
    (5, "mrm.py:partial_supervision_loss", "F.mse_loss", "F.l1_loss", "test_loss_equals_the_naive_one"),
    (5, "mrm.py:MRM.child_rewards", "self.gain.to(wide) * ", "", "test_loss_equals_the_naive_one"),
    (5, "mrm.py:MRM.child_rewards", ".sum(-1) + self.bias[tokens]", ".sum(-1)",
     "test_the_bias_of_an_unseen_token_does_not_learn"),
    (5, "mrm.py:MRM.child_rewards", "(hidden.to(wide) * unembedding).sum(-1)",
     "(hidden.to(wide) @ unembedding.T).diagonal()", "test_loss_computes_one_entry_for_each_position"),
    (5, "mrm.py:MRM.child_rewards", "(hidden.to(wide) * unembedding).sum(-1)",
     "(hidden[:, None] * self.llama.lm_head.weight).sum(-1)[torch.arange(len(tokens)), tokens]",
     "test_loss_computes_one_entry_for_each_position"),
    (5, "mrm.py:MRM.child_rewards", "return self.gain",
     "return self.next_rewards(hidden)[range(len(tokens)), tokens]\n    return self.gain",
     "test_loss_computes_one_entry_for_each_position"),
    (5, "data/corpus.py:Batch.supervised", "self.columns - 1]", "self.columns]",
     "test_the_state_before_a_token_goes_with_the_reward_after_it"),
    (5, "data/corpus.py:Batch.supervised", "self.tokens[self.rows, self.columns]",
     "self.tokens[self.rows, self.columns - 1]",
     "test_the_state_before_a_token_goes_with_the_reward_after_it"),
    (5, "data/corpus.py:collate", "(i, start + j, target)", "(i, start + j - 1, target)",
     "test_a_batch_has_each_reply_token_with_its_reward"),
    (5, "data/corpus.py:collate", "enumerate(e.targets)", "enumerate(e.targets[1:])",
     "test_a_batch_has_each_reply_token_with_its_reward"),
    (5, "data/corpus.py:collate", "tokens[i, :start + len(e.reply)]",
     "tokens[i, length - start - len(e.reply):]", "test_a_batch_has_each_reply_token_with_its_reward"),
    (5, "data/corpus.py:collate", "start + position - 1", "start + position",
     "test_siblings_go_with_the_token_before_them"),
    (5, "data/corpus.py:collate", "prefixes.setdefault((i, position)", "prefixes.setdefault(position",
     "test_siblings_go_with_the_token_before_them"),
    (5, "data/corpus.py:collate", "prefixes.setdefault((i, position), len(prefixes))",
     "len(prefixes) - (list(prefixes.values())[-1:] == [position])\n            prefixes[prefix] = position",
     "test_siblings_go_with_the_token_before_them"),
    (5, "data/corpus.py:collate", "prefixes.setdefault((i, position), len(prefixes))",
     "len(prefixes) - (list(prefixes.values())[-1:] == [(i, position)])\n"
     "            prefixes[prefix] = i, position", "test_siblings_go_with_the_token_before_them"),
    (5, "data/corpus.py:collate", "prefixes.setdefault((i, position)",
     "prefixes.setdefault((*e.context, *e.reply[:position])", "test_siblings_go_with_the_token_before_them"),
    (5, "data/corpus.py:collate", "torch.zeros(len(examples), length, dtype=torch.long)",
     "torch.full((len(examples), length), 7)", "test_a_batch_has_each_reply_token_with_its_reward"),

    # 6. what M knows
    (6, "mrm.py:unseen_tokens", "< min_count", "<= min_count",
     "test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies"),
    (6, "mrm.py:unseen_tokens", "unseen[list(config.eos_token_ids)] = False", "pass",
     "test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies"),
    (6, "mrm.py:unseen_tokens", "unseen[list(config.eos_token_ids)]", "unseen[config.eos_token_ids[0]]",
     "test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies"),
    (6, "mrm.py:unseen_tokens", "for reply in replies for token in reply]",
     "for i in range(len(replies)) for token in replies[i]]",
     "test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies"),
    (6, "mrm.py:unseen_tokens", "for token in reply]", "for token in set(reply)]",
     "test_unseen_tokens_are_those_that_stand_too_seldom_in_the_replies"),
    (6, "mrm.py:MRM.conservative_rewards", "-math.inf", "-1e9",
     "test_conservative_rewards_forbid_unseen_tokens_only"),
    (6, "mrm.py:MRM.conservative_rewards", "masked_fill(self.unseen", "masked_fill(~self.unseen",
     "test_conservative_rewards_forbid_unseen_tokens_only"),
    (6, "mrm.py:MRM.conservative_rewards", ".masked_fill(self.unseen, -math.inf)",
     " - self.unseen * math.inf", "test_conservative_rewards_forbid_unseen_tokens_only"),

    # 7. the step
    (7, "search.py:saffron", "log_probability, fallback)", "log_probability)",
     "test_the_search_tells_its_fallbacks"),
    (7, "search.py:saffron", "log_probability, fallback)", "log_probability, fallback or s.fallback)",
     "test_the_search_tells_its_fallbacks"),
    (7, "search.py:saffron", "reward_model.child_rewards(answer.mrm_hidden[rows], tokens)",
     "reward_model.next_rewards(answer.mrm_hidden)[rows, tokens]", "test_a_branch_tells_its_reward"),
    (7, "search.py:saffron", "reward_model.child_rewards(answer.mrm_hidden[rows], tokens)",
     "(reward_model.gain * (answer.mrm_hidden @ reward_model.llama.lm_head.weight.T) + reward_model.bias)"
     "[rows, tokens]", "test_a_branch_tells_its_reward"),
    (7, "search.py:saffron", "options.top_p, options.temperature)", "options.top_p, 1.0)",
     "test_equal_rewards_stand_in_frontier_order_then_the_policys"),
    (7, "search.py:saffron", "Ask(policy=growing, reward=growing if multifurcation else [])\n"
     "        logits = next_logits(policy, answer.policy_hidden, ",
     "Ask(policy=growing + finished, reward=growing + finished if multifurcation else [])\n"
     "        logits = next_logits(policy, answer.policy_hidden[:len(growing)], ",
     "test_finished_sequences_are_not_asked_about_and_stand_before_others_that_are_equal"),
    (7, "search.py:saffron", "answer.mrm_hidden[rows]", "answer.mrm_hidden[rows * 0]",
     "test_a_branch_tells_its_reward"),
    (7, "search.py:saffron", "length, options.min_new_tokens)", "length, 0)",
     "test_finished_replies_stay_first_and_the_best_wins"),
    (7, "search.py:saffron", "answer = yield Ask(policy=growing, reward=growing if multifurcation else [])",
     "answer = yield Ask(policy=growing)\n        states = (yield Ask(reward=growing)).mrm_hidden\n"
     "        answer.mrm_hidden = states", "test_policy_and_mrm_are_asked_together"),
    (7, "search.py:saffron", "if not growing:", "if len(finished) == options.width + 1:",
     "test_finished_replies_stay_first_and_the_best_wins"),
    (7, "search.py:saffron", "return frontier[0]", "return max(frontier, key=lambda branch: branch.reward)",
     "test_finished_replies_stay_first_and_the_best_wins"),
    (7, "search.py:best", "width - len(finished)", "width",
     "test_a_fallback_fills_no_place_of_a_finished_one"),
    (7, "search.py:best", "width - len(finished)", "width - sum(not b.fallback for b in finished)",
     "test_a_fallback_fills_no_place_of_a_finished_one"),
    (7, "search.py:best", "return not branch.finished, rank(branch)",
     "return not branch.finished, rank(branch) if branch in kept else (False, -branch.reward)",
     "test_a_fallback_fills_no_place_of_a_finished_one"),
    (7, "search.py:best", "islice(fresh, width)", "islice(fresh, max(0, width - len(finished)))",
     "test_finished_sequences_are_not_asked_about_and_stand_before_others_that_are_equal"),
    (7, "search.py:best", "sorted(finished + kept", "sorted(kept + finished",
     "test_finished_sequences_are_not_asked_about_and_stand_before_others_that_are_equal"),
    (7, "search.py:best", "return not branch.finished, rank(branch)",
     "return not branch.finished, (branch.fallback, -branch.reward) if branch.finished else rank(branch)",
     "test_beta_ranks_by_the_probability_of_the_whole_reply_too"),
    (7, "search.py:best", "if not beta or", "if not beta or branch.finished or",
     "test_what_repeats_itself_fills_no_place"),
    (7, "search.py:best", "or not repeats_its_end(branch.tokens))", "or not repeats_its_end(branch.tokens)\n"
     "             or all(repeats_its_end(c.tokens) for c in children if c.parent is branch.parent))",
     "test_what_repeats_itself_fills_no_place"),
    (7, "search.py:saffron", "options.width, options.beta)", "options.width, options.beta * multifurcation)",
     "test_beta_ranks_by_the_probability_of_the_whole_reply_too"),
    (7, "search.py:best", "return branch.fallback, -(", "return -(",
     "test_a_fallback_takes_no_place_of_a_regular_candidate"),
    (7, "search.py:best", "return not branch.finished, rank(branch)", "return rank(branch)",
     "test_finished_replies_stay_first_and_the_best_wins"),
    (7, "search.py:best", "sorted(children, key=rank)",
     "sorted(children[::-1], key=rank)", "test_equal_rewards_stand_in_frontier_order_then_the_policys"),
    (7, "search.py:best", "beta * branch.log_prob", "0 * branch.log_prob",
     "test_beta_ranks_by_the_probability_of_the_whole_reply_too"),
    (7, "search.py:saffron", "s.log_prob + log_probability", "log_probability",
     "test_beta_ranks_by_the_probability_of_the_whole_reply_too"),
    (7, "search.py:saffron", "logits[rows, tokens] - logits.logsumexp(-1)[rows]",
     "(logits / options.temperature).log_softmax(-1)[rows, tokens]",
     "test_a_branch_tells_reward_and_probability_apart"),

    # 8. rebase
    (8, "baselines.py:rebase", "probabilities(logits, options.temperature)", "probabilities(logits, 1.0)",
     "test_rebase_draws_at_the_temperature_that_it_is_given"),
    (8, "baselines.py:rebase", "options.width - len(finished)", "options.width",
     "test_rebase_shares_its_expansions_by_reward"),
    (8, "baselines.py:rebase", "if count]", "]", "test_rebase_shares_its_expansions_by_reward"),
    (8, "baselines.py:rebase", "max(finished or growing", "max(finished + growing",
     "test_rebase_prefers_a_finished_reply_to_any_other"),
    (8, "baselines.py:rebase", "manual_seed(options.seed)", "manual_seed(0)",
     "test_another_seed_makes_rebase_draw_others"),
    (8, "baselines.py:rebase", "drawn = draw_tokens(p, options.top_p, count, generator)",
     "drawn = nucleus(p, options.top_p)[:count].tolist()", "test_another_seed_makes_rebase_draw_others"),
    (8, "baselines.py:rebase", "drawn = draw_tokens(p, options.top_p, count, generator)",
     "drawn = [draw_tokens(p, options.top_p, 1, generator)[0] for _ in range(count)]",
     "test_rebase_shares_its_expansions_by_reward"),
    (8, "baselines.py:rebase", "trace.append(finished + growing)", "trace.append(growing + finished)",
     "test_rebase_shares_its_expansions_by_reward"),
    (8, "baselines.py:shares", "(torch.tensor(rewards, dtype=torch.float64) / REBASE_TEMPERATURE)",
     "(torch.tensor(rewards, dtype=torch.float64) * REBASE_TEMPERATURE)",
     "test_shares_are_whole_and_in_proportion"),
    (8, "baselines.py:shares", "exact.floor()", "exact.round()", "test_shares_are_whole_and_in_proportion"),
    (8, "baselines.py:shares", "(exact - whole).argsort", "exact.argsort",
     "test_shares_are_whole_and_in_proportion"),

    # 11. the dilemma
    (11, "results/dilemma.py:predicted_cost", "1 + (steps - 1) * width", "steps * width",
     "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_cost", "policy_context + asked - 1", "policy_context + asked",
     "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_cost", "Cost(asked, candidates * asked,", "Cost(asked, width * asked,",
     "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_cost", "Cost(width * steps, width,",
     "Cost(width * steps, width * steps,", "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_cost", "Cost(asked, asked, policy_tokens, reward_context + asked - 1)",
     "Cost(asked, asked, reward_context + asked - 1, policy_tokens)",
     "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "llama.config.linear_params + lora",
     "llama.config.linear_params", "test_flops_are_as_predicted"),
    (11, "results/dilemma.py:predicted_cost", "Cost(asked, candidates * asked,", "Cost(asked, 511 * asked,",
     "test_calls_and_tokens_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "(llama.config.linear_params + lora) * tokens",
     "(policy.config.linear_params + lora) * tokens", "test_flops_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "in llama.named_parameters()",
     "in reward_llama.named_parameters()", "test_flops_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "policy.config.vocab_size", "reward_llama.config.vocab_size",
     "test_flops_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "policy.config.hidden_size", "reward_llama.config.hidden_size",
     "test_flops_are_as_predicted"),
    (11, "results/dilemma.py:predicted_flops", "cost.policy_calls *", "cost.policy_tokens *",
     "test_flops_are_as_predicted"),
]

# Right solutions that are written otherwise: exercise, function, its source.
OTHERWISE = [
    (1, "model.py:rotate", """
def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)
"""),
    (2, "trie_cache.py:TrieCache.attend", """
def attend(self, layer, q, k, v, slots, mask):
    self.arena[layer, 0][:, slots] = k[0]
    self.arena[layer, 1][:, slots] = v[0]
    heads = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        keys, values = self.arena[layer][:, shared, :mask.shape[1]]
        heads.append((q[0, head] @ keys.T / q.shape[-1] ** 0.5 + mask).softmax(-1) @ values)
    return torch.stack(heads)[None]
"""),
    (3, "trie_cache.py:TrieCache.mask", """
def mask(self, nodes):
    paths = []
    for node in nodes:
        slots = []
        while node.parent is not None:
            slots.append(node.slot)
            node = node.parent
        paths.append(slots)
    rows = self.hidden.new_full((len(nodes), 1 + max(map(max, paths))), -torch.inf)
    for row, slots in zip(rows, paths):
        row[slots] = 0
    return rows
"""),
    (3, "trie_cache.py:TrieCache.prune", """
def prune(self, nodes):
    wanted = set()
    for node in nodes:
        while node is not None:
            wanted.add(node)
            node = node.parent

    def forget(node):
        for token, child in list(node.children.items()):
            forget(child)
            if child not in wanted:
                heapq.heappush(self.free, child.slot)
                child.slot = None
                del node.children[token]
    forget(self.root)
"""),
    (4, "search.py:nucleus", """
def nucleus(p, top_p):
    values, tokens = p.sort(descending=True, stable=True)
    if top_p == 1:
        return tokens[values > 0]
    before = torch.cat((values.new_zeros(1), values.cumsum(0)[:-1]))
    return tokens[(before < top_p) & (values > 0)]
"""),
    (5, "mrm.py:MRM.child_rewards", """
def child_rewards(self, hidden, tokens):
    return self.gain * torch.einsum("nd,nd->n", hidden, self.llama.lm_head.weight[tokens]) + self.bias[tokens]
"""),
    (5, "mrm.py:partial_supervision_loss", """
def partial_supervision_loss(mrm, hidden, tokens, rewards):
    return ((rewards - mrm.child_rewards(hidden, tokens)) ** 2).mean()
"""),
    (5, "data/corpus.py:collate", """
def collate(examples, device):
    length = max(len(e.context) + len(e.reply) for e in examples)
    lines, rows, columns, targets = [], [], [], []
    others = [[], [], [], [], []]
    known = []
    for i, e in enumerate(examples):
        line = e.context + e.reply
        lines.append(line + [0] * (length - len(line)))
        for j in range(len(e.reply)):
            rows.append(i)
            columns.append(len(e.context) + j)
            targets.append(e.targets[j])
        for p, a, r in e.siblings:
            if (i, p) not in known:
                known.append((i, p))
            for column, value in zip(others, (i, len(e.context) + p - 1, a, r, known.index((i, p)))):
                column.append(value)
    ints = [torch.tensor(values, dtype=torch.long, device=device) for values in (
        lines, rows, columns, others[0], others[1], others[2], others[4])]
    targets, rewards = torch.tensor(targets, device=device), torch.tensor(others[3], device=device)
    return Batch(*ints[:3], targets, *ints[3:6], rewards, ints[6])
"""),
    (6, "mrm.py:unseen_tokens", """
def unseen_tokens(replies, config, min_count=1):
    count = [0] * config.vocab_size
    for reply in replies:
        for token in reply:
            count[token] += 1
    return torch.tensor([count[a] < min_count and a not in config.eos_token_ids
                         for a in range(config.vocab_size)])
"""),
    (6, "mrm.py:MRM.conservative_rewards", """
def conservative_rewards(self, hidden):
    rewards = self.next_rewards(hidden).clone()
    rewards[..., self.unseen] = float("-inf")
    return rewards
"""),
    (7, "search.py:best", """
def best(finished, children, width, beta):
    score = lambda branch: branch.reward + (beta * branch.log_prob if beta else 0)
    pool = [c for c in children if not beta or not repeats_its_end(c.tokens)] or children
    regular = sorted([c for c in pool if not c.fallback], key=score, reverse=True)[:width]
    fallbacks = sorted([c for c in pool if c.fallback], key=score, reverse=True)
    frontier = finished + regular + fallbacks[:max(0, width - len(finished) - len(regular))]
    groups = [[], [], [], []]
    for branch in frontier:
        groups[2 * (not branch.finished) + branch.fallback].append(branch)
    return [b for group in groups for b in sorted(group, key=score, reverse=True)][:width]
"""),
    (8, "baselines.py:shares", """
def shares(rewards, count):
    weights = [math.exp((r - max(rewards)) / REBASE_TEMPERATURE) for r in rewards]
    exact = [count * w / sum(weights) for w in weights]
    counts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[:count - sum(counts)]:
        counts[i] += 1
    return counts
"""),
    (11, "results/dilemma.py:predicted_cost", """
def predicted_cost(method, width, steps, candidates, context):
    policy_calls, reward_calls, policy_tokens, reward_tokens = 0, 0, context[0], context[1]
    for step in range(steps):
        before = 1 if step == 0 else width
        policy_calls += width if method == "best_of_n" else before
        policy_tokens += width if step else 0
        reward_calls += {"saffron": before, "beam": before * candidates, "rebase": width}.get(method, 0)
        reward_tokens += {"saffron": width if step else 0, "beam": before * candidates}.get(method, width)
    reward_calls += width if method == "best_of_n" else 0
    return Cost(policy_calls, reward_calls, policy_tokens, reward_tokens)
"""),
]


def the_function(name):
    """The reference's function of "file.py:Class.function", below its decorators."""
    file, path = name.split(":")
    thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in path.split("."):
        thing = getattr(thing, part)
    return inspect.unwrap(thing)


@functools.cache
def source_of(name):
    """Its source, from `def` on."""
    file, path = name.split(":")
    text = (ROOT / file).read_text(encoding="utf-8")
    node = assign.find(ast.parse(text), path)
    return textwrap.dedent("\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]))


def code_of(name, source):
    """What the function of that name does if this is its source."""
    made = {}
    exec(compile(source, f"a solution of {name}", "exec"), dict(the_function(name).__globals__), made)
    return next(iter(made.values())).__code__


class Solutions:
    """A plugin of pytest. It runs tests once for each solution, with that in the place of the reference's
    function, whoever has imported it, and notes how they went: [{test: [outcome of each case]}]."""

    def __init__(self, solutions):
        self.solutions = solutions              # (function, source, tests) of each
        self.outcomes = [{} for _ in solutions]
        self.turn = {}                          # of each test to be run: which solution it is of

    def pytest_collection_modifyitems(self, items):
        cases = list(items)
        items.clear()
        for i, (_, _, tests) in enumerate(self.solutions):
            for case in cases:
                if case.originalname in tests:
                    again = pytest.Function.from_parent(
                        case.parent, name=case.name, originalname=case.originalname, callobj=case.obj,
                        callspec=getattr(case, "callspec", None), fixtureinfo=case._fixtureinfo)
                    self.turn[again] = i
                    items.append(again)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """A solution that has failed a test is not tried on other cases of it."""
        function, source, _ = self.solutions[self.turn[item]]
        mine = self.outcomes[self.turn[item]].setdefault(item.originalname, [])
        if "failed" in mine:
            pytest.skip("it has failed already")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(the_function(function), "__code__", code_of(function, source))
            try:
                result = yield
            except BaseException:
                mine.append("failed")
                raise
            mine.append("passed")
            return result


def outcomes_of(solutions):
    """How these did, in one run of pytest inside this one."""
    plugin = Solutions(solutions)
    files = sorted({file_of(test) for _, _, tests in solutions for test in tests})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        options = ["-q", "--slow", "--tb=no", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        pytest.main([*files, *options], plugins=[plugin])
    return plugin.outcomes


@functools.cache
def file_of(test):
    return next(path for path in assign.TESTS
                if f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"))


@functools.cache
def names_of(n):
    """All tests of an exercise, those of a bonus too."""
    return {name for bonus in (False, True) for name, _, _ in assign.tests_of(n, bonus)}


@pytest.fixture(scope="module")
def outcomes():
    """Of each wrong solution: how it did in the test that finds it."""
    return outcomes_of([(function, source_of(function).replace(old, new), [test])
                        for _, function, old, new, test in WRONG])


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[f"{n}-{function.split(':')[1]}-{i}"
                                                       for i, (n, function, *_) in enumerate(WRONG)])
def test_a_wrong_solution_loses_points(outcomes, i):
    n, function, old, new, test = WRONG[i]
    assert test in names_of(n) and source_of(function).count(old) == 1, "it is replaced once"
    assert "failed" in outcomes[i][test], f"{new} in place of {old}"


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({n for n, *_ in OTHERWISE}))
def test_right_solutions_lose_none(n):
    mine = [(function, source.strip(), names_of(n)) for m, function, source in OTHERWISE if m == n]
    for (function, *_), outcomes in zip(mine, outcomes_of(mine)):
        assert outcomes.keys() == names_of(n)
        for test, cases in outcomes.items():
            assert set(cases) == {"passed"}, (function, test)


def test_each_function_belongs_to_one_exercise_and_has_wrong_solutions():
    """So a wrong solution loses points nowhere else: an exercise is graded with right code of all others."""
    functions = [function for exercise in assign.EXERCISES.values() for function in exercise.functions]
    assert max(Counter(functions).values()) == 1
    assert {function for _, function, *_ in WRONG} == set(functions)
    for n, function, *_ in WRONG + OTHERWISE:
        assert function in assign.EXERCISES[n].functions
