"""Identities of the logit lens and of direct logit attribution, on five architectures and on those with odd ends."""

import pytest
import torch
from conftest import ARCHITECTURES, SHORTFORMER, SIZES, shortformer_state
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution
from transformer_lens.tools.analysis.logit_lens import logit_lens

from helpers import lens, models

VOCAB, HEADS = SHORTFORMER["d_vocab"], SHORTFORMER["n_heads"]


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "shortformer-no-norm"])
def model(request, tiny):
    if request.param != "shortformer-no-norm":
        return tiny(request.param)
    config = SHORTFORMER | {"normalization_type": None}
    state = {key: value for key, value in shortformer_state(config).items() if "ln" not in key}
    return models.build_shortformer(config, state, "tiny-no-norm").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, VOCAB, (5, 12), generator=torch.Generator().manual_seed(3))


def logits_at(model, tokens, position=-2):
    with torch.inference_mode():
        return model(tokens)[:, position]


def read_answers(model, tokens, mid=False):
    """Log-probability and rank of each last token, where it is predicted: [stop, batch]."""
    found = lens.log_probs_and_ranks(model, lens.stream(model, tokens, -2, mid), tokens[:, -1:])
    return [values[..., 0] for values in found]


# ---- the lens ----


def test_last_stop_is_the_model(model, tokens):
    log_prob, rank = read_answers(model, tokens)
    log_probs = logits_at(model, tokens).log_softmax(-1)
    answer = log_probs.gather(1, tokens[:, -1:])
    assert list(lens.stops(model))[0] == "embedding" and len(rank) == model.cfg.n_layers + 1
    torch.testing.assert_close(log_prob[-1], answer[:, 0], atol=1e-5, rtol=0)
    assert torch.equal(rank[-1], (log_probs > answer).sum(1))


def test_every_stop_equals_explicit_algebra(model, tokens):
    at = lens.stream(model, tokens, mid=True)
    log_probs = (model.ln_final(at.flatten(0, 1)) @ model.W_U + model.b_U).log_softmax(-1).view(*at.shape[:3], -1)
    log_prob, rank = lens.log_probs_and_ranks(model, at, tokens)
    expected = log_probs.gather(-1, tokens.expand(at.shape[:3])[..., None])
    torch.testing.assert_close(log_prob, expected[..., 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(rank, (log_probs > expected).sum(-1))
    torch.testing.assert_close(log_probs[-1, :, 4], logits_at(model, tokens, 4).log_softmax(-1), atol=1e-5, rtol=1e-4)


def test_one_position_is_a_slice_of_all(model, tokens):
    everywhere, there = (lens.stream(model, tokens, position) for position in (None, 3))
    assert torch.equal(everywhere[:, :, 3:4], there)


def test_stops_between_attention_and_mlp_where_there_are_any(model, tokens):
    stops = lens.stops(model, mid=True)
    serial = not (model.cfg.attn_only or model.cfg.parallel_attn_mlp)
    assert len(stops) == model.cfg.n_layers * (1 + serial) + 1
    if serial:
        theirs = logit_lens(model, tokens, incl_mid=True, positions=-2, targets=tokens[:, -1], return_type="log_probs")
        log_prob, rank = read_answers(model, tokens, mid=True)
        torch.testing.assert_close(log_prob, theirs.values[..., 0], atol=1e-5, rtol=0)
        assert torch.equal(rank, theirs.rank_trajectory())


def test_attribution_unembeds_only_the_position_read(model, tokens):
    seen = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: seen.append(x.shape[1]))]):
        lens.stream(model, tokens)
        lens.attribute(model, tokens, tokens[:, -1], tokens[:, 1])
    assert set(seen) == {1}


def test_refuses_what_it_cannot_read(model, tokens):
    with pytest.raises(ValueError, match="position 12"):
        lens.stream(model, tokens, 12)
    with pytest.raises(ValueError, match="empty batch"):
        lens.stream(model, tokens[:0])
    with pytest.raises(ValueError, match=r"tokens of shape \(5, 3\)"):
        lens.log_probs_and_ranks(model, lens.stream(model, tokens, -2), tokens[:, :3])


