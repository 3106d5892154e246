"""Causal scrubbing of two-layer attention-only models: the evaluator of `helpers.hypotheses`.

Only the inputs of the induction heads are built as a hypothesis says; everything else runs on x.
Source: Lawrence Chan and others 2022, "Causal scrubbing: results on induction heads".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.hypotheses import OTHER, RESAMPLED, UNSCRUBBED, Hypothesis, Input, Rule, X
from helpers.prompts import Prompts, derangement
from helpers.shortformer import ShortformerModel
from helpers.stats import bootstrap_weights, progress

Roles = dict[str, tuple[int, ...]]  # named groups of layer-0 heads
Kinds = dict[str, Int[Tensor, "d_vocab"]]  # the kind of each token, under a name that rules use
Rows = dict[str, Int[Tensor, "text pos"]]  # for every datum a rule may name: which text of the pool stands for it


@dataclass(frozen=True)
class Scrubbed:
    """Losses in nats on the answers; `runs` names what was scrubbed, as (hypothesis, "v", "q", "k" or "all").

    `silent_loss` is that of the model whose induction heads give nothing at the last position.
    `closeness[hypothesis, kind]` is how near to x a hypothesis leaves an input, between x' (0) and
    x (1): 1 - |built - input on x|^2 / |input on x' - input on x|^2, summed over texts.
    """

    runs: list[tuple[str, str]]
    model_loss: Float[Tensor, "text"]
    silent_loss: Float[Tensor, "text"]
    resampled_loss: Float[Tensor, "pairing text"]
    scrubbed_loss: Float[Tensor, "pairing run text"]
    closeness: dict[tuple[str, str], float]


def why_not(model: TransformerBridge) -> str:
    """Why the two-layer rewrite does not hold for a model; empty where it does."""
    cfg, reasons = model.cfg, []
    if cfg.n_layers != 2:
        reasons.append(f"{cfg.n_layers} layer(s)")
    if not cfg.attn_only:
        reasons.append("MLPs")
    if cfg.positional_embedding_type != "standard":
        reasons.append(f"{cfg.positional_embedding_type} positions")
    return f"{cfg.model_name} has {' and '.join(reasons)}" if reasons else ""


def scrub(
    model: TransformerBridge,
    prompts: Prompts,
    hypotheses: Sequence[Hypothesis],
    induction: Sequence[int],
    roles: Roles,
    kinds: Kinds | None = None,
    n_pairings: int = 3,
    seed: int = 0,
    pool_size: int = 64,
    independent: bool = False,
) -> Scrubbed:
    """Run every hypothesis for the V, Q and K inputs of the `induction` heads alone, and together.

    A text's x' is another text of its pool, the same for all hypotheses of a pairing; with
    `independent`, V, Q and K each draw their own.

    Raises:
        ValueError: the model is not one of two attention layers, or there are fewer than 2 texts.
    """
    if reason := why_not(model):
        raise ValueError(f"{reason}; the rewrite holds for two layers of attention alone")
    if len(prompts.tokens) < 2:
        raise ValueError(f"{len(prompts.tokens)} text has no other to be paired with")
    pools, results = prompts.tokens.tensor_split(-(-len(prompts.tokens) // pool_size)), []
    with torch.inference_mode():
        for index, tokens in enumerate(progress(pools, "scrubbing")):
            pool = TextPool(model, tokens[:, :-1], induction, roles)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            draws = [draw_rows(tokens[:, :-1], kinds or {}, independent, generator) for _ in range(n_pairings)]
            results.append([_losses(pool, tokens[:, -1], hypotheses, rows) for rows in draws])
    model_loss, silent, resampled, scrubbed, distance = (
        torch.stack([torch.cat([pool[i][part] for pool in results], -1) for i in range(n_pairings)]).cpu()
        for part in range(5)
    )
    moved, full = distance.double().sum((0, 3)).unbind(-1)
    inputs = [(h.name, kind) for h in hypotheses for kind in "vqk"]
    runs = [(h.name, kind) for h in hypotheses for kind in ("v", "q", "k", "all")]
    closeness = dict(zip(inputs, (1 - moved / full).tolist()))
    return Scrubbed(runs, model_loss[0], silent[0], resampled, scrubbed, closeness)


def draw_rows(tokens: Int[Tensor, "text pos"], kinds: Kinds, independent: bool, generator) -> dict[str, Rows]:
    """For each of V, Q and K, the texts that "x", "x'" and kinds of token stand for, by text and position."""
    drawn: dict[str, Rows] = {}
    for kind in "vqk":
        if independent or not drawn:
            texts = torch.arange(len(tokens)), derangement(len(tokens), generator)
            rows = {name: row.to(tokens.device)[:, None].expand_as(tokens) for name, row in zip((X, OTHER), texts)}
            rows |= {name: alike(of.to(tokens.device)[tokens], rows[OTHER], generator) for name, of in kinds.items()}
        drawn[kind] = rows
    return drawn


def alike(kind: Int[Tensor, "text pos"], otherwise: Int[Tensor, "text pos"], generator) -> Int[Tensor, "text pos"]:
    """At every position another text whose kind there is the same; `otherwise` where there is none."""
    order = torch.rand(len(kind), *kind.shape, generator=generator).to(kind.device)
    same = (kind[:, None] == kind[None]) & ~torch.eye(len(kind), dtype=torch.bool, device=kind.device)[..., None]
    best, row = (order * same).max(1)
    return torch.where(best > 0, row, otherwise)


class TextPool:
    """What a model computes on a pool of texts, done once; the inputs of its induction heads are built from it."""

    def __init__(
        self, model: TransformerBridge, tokens: Int[Tensor, "text pos"], induction: Sequence[int], roles: Roles
    ):
        self.model, self.induction, self.roles = model, list(induction), roles
        names = [f"blocks.0.{name}" for name in ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "attn.hook_z")]
        names += ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
        # A few texts at a time, and the unembedding at one position: attention and logits are the largest tensors.
        with model.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:])]):
            caches = [model.run_with_cache(part, names_filter=names)[1] for part in tokens.split(16)]
        self.embedding, pattern, self.v, self.z, self.on_x, z, final = (
            torch.cat([cache[name] for cache in caches]) for name in names
        )
        self.pattern = pattern.transpose(1, 2)  # [text, query, head, key]
        self.z_induction, self.final = z[:, -1, self.induction], final[:, -1]

    def residual(self, built: Input, rows: Rows) -> Float[Tensor, "text pos d_model"]:
        """The residual stream before layer 1 that an input is projected from."""
        named = {head: rule for role, rule in built.roles for head in self.roles[role]}
        rules = [named.get(head, built.rest) for head in range(self.model.cfg.n_heads)]
        z = torch.empty_like(self.z)
        for rule in set(rules):
            heads = [head for head, its in enumerate(rules) if its == rule]
            # Indexing by a list copies, which all heads together need not.
            heads = slice(None) if len(heads) == len(rules) else heads
            z[:, :, heads] = self.head_outputs(rule, heads, rows)
        out = z.flatten(2) @ self.model.W_O[0].flatten(0, 1) + self.model.b_O[0]
        return out + _pick(self.embedding, rows[built.embedding])

    def head_outputs(self, rule: Rule, heads: list[int] | slice, rows: Rows) -> Float[Tensor, "text pos head d_head"]:
        """z of layer-0 heads under a rule."""
        pattern_row, v = rows[rule.pattern], self.v[:, :, heads]
        v_other = _pick(v, rows[rule.values])
        if rule.pattern == rule.values:
            z = _pick(self.z[:, :, heads], pattern_row)
        else:
            z = torch.einsum("bqhk,bkhd->bqhd", _pick(self.pattern[:, :, heads], pattern_row), v_other)
        gap = v - v_other
        for offset in rule.from_x if rule.values == OTHER else ():
            n = z.shape[1] - offset
            weight = self.pattern.diagonal(-offset, 1, 3)[:, heads].mT  # [text, query from offset, head]
            weight = _pick(weight, pattern_row[:, offset:])[..., None]
            weight = torch.ones_like(weight) if rule.identity and offset == 0 else weight
            z[:, offset:].addcmul_(weight, gap[:, :n])
        return z

    def project(self, kind: str, residual: Float[Tensor, "text pos d_model"]) -> Float[Tensor, "text pos head d_head"]:
        """Queries, keys or values of the induction heads from a residual stream before layer 1."""
        x = self.model.blocks[1].ln1(residual)
        if kind != "v" and isinstance(self.model.original_model, ShortformerModel):
            x = x + self.model.W_pos[: x.shape[1]]
        weight, bias = (getattr(self.model, f"{letter}_{kind.upper()}")[1][self.induction] for letter in "Wb")
        return torch.einsum("bqm,hmd->bqhd", x, weight) + bias

    def loss(self, z: Float[Tensor, "text head d_head"], answers: Int[Tensor, "text"]) -> Float[Tensor, "text"]:
        """Loss (nats) when `z` is what the induction heads give at the last position."""
        change = (z - self.z_induction).flatten(1) @ self.model.W_O[1][self.induction].flatten(0, 1)
        logits = self.model.unembed(self.model.ln_final((self.final + change)[:, None]))[:, 0]
        return F.cross_entropy(logits, answers, reduction="none")


def _pick(tensor: Tensor, row: Int[Tensor, "text pos"]):
    """tensor[row[text, pos], pos]: what each position has in the text that stands for its own."""
    return tensor[row, torch.arange(row.shape[1], device=row.device)]


def _losses(pool: TextPool, answers, hypotheses, rows: dict[str, Rows]) -> tuple[Tensor, ...]:
    """Losses [.., text] of model, silence, resampling and every run, and distances [hypothesis x kind, 2, text]."""
    made: dict = {}

    def projected(kind: str, built: Input) -> tuple[Tensor, Tensor]:
        at = slice(-1, None) if kind == "q" else slice(None)  # queries matter at the last position only
        stream = id(rows[kind]), built  # V, Q and K mostly share their draw, and then their streams
        if stream not in made:
            made[stream] = pool.residual(built, rows[kind])
        if (kind, built) not in made:
            residual = made[stream]
            distance = (residual - pool.on_x)[:, at].square().sum((1, 2))
            made[kind, built] = pool.project(kind, residual)[:, at], distance
        return made[kind, built]

    def loss(**inputs: Input) -> Tensor:
        q, k, v = (projected(kind, inputs.get(kind, UNSCRUBBED))[0] for kind in "qkv")
        scores = torch.einsum("bqhd,bkhd->bhk", q, k) / math.sqrt(q.shape[-1])
        return pool.loss(torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v), answers)

    runs, distances = [], []
    for hypothesis in hypotheses:
        inputs = {kind: getattr(hypothesis, kind) for kind in "vqk"}
        runs += [loss(**{kind: built}) for kind, built in inputs.items()] + [loss(**inputs)]
        distances += [torch.stack([projected(k, i)[1] for i in (b, RESAMPLED)]) for k, b in inputs.items()]
    silent = pool.loss(torch.zeros_like(pool.z_induction), answers)
    return loss(), silent, loss(v=RESAMPLED, q=RESAMPLED, k=RESAMPLED), torch.stack(runs), torch.stack(distances)


def recovery_draws(
    result: Scrubbed, n_resamples: int = 1000, seed: int = 0, from_silence: bool = False
) -> Float[np.ndarray, "draw run"]:
    """Loss recovered, (resampled - scrubbed) / (resampled - model): the estimate, then bootstrap draws.

    Texts and pairings are both drawn with replacement, the same for all runs, so that differences
    between runs can be taken draw by draw; see `stats.estimate_of_draws`. `from_silence` puts the
    scale's zero at the silenced induction heads instead of the resampled ones.
    """
    rng = np.random.default_rng(seed)
    n_pairings, n_texts = result.resampled_loss.shape
    texts, pairings = (
        np.concatenate([np.full((1, n), 1 / n), bootstrap_weights(n, n_resamples, rng)]) for n in (n_texts, n_pairings)
    )
    losses = torch.cat([result.scrubbed_loss, result.resampled_loss[:, None]], dim=1).double().numpy()
    means = np.einsum("rp,pcr->rc", pairings, losses @ texts.T)
    model, silent = (texts @ loss.double().numpy()[:, None] for loss in (result.model_loss, result.silent_loss))
    scrubbed, worst = means[:, :-1], silent if from_silence else means[:, -1:]
    return (worst - scrubbed) / (worst - model)
