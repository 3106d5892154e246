"""What a model is, and whether what the series measures on it can be trusted: the first thing to run on a new one."""

import argparse
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.catalog import checkpoints, model_folder, resolve
from helpers.circuits import head_weights
from helpers.folding import TOLERANCE, log_probs
from helpers.hugging_face import read_hugging_face
from helpers.interventions import ablate_heads, patch_resid
from helpers.lens import attribute
from helpers.metrics import mean_loss
from helpers.models import layout, pick_device, read
from helpers.nanogpt import read_nanogpt
from helpers.prompts import bos_id
from helpers.scrubbing import why_not
from tools.convert import ensure
from tools.run import find_notebooks, plan, run_jobs

Tokens = Int[Tensor, "prompt pos"]
# What a notebook cannot do without, by its number.
NEEDS = {
    "03": "sweep: mean ablation of heads",
    "04": "sweep: patching the stream",
    "05": "logit attribution",
    "06": "sweep: mean ablation of heads",
    "07": "two layers of attention",
    "08": "weights by head",
    "09": "checkpoints",
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
    """Print what is found; returns 1 when something of it is wrong."""
    if arguments.architectures:
        from tools.architectures import write_page

        return write_page(Path("outputs/architectures.md"))
    if arguments.model is None:
        raise ValueError("name a model to check, or ask for --architectures")
    ensure(arguments.model)
    model = read(arguments.model, pick_device())
    findings = examine(model, arguments.model)
    findings += forecast(model, arguments.model, findings)
    findings += run_notebooks(arguments.model) if arguments.notebooks else []
    marks = {True: "right", False: "WRONG", None: ""}
    for finding in findings:
        print(f"{finding.what:40}{marks[finding.good]:7}{finding.found}")
    return int(any(finding.good is False for finding in findings))


@torch.no_grad()
def examine(model: TransformerBridge, name: str) -> list[Finding]:
    """What the model of a name is, and whether what is measured on it is right."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (2, min(24, model.cfg.n_ctx)), generator=generator).to(model.cfg.device)
    checks = {
        "log-probabilities against transformers": partial(against_transformers, name),
        "attention patterns": patterns,
        "sweep: mean ablation of heads": mean_ablation,
        "sweep: patching the stream": patching,
        "logit attribution": attribution,
        "weights by head": weights,
    }
    return facts(model) + [judge(what, partial(check, model, tokens)) for what, check in checks.items()]


def judge(what: str, check: Callable[[], str]) -> Finding:
    """What a check finds right, what it asserts in vain, or the sentence that refuses the model."""
    try:
        return Finding(what, check(), True)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # Helpers and the checks refuse in a sentence; all else is a model's code that was called as it cannot be.
        refused = Path(last.filename).parent.name in ("helpers", "tools") and last.line.startswith("raise ")
        sentence = " ".join(str(error).split()).split(". ")[0]
        return Finding(what, f"refused: {sentence}" if refused else repr(error), None if refused else False)


def facts(model: TransformerBridge) -> list[Finding]:
    """What the model is."""
    cfg, first = model.cfg, bos_id(model)
    spelled = repr(model.tokenizer.convert_ids_to_tokens(first)) if model.tokenizer else "no tokenizer"
    sizes = {"d_model": cfg.d_model, "n_ctx": cfg.n_ctx, "norm": cfg.normalization_type} | layout(model)
    return [
        Finding(cfg.architecture, ", ".join(f"{key} {value}" for key, value in sizes.items())),
        Finding("first token", f"{first} ({spelled})", first < cfg.d_vocab),
        Finding("folded, because exact", ", ".join(model.folded) or "nothing"),
    ]


def near(found: Tensor, expected: Tensor, tolerance: float, unit: str = "nats") -> str:
    """Assert that two ways to compute the same agree, and say to within what."""
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=tolerance, rtol=0)
    return f"within {tolerance:.0e} {unit}"


def against_transformers(name: str, model: TransformerBridge, tokens: Tokens) -> str:
    """The folded bridge beside the plain model of the transformers library."""
    source = resolve(name)
    if model.cfg.architecture == "TransformerLensNative":
        raise ValueError("there is no such model")
    nanogpt = source.kind == "nanogpt"
    plain = read_nanogpt(Path(source.repo))[0] if nanogpt else read_hugging_face(model_folder(name, source))
    return near(log_probs(model, tokens), log_probs(plain.to(model.cfg.device).eval(), tokens), TOLERANCE)


def patterns(model: TransformerBridge, tokens: Tokens) -> str:
    """Whether attention looks back only, and every row of it sums to one, or to less where there is a sink."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda hook: hook.endswith("attn.hook_pattern"))
    rows = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    assert rows.triu(1).abs().max() == 0, "later tokens are attended to"
    assert rows.min() >= 0 and rows.sum(-1).max() < 1 + 1e-4, "rows that are no weights"
    if any("sink" in key for key, _ in model.named_parameters()):
        return "causal; what is left goes to a sink"
    assert rows.sum(-1).min() > 1 - 1e-4, "rows do not sum to one"
    return "causal; rows sum to one"


def stock_effects(model: TransformerBridge, tokens: Tokens, hook: str, edit: Callable, n: int) -> Float[Tensor, "p n"]:
    """What each of `n` edits adds to the mean loss, in nats, by TransformerLens's own hooks: a whole run for each."""

    def loss(*hooks):
        return model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=list(hooks)).mean(1)

    return torch.stack([loss((hook, partial(edit, i))) for i in range(n)], 1) - loss()[:, None]