# ---- direct logit attribution ----


def attributed(model, tokens):
    return lens.attribute(model, tokens, tokens[:, -1], against=tokens[:, 1])


def test_parts_sum_to_the_difference_of_two_logits(model, tokens):
    result, logits = attributed(model, tokens), logits_at(model, tokens)
    difference = (logits.gather(1, tokens[:, -1:]) - logits.gather(1, tokens[:, 1:2]))[:, 0]
    torch.testing.assert_close(result.logit, difference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.total(), difference, rtol=1e-4, atol=1e-4)
    assert result.heads.shape == (5, model.cfg.n_layers, HEADS) and result.mlps.shape == (5, model.cfg.n_layers)


def test_the_embedding_is_what_is_left_of_a_model_whose_layers_are_silent(model, tokens):
    zero = [(f"blocks.{i}.{name}", lambda x, hook: 0 * x) for i in range(model.cfg.n_layers) for name in WRITES]
    with model.hooks(fwd_hooks=[(name, hook) for name, hook in zero if name in model.hook_dict]):
        result = attributed(model, tokens)
    assert not result.heads.any() and not result.mlps.any()
    torch.testing.assert_close(result.embedding + result.biases, result.logit, rtol=1e-4, atol=1e-4)


WRITES = ("attn.hook_z", "hook_mlp_out")


def test_agrees_with_transformer_lens_where_that_is_defined(model, tokens):
    if not model.compatibility_mode:
        pytest.skip("TransformerLens attributes only models in compatibility mode")
    ours = attributed(model, tokens)
    answers = torch.stack([tokens[:, -1], tokens[:, 1]], -1)

    def theirs(name, unit):
        right, wrong = (direct_logit_attribution(model, tokens, ids, unit=unit, pos=-2) for ids in answers.T)
        return (right.attribution - wrong.attribution)[[i for i, label in enumerate(right.labels) if name in label]]

    torch.testing.assert_close(ours.mlps.T, theirs("_mlp_out", "component"), atol=1e-4, rtol=1e-4)
    # Its heads are read before Gemma's norm after attention, so there they are another quantity.
    by_head = theirs("H", "head").T.reshape(ours.heads.shape)
    assert torch.allclose(ours.heads, by_head, atol=1e-4) == (not hasattr(model.blocks[0], "ln1_post"))


def odd_end(tmp_path, config):
    """A tiny random model that does something to its logits after the unembedding."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
    model.save_pretrained(tmp_path)
    return models.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name, extra", [
    ("Cohere", {"logit_scale": 0.3}),
    ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
])  # fmt: skip
def test_scaled_logits_and_layers_are_split_exactly(tmp_path, tokens, name, extra):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, num_key_value_heads=2, **extra)
    model = odd_end(tmp_path, config)
    result = attributed(model, tokens)
    torch.testing.assert_close(result.total(), result.logit, rtol=1e-4, atol=1e-4)
    log_prob, _ = read_answers(model, tokens)
    expected = logits_at(model, tokens).log_softmax(-1).gather(1, tokens[:, -1:])[:, 0]
    torch.testing.assert_close(log_prob[-1], expected, atol=1e-5, rtol=0)


def test_capped_logits_are_read_by_the_lens_and_refused_by_attribution_for_every_batch(tmp_path, tokens):
    from transformers import Gemma2Config

    # So high a cap that no sum would be seen to fail.
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5000.0)
    model = odd_end(tmp_path, config)
    with pytest.raises(ValueError, match="caps its logits"):
        attributed(model, tokens)
    log_prob, _ = read_answers(model, tokens)
    expected = logits_at(model, tokens).log_softmax(-1).gather(1, tokens[:, -1:])[:, 0]
    torch.testing.assert_close(log_prob[-1], expected, atol=1e-5, rtol=0)


def test_refuses_logits_that_are_no_sum_of_parts(model, tokens):
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: 5 * torch.tanh(x / 5))]):
        with pytest.raises(ValueError, match="does not sum"):
            attributed(model, tokens)
