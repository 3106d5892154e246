"""Functions that a notebook defines before the reader's eyes, taken out of its cells and held to their definitions."""

import ast
import collections
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHORTFORMER, shortformer_state
from transformer_lens.FactoredMatrix import FactoredMatrix

from helpers import circuits, models, prompts, stats
from helpers.shortformer import ShortformerModel

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
IMPORTED = dict(
    torch=torch, np=np, Counter=Counter, circuits=circuits, prompts=prompts, ShortformerModel=ShortformerModel,
    FactoredMatrix=FactoredMatrix, cfg=SimpleNamespace(device="cpu"),
)  # fmt: skip


def defined_in(notebook: str, function: str, **names):
    """A function of a notebook, with those that it calls and `names` around it."""
    (path,) = [p for p in NOTEBOOKS.glob(f"{notebook}_*.ipynb") if f"def {function}(" in p.read_text()]
    sources = [
        c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and "def " in c.source
    ]
    known = {
        node.name: node for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    called = {node.id for node in ast.walk(known[function]) if isinstance(node, ast.Name)} & known.keys()
    space = IMPORTED | names
    exec(compile(ast.Module([known[name] for name in {function, *called}], []), str(path), "exec"), space)
    return space[function]


L = 6
N = 2 * L + 1
INDUCTION = torch.nn.functional.one_hot(torch.where(torch.arange(N) > L, torch.arange(N) - (L - 1), 0), N).float()[
    None, None
]
TOKENS = torch.cat([torch.tensor([0]), torch.arange(1, L + 1), torch.arange(1, L + 1)])[None]


def test_stripe_share_is_detect_heads_measure():
    stripe_share = defined_in("02", "stripe_share")
    from transformer_lens import head_detector as theirs

    random = torch.rand(1, 4, N, N, generator=torch.Generator().manual_seed(0)).tril()
    random = random / random.sum(-1, keepdim=True)
    wanted = theirs.get_induction_head_detection_pattern(TOKENS)
    expected = [
        theirs.compute_head_attention_similarity_score(
            head, wanted, exclude_bos=False, exclude_current_token=False, error_measure="mul"
        )
        for head in random[0]
    ]
    torch.testing.assert_close(stripe_share(random, L)[0], torch.tensor(expected))
    assert stripe_share(INDUCTION, L).item() == pytest.approx(L / N)


def test_prefix_matching_sums_over_earlier_occurrences():
    followers, mean_on = defined_in("02", "followers"), defined_in("02", "mean_on")
    assert mean_on(INDUCTION, followers(TOKENS)).item() == 1
    tokens = torch.tensor([[0, 5, 6, 5, 7, 5]])
    pattern = torch.zeros(1, 1, 6, 6)
    pattern[0, 0, :, 0] = 1
    pattern[0, 0, 5] = torch.tensor([0, 0, 0.2, 0.1, 0.3, 0.4])
    # Queries 3 and 5 have earlier 5s; query 3 looks at BOS, query 5 gives 0.2 + 0.3 to their followers.
    assert mean_on(pattern, followers(tokens)).item() == pytest.approx(0.25)


def test_wins():
    wins = defined_in("05", "wins")
    rank = torch.tensor([[5, 0, 0, 3], [0, 4, 0, 2], [0, 0, 0, 1]])
    first, for_good = wins(rank)
    assert first.tolist() == [1, 0, 0, 3]
    assert for_good.tolist() == [1, 2, 0, 3]


def test_translator_recovers_an_affine_map():
    affine_map = defined_in("05", "affine_map")
    generator = torch.Generator().manual_seed(0)
    source, weight, offset = (torch.randn(shape, generator=generator) for shape in ((400, 8), (8, 8), (8,)))
    found = affine_map(source, source @ weight + offset, ridge=1e-9)
    torch.testing.assert_close(source @ found[:-1] + found[-1], source @ weight + offset, atol=1e-4, rtol=0)


def test_bigram_losses_are_counts_mixed_with_unigrams():
    bigram_losses = defined_in("05", "bigram_losses")
    seen, texts = torch.tensor([[0, 1, 2, 1, 3], [0, 1, 2, 2, 2]]), torch.tensor([[0, 1, 2, 3]])
    unigram = torch.tensor([0.0, 1, 4, 1, 0]) + 0.1  # what follows something other than BOS
    unigram = unigram / unigram.sum()
    expected = torch.stack([(2 + 2 * unigram[2]) / (3 + 2), (0 + 2 * unigram[3]) / (3 + 2)])
    torch.testing.assert_close(bigram_losses(seen, texts, 5, 2)[0], -expected.log())


def test_positional_patterns_are_the_models_own_when_tokens_contribute_nothing():
    positional_patterns = defined_in("08", "positional_patterns")
    tokens = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    state = shortformer_state(SHORTFORMER)
    state |= {key: torch.zeros_like(value) for key, value in state.items() if key.endswith("ln1.w")}
    silent = models.build_shortformer(SHORTFORMER, state, "silent")
    _, cache = silent.run_with_cache(tokens)
    patterns = positional_patterns(silent, tokens.shape[1])
    for layer in range(2):
        torch.testing.assert_close(cache["pattern", layer][0], patterns[layer], atol=1e-5, rtol=1e-4)


def test_keeping_directions_cuts_the_product_and_holds_the_rest_at_the_mean():
    keep_directions = defined_in("08", "keep_directions")
    generator = torch.Generator().manual_seed(0)
    left, right, x = (torch.randn(shape, generator=generator) for shape in ((30, 6), (6, 20), (3, 5, 4, 6)))
    U, S, Vh = torch.linalg.svd(left @ right, full_matrices=False)
    name, hook = keep_directions("hook_z", (1, 2), left, right, 2)
    assert name == "blocks.1.attn.hook_z"
    mean, changed = x[:, :, 2].mean((0, 1)), hook(x.clone(), None)
    expected = mean @ right + (x[:, :, 2] - mean) @ right @ Vh[:2].T @ Vh[:2]
    torch.testing.assert_close(changed[:, :, 2] @ right, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(changed[:, :, [0, 1, 3]], x[:, :, [0, 1, 3]])
    everything, nothing = (keep_directions("hook_z", (1, 2), left, right, k)[1](x.clone(), None) for k in (6, 0))
    torch.testing.assert_close(everything, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nothing[:, :, 2], mean.expand(3, 5, 6), atol=1e-5, rtol=1e-5)


def test_the_heuristic_gains_where_the_text_repeats_and_loses_where_it_does_not():
    induction_benefit = defined_in("07_causal", "induction_benefit")
    # After token 1 comes always the same token within a text, another in each text; after 2 never.
    texts = torch.tensor([[0, 1, a, 2, b, 1, a, 2, c, 1, a] for a, b, c in ((5, 6, 7), (8, 9, 10), (11, 12, 13))])
    benefit, count = induction_benefit(texts, d_vocab=20)
    assert benefit[1] > 0.3 and benefit[2] < 0
    assert count[1] == 9 and count[5] == 2


def test_induction_benefit_is_its_definition():
    induction_benefit = defined_in("07_causal", "induction_benefit")
    texts = torch.tensor([[0, 1, 2, 1, 2, 1, 3], [0, 1, 3, 2, 3, 1, 2]])
    benefit, _ = induction_benefit(texts, d_vocab=5, beta=1.5)
    pairs = [(a, b) for row in texts.tolist() for a, b in zip(row, row[1:])]
    gains = []
    for row in texts.tolist():
        for i, (a, b) in enumerate(zip(row, row[1:])):
            unigram = sum(pair[1] == b for pair in pairs) / len(pairs)
            p = (pairs.count((a, b)) - 1 + unigram) / sum(pair[0] == a for pair in pairs)
            earlier = [row[j + 1] == b for j in range(i) if row[j] == a]
            up, down = p * math.exp(1.5 * sum(earlier)), (1 - p) * math.exp(1.5 * (len(earlier) - sum(earlier)))
            gains.append((a, math.log(up / (up + down)) - math.log(p)))
    expected = np.mean([gain for a, gain in gains if a == 1])
    assert benefit[1] == pytest.approx(expected, abs=1e-4)


def test_heads_are_chosen_by_share_of_the_best():
    strong_heads = defined_in("07_causal", "strong_heads")
    assert strong_heads(torch.tensor([0.1, 0.8, 0.4, 0.39])) == (1, 2)


def test_same_token_share_counts_the_query_itself():
    same_token_share = defined_in("07_causal", "same_token_share")
    pattern = torch.tensor([[1.0, 0, 0], [0.3, 0.7, 0], [0.25, 0.25, 0.5]])[None, None]
    share = same_token_share(pattern, torch.tensor([[4, 5, 4]]))
    assert share.item() == pytest.approx((1 + 0.7 + 0.75) / 3)


def test_an_edge_table_holds_every_edge_once_strongest_first():
    edge_table = defined_in("06", "edge_table", stats=stats, pd=pd)
    edges = {((2, 1), "q"): torch.randn(12, 2, 3), ((2, 1), "k"): torch.randn(12, 2, 3) + 4}
    edges[(2, 1), "k"][:, 1, 2] += 1
    table = edge_table(edges)
    assert len(table) == 12 and table["effect_nats"].is_monotonic_decreasing
    assert table.loc[0, ["sender", "receiver", "through"]].tolist() == ["L1H2", "L2H1", "K"]
    assert table["effect_nats"][0] == pytest.approx(edges[(2, 1), "k"][:, 1, 2].mean().item(), abs=1e-5)


def test_random_circuits_have_as_many_heads_in_each_layer():
    like = defined_in("06", "like", collections=collections, n_heads=8)
    heads = [(0, 1), (0, 2), (3, 7)]
    for seed in range(5):
        drawn = like(heads, torch.Generator().manual_seed(seed))
        assert sorted(layer for layer, _ in drawn) == [0, 0, 3] and len({*drawn}) == 3
