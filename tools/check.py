"""What a model is, and whether what the series measures on it can be trusted: the first thing to run on a new one."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.catalog import model_folder, resolve
from helpers.circuits import head_weights
from helpers.folding import TOLERANCE, log_probs
from helpers.hugging_face import read_hugging_face
from helpers.interventions import ablate_heads, patch_resid
from helpers.lens import attribute
from helpers.metrics import mean_loss
from helpers.models import layout, pick_device, read
from helpers.nanogpt import read_nanogpt
from helpers.prompts import bos_id
from tools.convert import ensure

Tokens = Int[Tensor, "prompt pos"]
MARKS = {True: "right", False: "WRONG", None: ""}


@dataclass(frozen=True)
class Finding:
    """One line of the page. `good` is None for what is neither right nor wrong."""

    what: str
    found: str
    good: bool | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m tools check`."""
    parser.add_argument("model", nargs="?", help="a name, a folder, a nanoGPT ckpt.pt or a hub id")
    parser.add_argument("--architectures", action="store_true", help="check tiny models of many kinds instead")


def main(arguments: argparse.Namespace) -> int:
    """Print what is found, as a table in Markdown; returns 1 when something of it is wrong."""
    if arguments.architectures:
        from tools.architectures import write_page

        return write_page(Path("outputs/architectures.md"))
    if arguments.model is None:
        raise ValueError("name a model to check, or ask for --architectures")
    ensure(arguments.model)
    findings = examine(arguments.model)
    print(f"# {arguments.model}\n\n| what | found | |\n|---|---|---|")
    for finding in findings:
        print(f"| {finding.what} | {finding.found} | {MARKS[finding.good]} |")
    return int(any(finding.good is False for finding in findings))


@torch.no_grad()
def examine(name: str) -> list[Finding]:
    """All findings about a model.

    Raises:
        ValueError, ModelUnavailable: it cannot be loaded; says why.
    """
    model = read(name, pick_device())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (2, min(24, model.cfg.n_ctx)), generator=generator).to(model.cfg.device)
    checks = {
        "log-probabilities against transformers": lambda: against_transformers(model, name, tokens),
        "attention patterns": lambda: patterns(model, tokens),
        "sweep: mean ablation of heads": lambda: mean_ablation(model, tokens),
        "sweep: patching the stream": lambda: patching(model, tokens),
        "logit attribution": lambda: attribution(model, tokens),
        "weights by head": lambda: weights(model),
    }
    return facts(model) + [judge(what, check) for what, check in checks.items()]


def judge(what: str, check: Callable[[], tuple[str, bool | None]]) -> Finding:
    """What a check finds, or the sentence with which a helper or the library refuses the model.

    All other exceptions are a model's code that was called as it cannot be.
    """
    try:
        return Finding(what, *check())
    except Exception as error:
        refused = isinstance(error, ValueError | NotImplementedError)
        sentence = " ".join(str(error).split()).split(". ")[0]
        return Finding(what, f"refused: {sentence}" if refused else f"fails: {error!r}", None if refused else False)


def facts(model: TransformerBridge) -> list[Finding]:
    """What the model is."""
    cfg, first = model.cfg, bos_id(model)
    spelled = repr(model.tokenizer.convert_ids_to_tokens(first)) if model.tokenizer else "no tokenizer"
    sizes = {"d_model": cfg.d_model, "n_ctx": cfg.n_ctx, "norm": cfg.normalization_type} | layout(model)
    return [
        Finding("architecture", cfg.architecture),
        Finding("layout", ", ".join(f"{key} {value}" for key, value in sizes.items())),
        Finding("first token", f"{first} ({spelled})", first < cfg.d_vocab),
        Finding("folded, because exact", ", ".join(model.folded) or "nothing"),
    ]


def apart(found: Tensor, expected: Tensor, tolerance: float, unit: str) -> tuple[str, bool]:
    """How far two ways to compute the same are apart, and whether that is near enough."""
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)}, not {tuple(expected.shape)}", False
    gap = (found - expected).abs().max().item()
    right = gap < tolerance  # false for nan
    return f"within {tolerance:.0e} {unit}" if right else f"{gap:.1e} {unit} apart", right


