"""Circuits read from the weights: the matrices of every head, what a head copies, what it composes with.

Weights are given by query head, and every norm's gain and centring is folded into the matrix
that reads after it (into W_O where a norm follows attention). A norm's scale depends on the text and is
left out. Rotary models turn queries and keys by their distance; their QK circuits are those at distance zero.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.model_bridge import TransformerBridge

Vectors = Float[Tensor, "token d_model"]


@dataclass(frozen=True)
class HeadWeights:
    """The matrices of all heads, norms folded in; vectors are rows, as in x @ W_Q."""

    W_Q: Float[Tensor, "layer head d_model d_head"]
    W_K: Float[Tensor, "layer head d_model d_head"]
    W_V: Float[Tensor, "layer head d_model d_head"]
    W_O: Float[Tensor, "layer head d_head d_model"]
    W_U: Float[Tensor, "d_model d_vocab"]

    @property
    def QK(self) -> FactoredMatrix:
        """[layer, head, d_model, d_model]: the score of query x on key y is x QK y / sqrt(d_head)."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """[layer, head, d_model, d_model]: attending to x writes x OV."""
        return FactoredMatrix(self.W_V, self.W_O)


def head_weights(model: TransformerBridge) -> HeadWeights:
    """Every head's weights, with norms folded, keys and values repeated for grouped queries.

    W_U is also centred over the vocabulary, which changes no probability.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Raises ValueError where attention or the unembedding reads what no norm has seen, or a norm spans several heads.
    """
    if not (hasattr(model, "ln_final") and hasattr(model.blocks[0], "ln1")):
        raise ValueError(f"{model.cfg.model_name} has no norm before attention or none before its unembedding")
    # The library's factors repeat keys and values for grouped queries.
    W_Q, W_K, W_V = (
        torch.stack([fold(block.ln1, w) for block, w in zip(model.blocks, weight)])
        for weight in (model.QK.A, model.QK.B.mT, model.OV.A)
    )
    if hasattr(model.blocks[0].attn, "q_norm"):
        W_Q = W_Q * _gains(model, "attn.q_norm", model.cfg.d_head)
        W_K = W_K * _gains(model, "attn.k_norm", model.cfg.d_head)
    W_O = model.W_O
    if hasattr(model.blocks[0], "ln1_post"):
        W_O = W_O * _gains(model, "ln1_post", model.cfg.d_model)
    W_U = fold(model.ln_final, model.W_U)
    return HeadWeights(W_Q, W_K, W_V, W_O, W_U - W_U.mean(1, keepdim=True))


def fold(norm, weight: Float[Tensor, "*head d_model out"]) -> Float[Tensor, "*head d_model out"]:
    """The weight that, before a norm whose scale is 1, reads what `weight` reads after it; the norm's bias is left."""
    folded = weight * _gain(norm, weight.shape[-2]).to(weight.device)[:, None]
    return folded if norm.uses_rms_norm else folded - folded.mean(-2, keepdim=True)


def _gains(model, norm: str, width: int) -> Float[Tensor, "layer 1 1 width"]:
    return torch.stack([_gain(block.get_submodule(norm), width) for block in model.blocks])[:, None, None]


def _gain(norm, width: int) -> Float[Tensor, "width"]:
    """What a norm multiplies by, measured: some store their gain less one, some have none."""
    weight = next(norm.parameters(), torch.empty(0))
    if weight.numel() not in (0, width):
        raise ValueError(f"a norm over {weight.numel()} numbers cannot be folded into matrices of {width}")
    # Of zero mean and unit mean square, so that norms of either kind only scale it; a thousand times, to drown eps.
    x = torch.arange(width, device=weight.device, dtype=weight.dtype).remainder(2) - 0.5
    x = (x - x.mean()) / x.std(correction=0)
    up, down = (norm(scale * x[None, None])[0, 0] for scale in (1000, -1000))
    return (up - down) / (2 * x)


def token_vectors(model: TransformerBridge, tokens: Int[Tensor, "token"], after_block_0=True) -> Vectors:
    """Each token alone as a head sees it: its embedding, taken through the first block if asked for, normalised.

    The block runs on one-token prompts, where attention can only look at the token itself, so
    the result depends on weights alone. Layer 0 reads the embedding; later layers read the sum of
    it and what layer 0 made of it, of which the embedding may be a small part.
    """
    vectors, kind = model.W_E[tokens], model.cfg.normalization_type
    if after_block_0:
        hook = "blocks.0.hook_resid_post"
        with torch.inference_mode():
            vectors = model.run_with_cache(tokens[:, None], names_filter=hook, stop_at_layer=1)[1][hook][:, 0]
    if kind is None:
        return vectors
    if "RMS" not in kind:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    return vectors / (vectors.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()  # a norm without its gain and bias


def copying_scores(weights: HeadWeights, vectors: Vectors, tokens: Int[Tensor, "token"]) -> Float[Tensor, "layer head"]:
    """Re sum(lambda) / sum |lambda| over the eigenvalues of each head's token-to-token OV circuit.

    1 where attending to a token always raises its own logit, -1 where it always lowers it.
    The eigenvalues are those of the d_head x d_head product; no token-by-token matrix is made.
    Source: Elhage et al. 2021, section "Copying".
    """
    # Double precision: a head whose eigenvalues nearly cancel has a badly conditioned sum.
    through = (weights.W_U[:, tokens] @ vectors).double()
    eigenvalues = FactoredMatrix(weights.W_V.double(), weights.W_O.double() @ through).eigenvalues
    return (eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)).float()


def composition(first: FactoredMatrix, second: FactoredMatrix) -> Float[Tensor, "layer head layer_1 head_1"]:
    """||first second||_F / (||first||_F ||second||_F) for all pairs of heads; NaN unless the second is later.

    `first` is OV; `second` is QK for Q-composition, QK.T for K-composition, OV for V-composition.
    Source: Elhage et al. 2021, section "Composition".
    """
    left, right = first.collapse_l(), second.collapse_r()
    norms = left.norm(dim=(-2, -1))[:, :, None, None] * right.norm(dim=(-2, -1))
    # One layer at a time, so that memory grows with heads, not with pairs times d_model.
    products = [torch.einsum("him,lkmj->hlkij", layer, right).norm(dim=(-2, -1)) for layer in left]
    layers = torch.arange(len(left), device=norms.device)
    return (torch.stack(products) / norms).masked_fill((layers[:, None] >= layers)[:, None, :, None], math.nan)