def mean_ablation(model: TransformerBridge, tokens: Tokens) -> str:
    """The effects of the middle layer's heads beside the library's own."""
    layer, n_heads = model.cfg.n_layers // 2, model.cfg.n_heads

    def edit(head, z, hook):
        heads = z.reshape(*z.shape[:2], n_heads, -1)  # the library splits narrow values wrongly
        heads[:, :, head] = heads[:, :, head].mean(0)
        return heads.view(z.shape)

    found = ablate_heads(model, tokens, mean_loss(tokens), "mean")[:, layer]
    return near(found, stock_effects(model, tokens, f"blocks.{layer}.attn.hook_z", edit, n_heads), 1e-4)


def patching(model: TransformerBridge, tokens: Tokens) -> str:
    """The effects of the other prompt's stream before the middle layer beside the library's own."""
    layer, other = model.cfg.n_layers // 2, tokens.flip(0)
    hook = f"blocks.{layer}.hook_resid_pre"
    clean = model.run_with_cache(other, names_filter=hook)[1][hook]

    def edit(position, resid, hook):
        resid[:, position] = clean[:, position]
        return resid

    found = patch_resid(model, tokens, other, mean_loss(tokens))[:, layer]
    return near(found, stock_effects(model, tokens, hook, edit, tokens.shape[1]), 1e-4)


def attribution(model: TransformerBridge, tokens: Tokens) -> str:
    """Whether what heads, MLPs and embeddings write sums to the logit."""
    found = attribute(model, tokens, tokens[:, -1], tokens[:, 0])
    return near(found.total(), found.logit, 1e-2, "of a logit")


def weights(model: TransformerBridge, tokens: Tokens) -> str:
    """Whether a head's matrices can be had, with the norms folded in."""
    cfg = model.cfg
    try:
        found = head_weights(model)
    except Exception as error:  # the library says in several ways that there are none
        raise ValueError(str(error)) from error
    shape = (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    assert found.W_Q.shape == found.W_O.mT.shape == shape, (found.W_Q.shape, found.W_O.shape)
    return "there"


def forecast(model: TransformerBridge, name: str, findings: list[Finding]) -> list[Finding]:
    """Which notebooks apply, and why others do not."""
    reasons = {finding.what: finding.found for finding in findings if finding.found.startswith("refused")}
    reasons["two layers of attention"] = why_not(model)
    reasons["checkpoints"] = "" if resolve(name).checkpoints or checkpoints(name) else "no checkpoints are known"
    needs = {notebook.stem: NEEDS.get(notebook.stem[:2]) for notebook in find_notebooks()}
    return [Finding(notebook, reasons.get(need) or "applies") for notebook, need in needs.items()]


def run_notebooks(name: str) -> list[Finding]:
    """Every notebook run to its end, with small sizes, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        ends = run_jobs(plan([name], find_notebooks(), Path(folder), {}, small=True))
    return [
        Finding(label, end.error or end.not_applicable or "done", None if end.not_applicable else not end.error)
        for label, end in sorted(ends.items())
    ]
