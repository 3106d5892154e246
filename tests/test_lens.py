"""Identities of the logit lens and of direct logit attribution, on five architectures."""

import pytest
import torch
from conftest import ARCHITECTURES, SHORTFORMER, shortformer_state
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution
from transformer_lens.tools.analysis.logit_lens import logit_lens

from helpers import lens, models
from helpers.prompts import Prompts

VOCAB, HEADS = SHORTFORMER["d_vocab"], SHORTFORMER["n_heads"]


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "shortformer-no-norm"])
def model(request, tiny):
    if request.param != "shortformer-no-norm":
        return tiny(request.param)
    config = SHORTFORMER | {"normalization_type": None}
    state = {key: value for key, value in shortformer_state(config).items() if "ln" not in key}
    return models.build_shortformer(config, state, "tiny-no-norm").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    tokens = torch.randint(1, VOCAB, (5, 12), generator=torch.Generator().manual_seed(3))
    return Prompts(tokens, tokens[:, -1])


def logits_at(model, tokens, position=-2):
    with torch.inference_mode():
        return model(tokens)[:, position]


# ---- the lens ----


def test_last_stop_is_the_model(model, prompts):
    predicted = lens.predict_answers(model, prompts, chunk=2)
    log_probs = logits_at(model, prompts.tokens).log_softmax(-1)
    answer = log_probs.gather(1, prompts.answers[:, None])
    assert list(lens.stops(model))[0] == "embedding" and len(predicted.rank) == model.cfg.n_layers + 1
    torch.testing.assert_close(predicted.log_prob[-1], answer[:, 0], atol=1e-5, rtol=0)
    assert torch.equal(predicted.rank[-1], (log_probs > answer).sum(1))


def test_every_stop_equals_explicit_algebra(model, prompts):
    at = lens.stream(model, prompts.tokens, mid=True)
    probs = (model.ln_final(at.flatten(0, 1)) @ model.W_U + model.b_U).softmax(-1).view(*at.shape[:3], -1)
    ids, top = lens.top_tokens(model, at, k=3)
    torch.testing.assert_close(top, probs.topk(3).values, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(probs.gather(-1, ids), top, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(probs[-1, :, 4], logits_at(model, prompts.tokens, 4).softmax(-1), atol=1e-6, rtol=1e-4)


def test_one_position_is_a_slice_of_all(model, prompts):
    everywhere, there = (lens.stream(model, prompts.tokens, position) for position in (None, 3))
    assert torch.equal(everywhere[:, :, 3:4], there)


def test_stops_between_attention_and_mlp_where_there_are_any(model, prompts):
    stops = lens.stops(model, mid=True)
    serial = not (model.cfg.attn_only or model.cfg.parallel_attn_mlp)
    assert len(stops) == model.cfg.n_layers * (1 + serial) + 1
    if serial:
        theirs = logit_lens(
            model, prompts.tokens, incl_mid=True, positions=-2, targets=prompts.answers, return_type="log_probs"
        )
        ours = lens.predict_answers(model, prompts, mid=True)
        torch.testing.assert_close(ours.log_prob, theirs.values[..., 0], atol=1e-5, rtol=0)
        assert torch.equal(ours.rank, theirs.rank_trajectory())


def test_unembedding_sees_only_the_position_read(model, prompts):
    seen = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: seen.append(x.shape[1]))]):
        lens.predict_answers(model, prompts)
        lens.attribute(model, prompts.tokens, prompts.answers)
    assert set(seen) == {1}


def test_refuses_what_it_cannot_read(model, prompts):
    with pytest.raises(ValueError, match="position 12"):
        lens.stream(model, prompts.tokens, 12)
    with pytest.raises(ValueError, match="empty batch"):
        lens.stream(model, prompts.tokens[:0])
    with pytest.raises(ValueError, match=r"tokens of shape \(5, 3\)"):
        lens.predict_tokens(model, lens.stream(model, prompts.tokens, -2), prompts.tokens[:, :3])


# ---- direct logit attribution ----


def test_parts_sum_to_the_logit(model, prompts):
    result = lens.attribute(model, prompts.tokens, prompts.answers)
    logit = logits_at(model, prompts.tokens).gather(1, prompts.answers[:, None])[:, 0]
    torch.testing.assert_close(result.logit, logit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(result.written.values()), logit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(result.by_group().values()), logit, rtol=1e-4, atol=1e-5)


def test_heads_are_the_parts_of_their_name(model, prompts):
    result = lens.attribute(model, prompts.tokens, prompts.answers)
    assert result.heads.shape == (5, model.cfg.n_layers, HEADS)
    assert torch.equal(result.written["L1H2"], result.heads[:, 1, 2])


def test_against_is_the_difference_of_two_attributions(model, prompts):
    other = prompts.tokens[:, 1]
    difference = lens.attribute(model, prompts.tokens, prompts.answers, against=other)
    each = [lens.attribute(model, prompts.tokens, answers).written for answers in (prompts.answers, other)]
    for name, values in difference.written.items():
        torch.testing.assert_close(values, each[0][name] - each[1][name], atol=1e-4, rtol=1e-4)


def test_agrees_with_transformer_lens_where_that_is_defined(model, prompts):
    if not model.compatibility_mode:
        pytest.skip("TransformerLens attributes only models in compatibility mode")
    ours = lens.attribute(model, prompts.tokens, prompts.answers)
    by_component = direct_logit_attribution(model, prompts.tokens, prompts.answers, pos=-2)
    mlp = by_component.attribution[by_component.labels.index("1_mlp_out")]
    torch.testing.assert_close(ours.written["L1 MLP"], mlp, atol=1e-4, rtol=1e-4)
    by_head = direct_logit_attribution(model, prompts.tokens, prompts.answers, unit="head", pos=-2)
    theirs = by_head.attribution[:-1].T.reshape(ours.heads.shape)
    # Its heads are read before Gemma's norm after attention, so there they are another quantity.
    assert torch.allclose(ours.heads, theirs, atol=1e-4) == (not hasattr(model.blocks[0], "ln1_post"))


def test_refuses_logits_that_are_no_sum_of_parts(model, prompts):
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: 5 * torch.tanh(x / 5))]):
        with pytest.raises(ValueError, match="does not sum"):
            lens.attribute(model, prompts.tokens, prompts.answers)
