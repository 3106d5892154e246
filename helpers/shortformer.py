"""The shortformer architecture: positions are added to the inputs of Q and K only.

TransformerLens 4.3 has no such model. Here it is a subclass of the library's own native
model, so that one class is trained, shipped and wrapped in a `TransformerBridge`.
Source: Press, Smith & Lewis 2021, "Shortformer", section 5 (position-infused attention).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native.model import NativeAttention, NativeBlock, NativeModel
from transformer_lens.utilities import TypedModuleList


class ShortformerAttention(NativeAttention):
    """Causal attention whose queries and keys see positions and whose values do not."""

    def __init__(self, cfg: TransformerBridgeConfig, pos: nn.Embedding, layer: int):
        super().__init__(cfg)
        # In a tuple, so that the table is registered once, by the model.
        self._pos, self.layer = (pos,), layer

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, pattern_fn=None, **_
    ):
        q, k, v = self._project(hidden_states, position_ids, hidden_states.shape[1])
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        if self.training and pattern_fn is attention_mask is past_key_values is None:
            z, pattern = F.scaled_dot_product_attention(q, k, v, is_causal=True), None
        else:
            pattern = self._pattern(q, k, attention_mask)
            pattern = pattern if pattern_fn is None else pattern_fn(pattern)
            z = pattern @ v
        return self.o(z.transpose(1, 2).flatten(2)), pattern

    def few_queries(self, hidden: Float[Tensor, "batch pos d_model"], n: int) -> Float[Tensor, "batch n d_model"]:
        """Output at the last `n` positions, by the operations of `forward`."""
        q, k, v = self._project(hidden, None, n)
        return self.o((self._pattern(q, k, None) @ v).transpose(1, 2).flatten(2))

    def _project(self, hidden, position_ids, n):
        """Keys and values at all positions and queries at the last `n`: [batch, head, pos, d_head]."""
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positioned = hidden + self._pos[0](position_ids)
        # Contiguous, because a linear map rounds differently on a slice.
        inputs = (self.q, positioned[:, -n:].contiguous()), (self.k, positioned), (self.v, hidden)
        return (linear(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for linear, x in inputs)

    def _pattern(self, q, k, attention_mask):
        batch, _, seq, _ = q.shape
        # Queries are the last positions when earlier keys come from a cache.
        mask = self.causal_mask[k.shape[2] - seq : k.shape[2], : k.shape[2]]
        if attention_mask is not None:
            mask = self._combine_attention_mask(mask, attention_mask, batch=batch)
        scores = (q @ k.transpose(-2, -1) / self.scale).masked_fill(mask, float("-inf"))
        # A fully masked row is padding: its softmax is NaN and its pattern is zero.
        return scores.softmax(-1).masked_fill(mask, 0.0)


class ShortformerBlock(NativeBlock):
    """Attention on the normalised residual stream, added to it."""

    def __init__(self, cfg: TransformerBridgeConfig, pos: nn.Embedding, layer: int):
        super().__init__(cfg)
        self.attn = ShortformerAttention(cfg, pos, layer)

    def forward(self, hidden_states, **kwargs):
        return (hidden_states + self.attn(self.ln1(hidden_states), **kwargs)[0],)

    def few_queries(self, resid: Float[Tensor, "batch pos d_model"], n: int) -> Float[Tensor, "batch n d_model"]:
        """Residual streams after the block at the last `n` positions."""
        return resid[:, -n:] + self.attn.few_queries(self.ln1(resid), n)


class ShortformerModel(NativeModel):
    """Token embeddings, pre-norm attention-only blocks, final norm, untied unembedding."""

    def __init__(self, cfg: TransformerBridgeConfig):
        super().__init__(cfg)
        blocks = [ShortformerBlock(cfg, self.pos, layer) for layer in range(cfg.n_layers)]
        self.layers = TypedModuleList(blocks)

    def forward(self, input_ids=None, inputs_embeds=None, position_ids=None, past_key_values=None, **kwargs):
        resid = self.tok_embed(input_ids) if inputs_embeds is None else inputs_embeds
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        end = start + resid.shape[1]
        if end > self.cfg.n_ctx:
            raise ValueError(f"prompt of {end} tokens exceeds the context of {self.cfg.n_ctx}")
        if position_ids is None:
            position_ids = torch.arange(start, end, device=resid.device)[None]
        mask = kwargs.get("attention_mask")
        for block in self.layers:
            (resid,) = block(resid, attention_mask=mask, position_ids=position_ids, past_key_values=past_key_values)
        return self.head(self.ln_out(resid))
