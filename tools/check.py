"""What a model is, and whether what the series measures on it can be trusted: the first thing to run on a new one."""

import argparse
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.catalog import Source, checkpoints, model_folder, resolve
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
from tools.run import find_notebooks, plan, run_jobs

Tokens = Int[Tensor, "prompt pos"]
# What a notebook cannot do without, by its name without the number.
NEEDS = {
    "head_ablation": "sweeps",
    "activation_patching": "sweeps",
    "path_analysis": "sweeps",
    "logit_lens": "logit attribution",
    "causal_scrubbing": "two layers of attention alone",
    "circuit_weights": "weights by head",
    "training_dynamics": "training checkpoints",
}


@dataclass(frozen=True)
class Finding:
    """One line of the page. `good` is None for what is neither right nor wrong."""

    what: str
    found: str
    good: bool | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m tools check`."""
    parser.add_argument("model", nargs="?", help="a name, a folder, a nanoGPT ckpt.pt or a hub id")
    parser.add_argument("--notebooks", action="store_true", help="also run every notebook on it, in small")
    parser.add_argument("--architectures", action="store_true", help="check tiny models of many kinds instead")


def main(arguments: argparse.Namespace) -> int:
    """Print the page; returns 1 when something on it is wrong."""
    if arguments.architectures:
        from tools.architectures import write_page

        return write_page(Path("outputs/architectures.md"))
    if arguments.model is None:
        raise ValueError("name a model to check, or ask for --architectures")
    ensure(arguments.model)
    findings = examine(arguments.model) + (run_notebooks(arguments.model) if arguments.notebooks else [])
    print("\n".join(page(arguments.model, findings)))
    return int(any(finding.good is False for finding in findings))


def page(name: str, findings: list[Finding]) -> list[str]:
    """The lines of the page, in Markdown."""
    marks = {True: "right", False: "WRONG", None: ""}
    rows = [f"| {finding.what} | {finding.found} | {marks[finding.good]} |" for finding in findings]
    return [f"# {name}", "", "| what | found | |", "|---|---|---|", *rows]


def examine(name: str) -> list[Finding]:
    """All findings about a model but the notebooks' own runs.

    Raises:
        ValueError, ModelUnavailable: it cannot be loaded; says why.
    """
    source, model = resolve(name), read(name, pick_device())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (2, min(24, model.cfg.n_ctx)), generator=generator).to(model.cfg.device)
    findings = [*facts(model), against_transformers(model, name, source, tokens), patterns(model, tokens)]
    findings += [*sweeps(model, tokens), attribution(model, tokens), weights(model)]
    return findings + notebooks(model, source, name, findings)


def facts(model: TransformerBridge) -> list[Finding]:
    """What the model is."""
    cfg, sizes = model.cfg, layout(model)
    local = cfg.n_layers - len(sizes["global_layers"])
    first = bos_id(model)
    spelled = repr(model.tokenizer.convert_ids_to_tokens(first)) if model.tokenizer else "no tokenizer"
    return [
        Finding("architecture", cfg.architecture),
        Finding("layers", f"{cfg.n_layers}, of which {local} see a window only" if local else f"{cfg.n_layers}"),
        Finding("heads a layer", f"{cfg.n_heads} of width {cfg.d_head}, keys of {sizes['n_key_value_heads']}"),
        Finding("stream, context, vocabulary", f"{cfg.d_model}, {cfg.n_ctx}, {cfg.d_vocab}"),
        Finding("norm", str(cfg.normalization_type)),
        Finding("first token", f"{first} ({spelled})", first < cfg.d_vocab),
        Finding("folded, because exact", ", ".join(model.folded) or "nothing"),
    ]


@torch.no_grad()
def against_transformers(model: TransformerBridge, name: str, source: Source, tokens: Tokens) -> Finding:
    """The folded bridge beside the plain model of the transformers library."""
    what = "log-probabilities against transformers"
    if model.cfg.architecture == "TransformerLensNative":
        return Finding(what, "no such model there")
    if source.kind == "nanogpt":
        plain = read_nanogpt(Path(source.repo))[0]
    else:
        plain = read_hugging_face(model_folder(name, source))
    expected = log_probs(plain.to(model.cfg.device).eval(), tokens)
    return _difference(what, log_probs(model, tokens), expected, TOLERANCE, "nats")


def _difference(what: str, found: Tensor, expected: Tensor, tolerance: float, unit: str) -> Finding:
    if found.shape != expected.shape:
        return Finding(what, f"of shape {tuple(found.shape)}, not {tuple(expected.shape)}", False)
    gap = (found - expected).abs().max().item()
    right = gap < tolerance  # false for nan
    return Finding(what, f"within {tolerance:.0e} {unit}" if right else f"{gap:.1e} {unit} apart", right)


@torch.no_grad()
def patterns(model: TransformerBridge, tokens: Tokens) -> Finding:
    """Whether attention looks back only, within its window, and every row of it sums to one."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda hook: hook.endswith("attn.hook_pattern"))
    rows = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    if rows.triu(1).abs().max() > 0:
        return Finding("attention patterns", "later tokens are attended to", False)
    short = int(((rows.sum(-1) - 1).abs() > 1e-4).any((1, 3)).sum())
    if (rows < 0).any() or (rows.sum(-1) > 1 + 1e-4).any():
        return Finding("attention patterns", "rows that are no weights", False)
    if short and not any("sink" in key for key, _ in model.named_parameters()):
        return Finding("attention patterns", f"rows of {short} heads do not sum to one", False)
    rest = "what is left goes to a sink" if short else "rows sum to one"
    return Finding("attention patterns", f"causal; {rest}", True)


@torch.no_grad()
def sweeps(model: TransformerBridge, tokens: Tokens) -> list[Finding]:
    """One layer's effects beside TransformerLens's own hooks, one whole run for each edit."""
    metric, layer, other = mean_loss(tokens), model.cfg.n_layers // 2, tokens.flip(0)
    plain = _loss(model, tokens)

    def stock(hook: str, n: int, edit: Callable) -> Float[Tensor, "prompt item"]:
        effects = [_loss(model, tokens, [(f"blocks.{layer}.{hook}", edit(i))]) - plain for i in range(n)]
        return torch.stack(effects, 1)

    def mean_head(head: int):
        def edit(z, hook):
            heads = z.reshape(*z.shape[:2], model.cfg.n_heads, -1)  # the library splits narrow values wrongly
            heads[:, :, head] = heads[:, :, head].mean(0)
            return heads.view(z.shape)

        return edit

    def at_position(position: int):
        def edit(resid, hook):
            resid[:, position] = clean[:, position]
            return resid

        return edit

    _, cache = model.run_with_cache(other, names_filter=f"blocks.{layer}.hook_resid_pre")
    clean = cache["resid_pre", layer]
    return [
        _measured("sweep: mean ablation of heads", lambda: (
            ablate_heads(model, tokens, metric, "mean")[:, layer], stock("attn.hook_z", model.cfg.n_heads, mean_head)
        )),
        _measured("sweep: patching the stream", lambda: (
            patch_resid(model, tokens, other, metric)[:, layer], stock("hook_resid_pre", tokens.shape[1], at_position)
        )),
    ]  # fmt: skip


def _measured(what: str, both: Callable, tolerance: float = 1e-4, unit: str = "nats") -> Finding:
    """What `both` gives, ours and the other, beside each other."""
    try:
        return _difference(what, *both(), tolerance, unit)
    except Exception as error:
        last, sentence = traceback.extract_tb(error.__traceback__)[-1], " ".join(str(error).split())
        # Helpers refuse in a sentence; all else is a model's code that was called as it cannot be.
        if Path(last.filename).parent.name == "helpers" and last.line.startswith("raise "):
            return Finding(what, f"refused: {sentence}")
        return Finding(what, f"fails with {type(error).__name__}: {sentence[:150]}", False)


def _loss(model: TransformerBridge, tokens: Tokens, hooks: Sequence = ()) -> Float[Tensor, "prompt"]:
    """Mean of -log p(token) of each prompt, by a plain run with hooks."""
    log_p = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).float().log_softmax(-1)
    return -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].mean(1)


def attribution(model: TransformerBridge, tokens: Tokens) -> Finding:
    """Whether what heads, MLPs and embeddings write sums to the logit."""

    def both():
        found = attribute(model, tokens, tokens[:, -1], tokens[:, 0])
        return found.total(), found.logit

    return _measured("logit attribution", both, 1e-2, "of a logit")


def weights(model: TransformerBridge) -> Finding:
    """Whether a head's matrices can be had, with the norms folded in."""
    cfg = model.cfg
    try:
        found = head_weights(model)
        shapes = [found.W_Q.shape, found.W_O.shape]
    except Exception as error:  # the library says so in several ways
        return Finding("weights by head", f"refused: {str(error).split('. ')[0]}")
    head = (cfg.n_layers, cfg.n_heads)
    right = shapes == [(*head, cfg.d_model, cfg.d_head), (*head, cfg.d_head, cfg.d_model)]
    return Finding("weights by head", "there" if right else f"of unexpected shapes {shapes}", right)


def notebooks(model: TransformerBridge, source: Source, name: str, findings: list[Finding]) -> list[Finding]:
    """Which notebooks apply, and why others do not."""
    refused = {finding.what.split(":")[0] + "s" * finding.what.startswith("sweep"): finding.found
               for finding in findings if finding.found.startswith("refused") or finding.good is False}  # fmt: skip
    if not (model.cfg.attn_only and model.cfg.n_layers == 2):
        refused["two layers of attention alone"] = f"it has {model.cfg.n_layers} layers of {model.cfg.architecture}"
    if not (source.checkpoints or checkpoints(name)):
        refused["training checkpoints"] = "none are known"
    lines = []
    for notebook in find_notebooks():
        need = NEEDS.get(notebook.stem.split("_", 1)[1])
        found = f"without {need}: {refused[need]}" if need in refused else "applies"
        lines.append(Finding(notebook.stem, found))
    return lines


def run_notebooks(name: str) -> list[Finding]:
    """Every notebook run to its end, with small sizes, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = plan([name], find_notebooks(), Path(folder), {}, small=True)
        ends = run_jobs(jobs, n_parallel=1)
    found = []
    for job in jobs:
        end = ends[job.label]
        good = None if end.not_applicable else not end.error
        found.append(Finding(f"run of {job.notebook.stem}", end.error or end.not_applicable or "done", good))
    return found
