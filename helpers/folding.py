"""A bridge that computes what its model does, folded as far as that leaves the log-probabilities as they were."""

import re
from collections.abc import Callable
from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

# What is left out of folding, in turn, until the rest is exact: the library folds some models wrongly.
LEFT_OUT = (
    (),
    ("value biases",),
    ("layer norms",),
    ("layer norms", "writing weights"),
    ("layer norms", "writing weights", "value biases"),
    ("layer norms", "writing weights", "value biases", "unembedding"),
)
TOLERANCE = 1e-3  # nats in a log-probability, between two ways to compute the same


def probe(d_vocab: int) -> Int[Tensor, "2 8"]:
    """Two short prompts that differ in their second halves only."""
    tokens = torch.arange(12) * max(1, d_vocab // 13) % d_vocab
    return torch.stack([tokens[:8], torch.cat([tokens[:4], tokens[8:]])])


@torch.no_grad()
def log_probs(model: Callable, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Log-probabilities, in nats, of a bridge or of a model of the transformers library."""
    logits = model(tokens)
    return getattr(logits, "logits", logits).float().log_softmax(-1)


@torch.no_grad()
def wrap(model: torch.nn.Module, tokenizer, name: str, device: str) -> TransformerBridge:
    """A bridge around a model of the transformers library, held to that model on the probe.

    Raises:
        ValueError: TransformerLens does not know the architecture or computes something else; the model sees
            later tokens; or a layer has no attention pattern.
    """
    model, kind, d_vocab = model.to(device).eval(), type(model).__name__, model.config.get_text_config().vocab_size
    tokens = probe(d_vocab).to(device)
    if tokenizer is not None:
        _settle_bos(tokenizer, d_vocab)
    try:
        expected = log_probs(model, tokens)
        # Not `boot_transformers`: that looks for a tokenizer on the hub when there is none.
        bridge = build_bridge_from_module(model, kind, hf_config=model.config, tokenizer=tokenizer, model_name=name)
        is_pattern = re.compile(r"blocks\.\d+\.attn\.hook_pattern").fullmatch
        logits, cache = bridge.run_with_cache(tokens, names_filter=is_pattern)
    except Exception as error:  # its adapters fail in as many ways as there are adapters
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{name}: TransformerLens cannot wrap and run {kind}: {reason}") from error
    if not (gap := (logits.float().log_softmax(-1) - expected).abs().max().item()) < TOLERANCE:
        raise ValueError(
            f"{name}: in TransformerLens {kind} is another function than in transformers: a log-probability differs "
            f"by {gap:.2g} nats, so nothing measured on it would hold"
        )
    if (expected[0, :4] - expected[1, :4]).abs().max() > TOLERANCE:
        raise ValueError(f"{name}: {kind} sees later tokens, so it is no decoder; the series is about decoders")
    if without := bridge.cfg.n_layers - len(cache):
        raise ValueError(f"{name}: {without} of {bridge.cfg.n_layers} layers of {kind} have no attention pattern")
    return bridge.eval().requires_grad_(False)


def _settle_bos(tokenizer, d_vocab: int) -> None:
    """Give the roles of BOS and EOS to tokens that the model has, else TransformerLens invents one that it has not."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in ("bos_token", "eos_token")}
    known = [i for i in (*ids.values(), 0) if i is not None and i < d_vocab]
    for role in [role for role, i in ids.items() if i not in known]:
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(known[0]))
    # Else TransformerLens reads it again from where it came, at another revision, perhaps over the network.
    tokenizer.init_kwargs["add_bos_token"] = True


def fold(make: Callable[[], TransformerBridge]) -> TransformerBridge:
    """The bridge that `make` builds, in compatibility mode with the steps that are exact; `bridge.folded` names them.

    One-shot and irreversible, so it belongs to loading and never into a notebook.
    """
    bridge = make()
    tokens, possible = probe(bridge.cfg.d_vocab).to(bridge.cfg.device), _possible(bridge)
    expected = log_probs(bridge, tokens)
    for steps in dict.fromkeys(tuple(step for step in possible if step not in left_out) for left_out in LEFT_OUT):
        with suppress(Exception):  # as in `wrap`; the next asks for less
            _apply(bridge, steps)
            if (log_probs(bridge, tokens) - expected).abs().max() < TOLERANCE:
                bridge.folded = steps
                return bridge.requires_grad_(False)  # again, because new weights came in
        bridge = None  # memory may not hold two
        bridge = make()
    bridge.folded = ()
    return bridge


def _possible(bridge: TransformerBridge) -> tuple[str, ...]:
    """The steps that have something to do and that the library's adapter does not decline."""
    adapter, cfg = bridge.adapter, bridge.cfg
    centred = cfg.normalization_type in ("LN", "LNPre") and not getattr(cfg, "final_rms", False)
    value_biases = False
    with suppress(AttributeError, NotImplementedError):  # the library's ways to say that there are none
        value_biases = bool((bridge.b_V != 0).any())
    # Where a head can attend to a sink, its pattern does not sum to one over the tokens.
    sinks = any("sink" in name for name, _ in bridge.named_parameters())
    possible = {
        "layer norms": getattr(adapter, "supports_fold_ln", True) and cfg.normalization_type is not None,
        "writing weights": centred and getattr(adapter, "supports_center_writing_weights", True),
        "value biases": value_biases and not sinks,
        # A capped logit is not what it was after a shift.
        "unembedding": not (cfg.output_logits_soft_cap or 0) > 0,
    }
    return tuple(step for step, here in possible.items() if here)


def _apply(bridge: TransformerBridge, steps: tuple[str, ...]) -> None:
    # Two of its steps copy every weight, a second or more for Gemma 3: the one is left out where there are no biases
    # to fold, the other, which only takes the mean token from the unembedding, is done in place.
    bridge.enable_compatibility_mode(
        fold_ln="layer norms" in steps, center_writing_weights="writing weights" in steps, center_unembed=False,
        fold_value_biases="value biases" in steps, no_processing=not steps,
    )  # fmt: skip
    if "unembedding" in steps:
        with torch.no_grad():
            for name, weight in bridge.unembed.original_component.state_dict().items():
                weight -= weight.mean() if name.endswith("bias") else weight.mean(0)
