"""The two-layer rewrite against definitions written out in loops, and the identities of scrubbing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import interventions, models, scrubbing, stats
from helpers.hypotheses import OTHER, RESAMPLED, SCRUBBED, UNSCRUBBED, WHOLE, Hypothesis, Input, Rule, X
from helpers.prompts import Prompts
from helpers.scrubbing import TextPool

N_HEADS, D_HEAD, D_MODEL, N_TEXTS, LENGTH, D_VOCAB = 4, 4, 16, 3, 5, 23
INDUCTION, ROLES = (1, 3), {"previous": (2,), "same": (0, 3)}
HEADS = INDUCTION, ROLES
KINDS = {"typical": torch.arange(D_VOCAB) % 2}
EMBEDDING, CURRENT = Input(X, SCRUBBED), Input(X, Rule(from_x=(0,)))
LAST_THREE = Rule(from_x=(0, 1, 2))
RECENT = Input(X, LAST_THREE)
SAME_AS_IDENTITY = Input(X, LAST_THREE, (("same", Rule(from_x=(0,), identity=True)),))
# The post's, which between them use everything that a rule can say.
HYPOTHESES = (
    Hypothesis("0", "", EMBEDDING, EMBEDDING, Input(OTHER, SCRUBBED, (("previous", Rule(from_x=(1,))),))),
    Hypothesis("2", "", CURRENT, RECENT, RECENT),
    Hypothesis("3", "", CURRENT, *2 * (Input(X, LAST_THREE, (("previous", WHOLE), ("same", WHOLE))),)),
    Hypothesis(
        "5", "", CURRENT, SAME_AS_IDENTITY, Input(X, LAST_THREE, (("previous", Rule("typical", from_x=(0, 1, 2))),))
    ),
)


def random_state(seed: int = 0, norm: bool = True) -> dict[str, torch.Tensor]:
    """Weights of a two-layer shortformer in the legacy layout, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.4):
        return scale * torch.randn(*shape, generator=generator)

    state = {
        "embed.W_E": normal(D_VOCAB, D_MODEL, scale=1.0), "pos_embed.W_pos": normal(32, D_MODEL, scale=1.0),
        "unembed.W_U": normal(D_MODEL, D_VOCAB),
    }  # fmt: skip
    for layer in range(2):
        prefix = f"blocks.{layer}.attn."
        for name in "QKV":
            state[prefix + f"W_{name}"] = normal(N_HEADS, D_MODEL, D_HEAD)
            state[prefix + f"b_{name}"] = normal(N_HEADS, D_HEAD)
        state[prefix + "W_O"] = normal(N_HEADS, D_HEAD, D_MODEL)
        state[prefix + "b_O"] = normal(D_MODEL)
    norms = ("blocks.0.ln1", "blocks.1.ln1", "ln_final") if norm else ()
    for name in norms:
        state |= {f"{name}.w": 1 + normal(D_MODEL), f"{name}.b": normal(D_MODEL)}
    return state


