"""The two-layer rewrite against definitions written out in loops, and the identities of scrubbing."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers import interventions, metrics, models, scrubbing
from helpers.prompts import Prompts
from helpers.scrubbing import (
    OTHER,
    RESAMPLED,
    SCRUBBED,
    UNSCRUBBED,
    WHOLE,
    Hypothesis,
    Input,
    Rule,
    TextPool,
    X,
)

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
    Hypothesis("0", EMBEDDING, EMBEDDING, Input(OTHER, SCRUBBED, (("previous", Rule(from_x=(1,))),))),
    Hypothesis("1", CURRENT, CURRENT, Input(OTHER, Rule(from_x=(1,)))),
    Hypothesis("2", CURRENT, RECENT, RECENT),
    Hypothesis("3", CURRENT, *2 * (Input(X, LAST_THREE, (("previous", WHOLE), ("same", WHOLE))),)),
    Hypothesis("4", CURRENT, SAME_AS_IDENTITY, RECENT),
    Hypothesis(
        "5", CURRENT, SAME_AS_IDENTITY, Input(X, LAST_THREE, (("previous", Rule("typical", from_x=(0, 1, 2))),))
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
    return Prompts(tokens)


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
        built = torch.stack([direct_residual(state, tokens, text, p, part, rows) for p in range(LENGTH)])
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
    return scrubbing.draw_rows(prompts.tokens[:, :-1], KINDS, torch.Generator().manual_seed(0))


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
    built = pool.residual(PARTS[name], rows, partial(pool.head_outputs, rows))
    direct = torch.stack(
        [
            torch.stack([direct_residual(state, tokens, t, p, PARTS[name], rows) for p in range(LENGTH)])
            for t in range(N_TEXTS)
        ]
    )
    assert (built - direct).abs().max() < 1e-5


@pytest.mark.parametrize("hypothesis", HYPOTHESES, ids=lambda h: h.name)
def test_losses_are_the_direct_ones(hypothesis, state, model, prompts):
    result = scrubbing.scrub(model, prompts, [hypothesis], *HEADS, KINDS, n_pairings=1)
    tokens = prompts.tokens[:, :-1]
    rows = scrubbing.draw_rows(tokens, KINDS, torch.Generator().manual_seed(0))
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
    effect = interventions.ablate_together(model, prompts.tokens, metrics.answer_loss(prompts), heads)[:, 0]
    assert (result.silent_loss - result.model_loss - effect).abs().max() < 1e-5


def test_x_for_x_prime_recovers_everything(model, prompts):
    twins = prompts.tokens[:1].expand(4, -1)
    result = scrubbing.scrub(model, Prompts(twins), HYPOTHESES, *HEADS, KINDS)
    assert (result.scrubbed_loss - result.model_loss).abs().max() < 1e-5
    assert (result.resampled_loss - result.model_loss).abs().max() < 1e-5


def test_the_fully_scrubbed_input_recovers_nothing_and_the_unscrubbed_one_everything(model, prompts):
    nothing = Hypothesis("nothing", RESAMPLED, RESAMPLED, RESAMPLED)
    everything = Hypothesis("everything", UNSCRUBBED, UNSCRUBBED, UNSCRUBBED)
    result = scrubbing.scrub(model, prompts, [nothing, everything], *HEADS)
    together = [i for i, (_, column) in enumerate(result.runs) if column == "all"]
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(
        result.recovered(from_silence=False)[:, together], ends.expand(N_TEXTS, 2), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(result.kept, ends[:, None].expand(2, 3).double(), atol=1e-6, rtol=0)


def test_offset_masks_sum_to_the_causal_mask(pool, rows):
    every_offset = Rule(X, OTHER, from_x=tuple(range(LENGTH)))
    rebuilt = pool.residual(Input(X, every_offset), rows, partial(pool.head_outputs, rows))
    assert (rebuilt - pool.on_x).abs().max() < 1e-5
    masks = sum(torch.ones(LENGTH, LENGTH).tril(-m).triu(-m) for m in range(LENGTH))
    assert torch.equal(masks, torch.ones(LENGTH, LENGTH).tril())


def test_a_text_is_never_its_own_other(prompts):
    tokens = prompts.tokens[:, :-1]
    for seed in range(20):
        rows = scrubbing.draw_rows(tokens, KINDS, torch.Generator().manual_seed(seed))
        assert (rows[OTHER] != rows[X]).all() and (rows["typical"] != rows[X]).all()
        assert sorted(rows[OTHER][:, 0].tolist()) == list(range(N_TEXTS))


def test_a_kind_is_drawn_from_a_text_of_the_same_kind_there_or_else_is_the_other_text():
    tokens = torch.tensor([[1, 5], [1, 6], [2, 7]])
    rows = scrubbing.draw_rows(tokens, {"itself": torch.arange(9)}, torch.Generator().manual_seed(0))
    assert rows["itself"][:2, 0].tolist() == [1, 0]
    assert torch.equal(rows["itself"][:, 1], rows[OTHER][:, 1]) and rows["itself"][2, 0] == rows[OTHER][2, 0]


def test_one_pool_or_several_make_no_difference_to_the_model_loss(model, prompts, monkeypatch):
    tokens = prompts.tokens.repeat(2, 1)
    one = scrubbing.scrub(model, Prompts(tokens), HYPOTHESES[:1], *HEADS)
    monkeypatch.setattr(scrubbing, "POOL_SIZE", 3)
    two = scrubbing.scrub(model, Prompts(tokens), HYPOTHESES[:1], *HEADS)
    assert torch.allclose(one.model_loss, two.model_loss, atol=1e-6)
    assert two.scrubbed_loss.shape == (3, 4, 2 * N_TEXTS)


def test_a_model_without_norms(prompts):
    state = random_state(norm=False)
    plain = models.build_shortformer({**CONFIG, "normalization_type": None}, state, "plain").eval()
    result = scrubbing.scrub(plain, prompts, HYPOTHESES[:1], *HEADS)
    everything = Hypothesis("all on x", UNSCRUBBED, Input(X, Rule(X, OTHER, tuple(range(LENGTH)))), UNSCRUBBED)
    rebuilt = scrubbing.scrub(plain, prompts, [everything], *HEADS)
    assert (rebuilt.scrubbed_loss - result.model_loss).abs().max() < 1e-5


# ---- shares, intervals, refusals ----


def test_recovered_is_a_share_of_what_silence_loses_or_resampling():
    losses = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # two pairings of two texts
    result = scrubbing.Scrubbed(
        [("h", "all")],
        torch.zeros(2),
        torch.full((2,), 4.0),
        torch.full((2, 2), 8.0),
        losses[:, None],
        torch.ones(1, 3),
    )
    assert result.recovered().flatten().tolist() == pytest.approx([0.5, 0.5])
    assert result.recovered(from_silence=False).flatten().tolist() == pytest.approx([0.75, 0.75])


def test_bad_input_is_refused_by_name(model, prompts):
    with pytest.raises(ValueError, match="1 text"):
        scrubbing.scrub(model, Prompts(prompts.tokens[:1]), HYPOTHESES, *HEADS)
    state = {key: weight for key, weight in random_state().items() if "blocks.1" not in key}
    one_layer = models.build_shortformer({**CONFIG, "n_layers": 1}, state, "one")
    assert scrubbing.why_not(model) == ""
    with pytest.raises(ValueError, match=r"one has 1 layer\(s\) and standard positions"):
        scrubbing.scrub(one_layer, prompts, HYPOTHESES, *HEADS)


def test_contexts_end_on_an_allowed_token_with_the_next_as_answer():
    texts = torch.arange(40).reshape(2, 20)
    allowed = torch.zeros(40, dtype=torch.bool)
    allowed[[3, 12, 15]] = True
    found = scrubbing.contexts(texts, allowed, length=6)
    assert len(found.tokens) == 1 and found.tokens.shape[1] == 7
    (row,) = found.tokens.tolist()
    assert row[0] == 0 and row[-2] in (12, 15) and row[1:] == list(range(row[1], row[-1] + 1))
    with pytest.raises(ValueError, match="none of 2"):
        scrubbing.contexts(texts, ~torch.ones(40, dtype=torch.bool), length=6)


# ---- the post's table, by an evaluator that knows neither rules nor rows ----


def table_of_the_post(state, tokens, answers, other, typical):
    """Share recovered for V, Q, K and all of hypotheses 0 to 5, from the formulas of the post alone."""
    state, n, last = {k: v.double() for k, v in state.items()}, tokens.shape[1], tokens.shape[1] - 1
    positions, (previous,), same = state["pos_embed.W_pos"][:n], ROLES["previous"], set(ROLES["same"])
    embedding = state["embed.W_E"][tokens]
    causal = torch.ones(n, n).tril().bool()

    def weight(layer, name, head):
        prefix = f"blocks.{layer}.attn."
        return state[f"{prefix}W_{name}"][head], state.get(f"{prefix}b_{name}", torch.zeros(N_HEADS, 1))[head]

    def through(x, layer, name, head):
        matrix, bias = weight(layer, name, head)
        return x @ matrix + bias

    normed = norm(embedding, state, "blocks.0.ln1")
    placed = normed + positions
    attends, writes = [], []
    for head in range(N_HEADS):
        scores = through(placed, 0, "Q", head) @ through(placed, 0, "K", head).mT / math.sqrt(D_HEAD)
        attends.append(scores.masked_fill(~causal, -torch.inf).softmax(-1))  # [text, query, key]
        writes.append(through(normed, 0, "V", head) @ state["blocks.0.attn.W_O"][head])  # what each token has to say
    bands = [torch.ones(n, n).tril(-back).triu(-back).double() for back in range(3)]

    def whole(head):
        return attends[head] @ writes[head]

    def mixed(head, backs, pattern=None, identity=False):
        """Pattern from x' (or the one given), values from x at some distances and from x' elsewhere."""
        pattern = attends[head][other] if pattern is None else pattern
        on_x = sum(bands[back] for back in backs)
        weights = torch.where(on_x.bool(), torch.eye(n).double(), torch.zeros(())) if identity else pattern * on_x
        return pattern @ writes[head][other] + weights @ (writes[head] - writes[head][other])

    def stream(of, heads):
        return of + state["blocks.0.attn.b_O"] + sum(heads)

    def on(of, backs, special=None):
        special = special or {}
        return stream(of, [special[h](h) if h in special else mixed(h, backs) if backs else whole(h)[other]
                           for h in range(N_HEADS)])  # fmt: skip

    x, elsewhere = embedding, embedding[other]
    like = torch.stack([attends[previous][typical[:, q], q] for q in range(n)], 1)
    known = dict.fromkeys({previous, *same}, whole)
    as_identity = dict.fromkeys(same, lambda h: mixed(h, (0,), identity=True))
    as_typical = {previous: lambda h: mixed(h, (0, 1, 2), like)}
    naive, average, last_three = on(x, ()), on(x, (0,)), on(x, (0, 1, 2))
    hypotheses = [
        (naive, naive, on(elsewhere, (), {previous: lambda h: mixed(h, (1,))})),
        (average, average, on(elsewhere, (1,))),
        (average, last_three, last_three),
        (average, on(x, (0, 1, 2), known), on(x, (0, 1, 2), known)),
        (average, on(x, (0, 1, 2), as_identity), last_three),
        (average, on(x, (0, 1, 2), as_identity), on(x, (0, 1, 2), as_typical)),
    ]
    itself = stream(x, [whole(h) for h in range(N_HEADS)])
    nothing = stream(elsewhere, [whole(h)[other] for h in range(N_HEADS)])

    def loss(v=itself, q=itself, k=itself):
        final = itself + state["blocks.1.attn.b_O"]
        for head in range(N_HEADS):
            sources = (v, q, k) if head in INDUCTION else (itself,) * 3
            value, query, key = (norm(source, state, "blocks.1.ln1") for source in sources)
            scores = through(query + positions, 1, "Q", head) @ through(key + positions, 1, "K", head).mT
            attention = (scores / math.sqrt(D_HEAD)).masked_fill(~causal, -torch.inf).softmax(-1)
            final = final + attention @ through(value, 1, "V", head) @ state["blocks.1.attn.W_O"][head]
        logits = norm(final, state, "ln_final")[:, last] @ state["unembed.W_U"]
        return F.cross_entropy(logits, answers).item()

    worst, best = loss(nothing, nothing, nothing), loss()
    runs = [run for v, q, k in hypotheses for run in ({"v": v}, {"q": q}, {"k": k}, {"v": v, "q": q, "k": k})]
    return torch.tensor([(worst - loss(**run)) / (worst - best) for run in runs])


def test_the_table_agrees_with_an_evaluator_written_from_the_post(state):
    exact = models.build_shortformer(CONFIG, state, "double").eval().requires_grad_(False).double()
    tokens = torch.randint(1, D_VOCAB, (40, 13), generator=torch.Generator().manual_seed(2))
    result = scrubbing.scrub(exact, Prompts(tokens), HYPOTHESES, *HEADS, KINDS, n_pairings=1)
    rows = scrubbing.draw_rows(tokens[:, :-1], KINDS, torch.Generator().manual_seed(0))
    expected = table_of_the_post(state, tokens[:, :-1], tokens[:, -1], rows[OTHER][:, 0], rows["typical"])
    assert (result.recovered(from_silence=False).mean(0) - expected).abs().max() < 3e-7
    assert expected.std() > 0.1  # the hypotheses differ