def against_transformers(model: TransformerBridge, name: str, tokens: Tokens) -> tuple[str, bool | None]:
    """The folded bridge beside the plain model of the transformers library."""
    source = resolve(name)
    if model.cfg.architecture == "TransformerLensNative":
        return "no such model there", None
    nanogpt = source.kind == "nanogpt"
    plain = read_nanogpt(Path(source.repo))[0] if nanogpt else read_hugging_face(model_folder(name, source))
    expected = log_probs(plain.to(model.cfg.device).eval(), tokens)
    return apart(log_probs(model, tokens), expected, TOLERANCE, "nats")


def patterns(model: TransformerBridge, tokens: Tokens) -> tuple[str, bool]:
    """Whether attention looks back only, and every row of it sums to one, or to less where there is a sink."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda hook: hook.endswith("attn.hook_pattern"))
    rows = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    if rows.triu(1).abs().max() > 0:
        return "later tokens are attended to", False
    sink = any("sink" in key for key, _ in model.named_parameters())
    rest = rows.sum(-1) - 1
    if (rows < 0).any() or (rest if sink else rest.abs()).max() > 1e-4:
        return "rows that are no weights, or do not sum to one", False
    return f"causal; {'what is left goes to a sink' if sink else 'rows sum to one'}", True


def stock_effects(model: TransformerBridge, tokens: Tokens, hook: str, edit: Callable, n: int) -> Float[Tensor, "p n"]:
    """What each of `n` edits adds to the mean loss, in nats, by TransformerLens's own hooks: a whole run for each."""

    def loss(*hooks):
        return model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=list(hooks)).mean(1)

    return torch.stack([loss((hook, partial(edit, i))) for i in range(n)], 1) - loss()[:, None]


def mean_ablation(model: TransformerBridge, tokens: Tokens) -> tuple[str, bool]:
    """The heads of the middle layer."""
    layer, n_heads = model.cfg.n_layers // 2, model.cfg.n_heads

    def edit(head, z, hook):
        heads = z.reshape(*z.shape[:2], n_heads, -1)  # the library splits narrow values wrongly
        heads[:, :, head] = heads[:, :, head].mean(0)
        return heads.view(z.shape)

    found = ablate_heads(model, tokens, mean_loss(tokens), "mean")[:, layer]
    return apart(found, stock_effects(model, tokens, f"blocks.{layer}.attn.hook_z", edit, n_heads), 1e-4, "nats")


def patching(model: TransformerBridge, tokens: Tokens) -> tuple[str, bool]:
    """The stream before the middle layer, patched from the other prompt."""
    layer, other = model.cfg.n_layers // 2, tokens.flip(0)
    hook = f"blocks.{layer}.hook_resid_pre"
    clean = model.run_with_cache(other, names_filter=hook)[1][hook]

    def edit(position, resid, hook):
        resid[:, position] = clean[:, position]
        return resid

    found = patch_resid(model, tokens, other, mean_loss(tokens))[:, layer]
    return apart(found, stock_effects(model, tokens, hook, edit, tokens.shape[1]), 1e-4, "nats")


def attribution(model: TransformerBridge, tokens: Tokens) -> tuple[str, bool]:
    """Whether what heads, MLPs and embeddings write sums to the logit."""
    found = attribute(model, tokens, tokens[:, -1], tokens[:, 0])
    return apart(found.total(), found.logit, 1e-2, "of a logit")


def weights(model: TransformerBridge) -> tuple[str, bool]:
    """Whether a head's matrices can be had, with the norms folded in."""
    cfg, found = model.cfg, head_weights(model)
    shapes, head = [found.W_Q.shape, found.W_O.shape], (cfg.n_layers, cfg.n_heads)
    right = shapes == [(*head, cfg.d_model, cfg.d_head), (*head, cfg.d_head, cfg.d_model)]
    return "there" if right else f"of unexpected shapes {shapes}", right