CONFIG = dict(d_model=D_MODEL, n_layers=2, n_heads=N_HEADS, d_head=D_HEAD, n_ctx=32, d_vocab=D_VOCAB)


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def model(state):
    return models.build_shortformer(CONFIG, state, "random").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    tokens = torch.randint(1, D_VOCAB, (N_TEXTS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    return Prompts(tokens, tokens[:, -1])


# ---- the definition, written out ----


def norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.w"] + state[f"{name}.b"]


def project(x, state, layer, head, name, positions=None):
    """Q, K or V of one head from a residual stream after the norm."""
    x = x if positions is None else x + positions
    return x @ state[f"blocks.{layer}.attn.W_{name}"][head] + state[f"blocks.{layer}.attn.b_{name}"][head]


def pattern_row(state, x_query, x_keys, layer, head, position):
    """Attention of one query over keys 0 .. position."""
    pos = state["pos_embed.W_pos"]
    q = project(x_query, state, layer, head, "Q", pos[position])
    k = project(x_keys[: position + 1], state, layer, head, "K", pos[: position + 1])
    return (k @ q / math.sqrt(D_HEAD)).softmax(-1)


def direct_residual(state, tokens, text, position, part, rows):
    """Residual stream before layer 1 of one text and position, one path term at a time."""
    embedding = state["embed.W_E"][tokens]
    normed = norm(embedding, state, "blocks.0.ln1")
    named = {head: rule for role, rule in part.roles for head in ROLES[role]}
    total = embedding[rows[part.embedding][text, position], position] + state["blocks.0.attn.b_O"]
    for head in range(N_HEADS):
        rule = named.get(head, part.rest)
        of = normed[rows[rule.pattern][text, position]]
        weights = pattern_row(state, of[position], of, 0, head, position)
        for key in range(position + 1):
            values = normed[rows[rule.values][text, position], key]
            value = weights[key] * project(values, state, 0, head, "V")
            if position - key in rule.from_x:
                weight = torch.ones(()) if rule.identity and key == position else weights[key]
                value = value + weight * (
                    project(normed[text, key], state, 0, head, "V") - project(values, state, 0, head, "V")
                )
            total = total + value @ state["blocks.0.attn.W_O"][head]
    return total


def direct_logits(state, tokens, text, rows, **parts):
    """Logits at the last position with the induction heads' inputs built as `parts` says."""
    last, pos = LENGTH - 1, state["pos_embed.W_pos"]

    def stream(kind, part):
        built = torch.stack([direct_residual(state, tokens, text, p, part, rows[kind]) for p in range(LENGTH)])
        return built, norm(built, state, "blocks.1.ln1")

    on_x = stream("v", UNSCRUBBED)
    built = {kind: stream(kind, part) for kind, part in parts.items()}
    final = on_x[0][last] + state["blocks.1.attn.b_O"]
    for head in range(N_HEADS):
        source = built if head in INDUCTION else {}
        q = project(source.get("q", on_x)[1][last], state, 1, head, "Q", pos[last])
        k = project(source.get("k", on_x)[1], state, 1, head, "K", pos[:LENGTH])
        v = project(source.get("v", on_x)[1], state, 1, head, "V")
        weights = (k @ q / math.sqrt(D_HEAD)).softmax(-1)
        final = final + weights @ v @ state["blocks.1.attn.W_O"][head]
    return norm(final, state, "ln_final") @ state["unembed.W_U"]


@pytest.fixture(scope="module")
def pool(model, prompts):
    with torch.inference_mode():
        return TextPool(model, prompts.tokens[:, :-1], *HEADS)


@pytest.fixture(scope="module")
def rows(prompts):
    return scrubbing.draw_rows(prompts.tokens[:, :-1], KINDS, True, torch.Generator().manual_seed(0))


PARTS = {
    f"{h.name}{kind}": getattr(h, kind) for h in HYPOTHESES for kind in "vqk"
} | {
    "unscrubbed": UNSCRUBBED,
    "resampled": RESAMPLED,
    "pattern from x, values from x'": Input(OTHER, Rule(X, OTHER)),
    "pattern from x', values from x": Input(OTHER, Rule(OTHER, X)),
    "pattern of a kind, values from x": Input(X, Rule("typical", X)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_every_path_term_is_the_direct_one(name, state, prompts, pool, rows):
    tokens = prompts.tokens[:, :-1]
    built = pool.residual(PARTS[name], rows["k"])
    direct = torch.stack(
        [
            torch.stack([direct_residual(state, tokens, t, p, PARTS[name], rows["k"]) for p in range(LENGTH)])
            for t in range(N_TEXTS)
        ]
    )
    assert (built - direct).abs().max() < 1e-5


@pytest.mark.parametrize("hypothesis", HYPOTHESES, ids=lambda h: h.name)
def test_losses_are_the_direct_ones(hypothesis, state, model, prompts):
    result = scrubbing.scrub(model, prompts, [hypothesis], *HEADS, KINDS, n_pairings=1, independent=True)
    tokens = prompts.tokens[:, :-1]
    rows = scrubbing.draw_rows(tokens, KINDS, True, torch.Generator().manual_seed(0))
    parts = {kind: getattr(hypothesis, kind) for kind in "vqk"}
    for cell, chosen in enumerate(({"v": parts["v"]}, {"q": parts["q"]}, {"k": parts["k"]}, parts)):
        logits = torch.stack([direct_logits(state, tokens, t, rows, **chosen) for t in range(N_TEXTS)])
        direct = F.cross_entropy(logits, prompts.answers, reduction="none")
        assert (result.scrubbed_loss[0, cell] - direct).abs().max() < 1e-5
    baseline = dict.fromkeys("vqk", RESAMPLED)
    logits = torch.stack([direct_logits(state, tokens, t, rows, **baseline) for t in range(N_TEXTS)])
    direct = F.cross_entropy(logits, prompts.answers, reduction="none")
    assert (result.resampled_loss[0] - direct).abs().max() < 1e-5


# ---- identities ----


def test_rewritten_graph_equals_the_model(model, prompts):
    result = scrubbing.scrub(model, prompts, HYPOTHESES[:1], *HEADS)
    logits = model(prompts.tokens)[:, -2]
    expected = F.cross_entropy(logits, prompts.answers, reduction="none")
    assert (result.model_loss - expected).abs().max() < 1e-5


def test_silence_is_zero_ablation(model, prompts):
    result = scrubbing.scrub(model, prompts, HYPOTHESES[:1], *HEADS)
    heads = [[(1, head) for head in INDUCTION]]
    effect = interventions.ablate_together(model, prompts.tokens, interventions.answer_loss(prompts), heads)[:, 0]
    assert (result.silent_loss - result.model_loss - effect).abs().max() < 1e-5


def test_x_for_x_prime_recovers_everything(model, prompts):
    twins = prompts.tokens[:1].expand(4, -1)
    result = scrubbing.scrub(model, Prompts(twins, twins[:, -1]), HYPOTHESES, *HEADS, KINDS)
    assert (result.scrubbed_loss - result.model_loss).abs().max() < 1e-5
    assert (result.resampled_loss - result.model_loss).abs().max() < 1e-5


def test_the_fully_scrubbed_input_recovers_nothing_and_the_unscrubbed_one_everything(model, prompts):
    nothing = Hypothesis("nothing", "", RESAMPLED, RESAMPLED, RESAMPLED)
    everything = Hypothesis("everything", "", UNSCRUBBED, UNSCRUBBED, UNSCRUBBED)
    result = scrubbing.scrub(model, prompts, [nothing, everything], *HEADS)
    draws = scrubbing.recovery_draws(result, n_resamples=20)
    together = [i for i, (_, column) in enumerate(result.runs) if column == "all"]
    assert np.allclose(draws[:, together], [0, 1], atol=1e-9)
    assert all(result.closeness["nothing", kind] == pytest.approx(0, abs=1e-6) for kind in "vqk")
    assert all(result.closeness["everything", kind] == pytest.approx(1, abs=1e-6) for kind in "vqk")


def test_offset_masks_sum_to_the_causal_mask(pool, rows):
    every_offset = Rule(X, OTHER, from_x=tuple(range(LENGTH)))
    rebuilt = pool.residual(Input(X, every_offset), rows["k"])
    assert (rebuilt - pool.on_x).abs().max() < 1e-5
    masks = sum(torch.ones(LENGTH, LENGTH).tril(-m).triu(-m) for m in range(LENGTH))
    assert torch.equal(masks, torch.ones(LENGTH, LENGTH).tril())


def test_a_text_is_never_its_own_other(prompts):
    tokens = prompts.tokens[:, :-1]
    for seed in range(20):
        rows = scrubbing.draw_rows(tokens, KINDS, False, torch.Generator().manual_seed(seed))["v"]
        assert (rows[OTHER] != rows[X]).all() and (rows["typical"] != rows[X]).all()
        assert sorted(rows[OTHER][:, 0].tolist()) == list(range(N_TEXTS))


def test_alike_draws_the_same_kind_where_there_is_one():
    kind = torch.tensor([[0, 1], [0, 2], [1, 3]])
    otherwise = torch.tensor([[2, 2], [2, 2], [0, 0]])
    rows = scrubbing.alike(kind, otherwise, torch.Generator().manual_seed(0))
    assert rows.tolist() == [[1, 2], [0, 2], [0, 0]]


def test_one_pool_or_several_make_no_difference_to_the_model_loss(model, prompts):
    one, two = (scrubbing.scrub(model, prompts, HYPOTHESES[:1], *HEADS, pool_size=n) for n in (64, 3))
    assert torch.allclose(one.model_loss, two.model_loss, atol=1e-6)
    assert two.scrubbed_loss.shape == (3, 4, N_TEXTS)


def test_a_model_without_norms(prompts):
    state = random_state(norm=False)
    plain = models.build_shortformer({**CONFIG, "normalization_type": None}, state, "plain").eval()
    result = scrubbing.scrub(plain, prompts, HYPOTHESES[:1], *HEADS)
    everything = Hypothesis("all on x", "", UNSCRUBBED, Input(X, Rule(X, OTHER, tuple(range(LENGTH)))), UNSCRUBBED)
    rebuilt = scrubbing.scrub(plain, prompts, [everything], *HEADS)
    assert (rebuilt.scrubbed_loss - result.model_loss).abs().max() < 1e-5


# ---- shares, intervals, refusals ----


def test_intervals_hold_the_estimate_and_see_the_pairings():
    losses = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    result = scrubbing.Scrubbed(
        [("h", "all")], torch.zeros(4), torch.full((4,), 3.0), torch.full((2, 4), 4.0), losses[:, None], {}
    )
    draws = scrubbing.recovery_draws(result)
    found = stats.estimate_of_draws(draws[:, 0], 4)
    assert (found["low"], found["mean"], found["high"]) == pytest.approx((0.25, 0.5, 0.75)) and found["n"] == 4
    assert scrubbing.recovery_draws(result, from_silence=True)[0, 0] == pytest.approx(1 / 3)


def test_bad_input_is_refused_by_name(model, prompts):
    with pytest.raises(ValueError, match="1 text"):
        scrubbing.scrub(model, Prompts(prompts.tokens[:1], prompts.answers[:1]), HYPOTHESES, *HEADS)
    with pytest.raises(ValueError, match="typical"):
        Rule(OTHER, "typical")
    one_layer = models.build_shortformer({**CONFIG, "n_layers": 1}, random_state(), "one")
    assert scrubbing.why_not(model) == ""
    with pytest.raises(ValueError, match=r"one has 1 layer\(s\)"):
        scrubbing.scrub(one_layer, prompts, HYPOTHESES, *HEADS)
