"""Weight circuits against dense computations and against the model's own activations."""

import pytest
import torch
from conftest import ARCHITECTURES

from helpers import circuits


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("shortformer")


@pytest.fixture(scope="module")
def weights(model):
    return circuits.head_weights(model)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))


# ---- folding ----


def test_folded_weights_give_the_models_own_queries_and_values(model, weights, tokens):
    _, cache = model.run_with_cache(tokens)
    vectors = circuits.token_vectors(model, tokens.flatten(), after_block_0=False).view(*tokens.shape, -1)
    values = torch.einsum("bpd,hdk->bphk", vectors, weights.W_V[0])
    bias = model.blocks[0].ln1.bias
    torch.testing.assert_close(cache["blocks.0.attn.hook_v"] - torch.einsum("d,hdk->hk", bias, model.W_V[0]), values)
    positions = model.W_pos[: tokens.shape[1]] + bias
    queries = torch.einsum("bpd,hdk->bphk", vectors, weights.W_Q[0])
    queries = queries + torch.einsum("pd,hdk->phk", positions, model.W_Q[0]) + model.b_Q[0]
    torch.testing.assert_close(cache["blocks.0.attn.hook_q"], queries, atol=1e-4, rtol=1e-4)


def test_folded_unembedding_gives_the_models_own_probabilities(model, weights, tokens):
    logits, cache = model.run_with_cache(tokens)
    resid = cache["blocks.1.hook_resid_post"]
    centred = resid - resid.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    folded = scaled @ weights.W_U + model.ln_final.bias @ model.W_U
    torch.testing.assert_close(logits.log_softmax(-1), folded.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_gemma_gains_around_attention_are_folded(tiny, tokens):
    gemma = tiny("gemma3")
    weights = circuits.head_weights(gemma)
    _, cache = gemma.run_with_cache(tokens)
    normalised = cache["blocks.1.ln1.hook_normalized"]
    queries = torch.einsum("bpd,hdk->bhpk", normalised, weights.W_Q[1])
    ratio = cache["blocks.1.attn.hook_q_normed"] / queries
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    written = torch.einsum("bphk,hkd->bpd", cache["blocks.1.attn.hook_z"], weights.W_O[1])
    ratio = cache["blocks.1.hook_attn_out"] / written
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-3, rtol=1e-3)


def test_grouped_keys_and_values_are_given_by_query_head(tiny):
    weights = circuits.head_weights(tiny("llama"))
    assert weights.W_K.shape == weights.W_Q.shape
    assert torch.equal(weights.W_V[:, 0], weights.W_V[:, 1]) and not torch.equal(weights.W_V[:, 1], weights.W_V[:, 2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_vectors_are_what_the_next_layer_reads_of_a_one_token_prompt(architecture, tiny):
    bridge, ids = tiny(architecture), torch.arange(5)
    _, cache = bridge.run_with_cache(ids[:, None])
    expected = cache["blocks.1.ln1.hook_normalized"][:, 0]
    torch.testing.assert_close(circuits.token_vectors(bridge, ids), expected, atol=1e-3, rtol=1e-3)


# ---- against dense computations ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("after_block_0", [False, True])
def test_copying_scores_equal_the_dense_ones(architecture, after_block_0, tiny):
    bridge = tiny(architecture)
    weights, ids = circuits.head_weights(bridge), torch.arange(50)
    vectors = circuits.token_vectors(bridge, ids, after_block_0)
    dense = torch.einsum("td,lhde,ev->lhtv", vectors, weights.OV.AB, weights.W_U).double()
    values = torch.linalg.eigvals(dense)
    expected = values.real.sum(-1) / values.abs().sum(-1)
    found = circuits.copying_scores(weights, vectors, ids)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_a_head_that_copies_scores_one_and_a_suppressing_head_minus_one(weights):
    vectors = torch.eye(16)
    read = torch.eye(16)[:, :4].expand(2, 3, 16, 4)
    copier = circuits.HeadWeights(read, read, read, read.mT, torch.eye(16))
    torch.testing.assert_close(circuits.copying_scores(copier, vectors, torch.arange(16)), torch.ones(2, 3))
    against = circuits.HeadWeights(read, read, read, -read.mT, torch.eye(16))
    torch.testing.assert_close(circuits.copying_scores(against, vectors, torch.arange(16)), -torch.ones(2, 3))


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_equal_the_dense_ones(weights, mode):
    second = {"Q": weights.QK, "K": weights.QK.T, "V": weights.OV}[mode]
    found = circuits.composition(weights.OV, second)
    first_dense, second_dense = weights.OV.AB, second.AB
    for head in range(4):
        for later in range(4):
            a, b = first_dense[0, head], second_dense[1, later]
            expected = (a @ b).norm() / a.norm() / b.norm()
            torch.testing.assert_close(found[0, head, 1, later], expected, atol=1e-4, rtol=0)
    assert found[0, :, 0].isnan().all() and found[1].isnan().all()


def test_composition_scores_equal_the_librarys_on_a_folded_model(tiny):
    weights = circuits.head_weights(tiny("gpt2"))
    library = tiny("gpt2").all_composition_scores("K").scores
    found = circuits.composition(weights.OV, weights.QK.T).nan_to_num(0.0)
    torch.testing.assert_close(found, library, atol=1e-4, rtol=0)
