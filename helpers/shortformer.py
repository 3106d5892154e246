"""The shortformer architecture: positions are added to the inputs of Q and K only.

TransformerLens 4.3 has no such model. Here it is a subclass of the library's own native
model, so that one class is trained, shipped and wrapped in a `TransformerBridge`.
Source: Press, Smith & Lewis 2021, "Shortformer", section 5 (position-infused attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native.model import NativeAttention, NativeBlock, NativeModel
from transformer_lens.utilities import TypedModuleList
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint


class ShortformerAttention(NativeAttention):
    """Causal attention whose queries and keys see positions and whose values do not."""

    def __init__(self, cfg: TransformerBridgeConfig, pos: nn.Embedding, layer: int):
        super().__init__(cfg)
        # In a tuple, so that the table is registered once, by the model.
        self._pos, self.layer = (pos,), layer

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, pattern_fn=None, **_
    ):
        q, k, v = self._project(hidden_states, position_ids)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        if self.training and pattern_fn is attention_mask is past_key_values is None:
            z, pattern = F.scaled_dot_product_attention(q, k, v, is_causal=True), None
        else:
            pattern = self._pattern(q, k, attention_mask)
            pattern = pattern if pattern_fn is None else pattern_fn(pattern)
            z = pattern @ v
        return self.o(z.transpose(1, 2).flatten(2)), pattern

    def _project(self, hidden, position_ids):
        """Queries, keys and values: [batch, head, pos, d_head]."""
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positioned = hidden + self._pos[0](position_ids)
        inputs = (self.q, positioned), (self.k, positioned), (self.v, hidden)
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


class ShortformerModel(NativeModel):
    """Token embeddings, pre-norm attention-only blocks, final norm, untied unembedding."""

    def __init__(self, cfg: TransformerBridgeConfig):
        super().__init__(cfg)
        self.layers = TypedModuleList([ShortformerBlock(cfg, self.pos, layer) for layer in range(cfg.n_layers)])

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


def shortformer_config(config: dict) -> TransformerBridgeConfig:
    """The bridge configuration of an attention-only model from the fields of its `config.json`."""
    return TransformerBridgeConfig(
        **{key: config[key] for key in ("d_model", "n_layers", "n_heads", "d_head", "n_ctx", "d_vocab")},
        d_mlp=4 * config["d_model"],
        act_fn="relu",
        attn_only=True,
        normalization_type=config.get("normalization_type", config.get("normalization", "LN")),
        positional_embedding_type="standard",
        architecture="TransformerLensNative",
    )


def build_shortformer(
    config: dict, state: dict[str, Tensor], name: str, tokenizer=None, device: str = "cpu"
) -> TransformerBridge:
    """A bridge around attention-only weights with the names of earlier TransformerLens (`blocks.0.attn.W_Q`).

    Positions enter Q and K alone, unless the config has `shortformer_pos` false: then the residual stream.
    Missing biases are zero. The value bias is folded into the output bias, which is exact because every
    row of a pattern sums to one; with positions in Q and K nothing else may be folded.

    Raises:
        ValueError: a weight is missing, left over or of another shape than the configuration's.
    """
    cfg = shortformer_config(config)
    module = ShortformerModel(cfg) if config.get("shortformer_pos", True) else NativeModel(cfg)
    bridge = build_bridge_from_module(
        module, "TransformerLensNative", tl_config=cfg, tokenizer=tokenizer, model_name=name
    )
    converted, target = convert_tl_checkpoint(state, cfg), bridge.state_dict()
    biases = [key for key in target.keys() - converted.keys() if key.endswith("bias")]
    converted |= {key: torch.zeros_like(target[key]) for key in biases}
    wanted, given = ({(key, weight.shape) for key, weight in state.items()} for state in (target, converted))
    if wrong := sorted({key for key, _ in wanted ^ given}):
        raise ValueError(f"{name}: weights missing, left over or of the wrong shape: {', '.join(wrong[:3])}")
    bridge.load_state_dict(converted, strict=True)
    with torch.no_grad():
        for attn in (block.attn for block in bridge.blocks):
            attn.o.bias.add_(attn.o.weight @ attn.v.bias)
            attn.v.bias.zero_()
    bridge.folded = ("value biases",)
    return bridge.to(device).eval().requires_grad_(False)


def dequantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of checkpoints that were packed in eight bits; those without a scale come back as they are."""
    scales = {key: state[key + ".scale"] for key in state if key + ".scale" in state}
    plain = {key: value for key, value in state.items() if not key.endswith(".scale")}
    return plain | {key: plain[key].float() * scale.float() for key, scale in scales.items()}
