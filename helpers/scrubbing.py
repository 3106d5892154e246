"""Causal scrubbing of two-layer attention-only models: a language of hypotheses, and their evaluator.

A hypothesis says from which datum, x or another one x', each part of the inputs of the induction heads is computed:
the embedding and, for every layer-0 head, a pattern and the values it weighs. Everything else runs on x.
Source: Lawrence Chan and others 2022, "Causal scrubbing: results on induction heads".
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from helpers.metrics import share
from helpers.prompts import Prompts, derangement
from helpers.shortformer import ShortformerModel

Roles = dict[str, tuple[int, ...]]  # named groups of layer-0 heads
Kinds = dict[str, Int[Tensor, "d_vocab"]]  # the kind of each token, under a name that rules use
Rows = dict[str, Int[Tensor, "text pos"]]  # for every datum a rule may name: which text of the pool stands for it
X, OTHER = "x", "x'"
POOL_SIZE = 64  # texts among which another is drawn
AT_A_TIME = 8  # of them: larger batches of patterns and residual streams are slower, not faster


class Rule(NamedTuple):
    """How one layer-0 head is fed: a pattern, and the values that it weighs, each from "x" or "x'".

    The pattern may also name a kind of token: a query takes it from a text with the same kind there. `from_x` lists
    offsets back from the query at which values come from x all the same. With `identity` the value at offset 0 has
    weight 1: an identity on x, and the head's error on the other datum.
    """

    pattern: str = OTHER
    values: str = OTHER
    from_x: tuple[int, ...] = ()
    identity: bool = False


class Input(NamedTuple):
    """One input of the induction heads: its embedding, a rule for most heads, and rules for named groups of heads."""

    embedding: str
    rest: Rule
    roles: tuple[tuple[str, Rule], ...] = ()


class Hypothesis(NamedTuple):
    """What the V, Q and K inputs of the induction heads are said to depend on."""

    name: str
    v: Input
    q: Input
    k: Input


WHOLE, SCRUBBED = Rule(X, X), Rule()
UNSCRUBBED, RESAMPLED = Input(X, WHOLE), Input(OTHER, SCRUBBED)


class Scrubbed(NamedTuple):
    """Losses in nats on the answers; `runs` names what was scrubbed, as (hypothesis, "v", "q", "k" or "all").

    `silent_loss`: the induction heads give nothing at the last position. `kept`: of the squared distance
    between an input (v, q or k) on x and on x', summed over texts, the share that a hypothesis keeps.
    """

    runs: list[tuple[str, str]]
    model_loss: Float[Tensor, "text"]
    silent_loss: Float[Tensor, "text"]
    resampled_loss: Float[Tensor, "pairing text"]
    scrubbed_loss: Float[Tensor, "pairing run text"]
    kept: Float[Tensor, "hypothesis input"]

    @property
    def worth(self) -> Float[Tensor, "text"]:
        """What the induction heads save: the loss with them silent minus the model's, in nats."""
        return self.silent_loss - self.model_loss

    def recovered(self, from_silence: bool = True) -> Float[Tensor, "text run"]:
        """Loss recovered as in `metrics.share`: 1 is the model, 0 silence, or resampled heads as in the post."""
        worst = self.silent_loss if from_silence else self.resampled_loss.mean(0)
        return share(worst[:, None] - self.scrubbed_loss.mean(0).T, worst - self.model_loss)


def why_not(model: TransformerBridge) -> str:
    """Why the two-layer rewrite does not hold for a model; empty where it does."""
    cfg, positions = model.cfg, model.cfg.positional_embedding_type
    if cfg.n_layers == 2 and cfg.attn_only and positions == "standard":
        return ""
    found = f"{cfg.n_layers} layer(s){'' if cfg.attn_only else ' with MLPs'} and {positions} positions"
    return f"{cfg.model_name} has {found}; the rewrite is for two layers of attention with positions of their own"


def contexts(texts: Int[Tensor, "text pos"], allowed: Bool[Tensor, "d_vocab"], length: int, seed: int = 0) -> Prompts:
    """From each text a context of `length` tokens, BOS first, that ends on an allowed token; the next is the answer.

    Raises ValueError where no text has an allowed token at position `length` - 1 or later.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for text in texts.cpu():
        ends = length - 1 + allowed[text[length - 1 : -1]].nonzero()[:, 0]
        if len(ends):
            end = int(ends[torch.randint(len(ends), (), generator=generator)])
            found.append(torch.cat([text[:1], text[end - length + 2 : end + 2]]))
    if not found:
        raise ValueError(f"none of {len(texts)} texts has an allowed token at position {length - 1} or later")
    return Prompts(torch.stack(found).to(texts.device))


@torch.inference_mode()
def scrub(
    model: TransformerBridge, prompts: Prompts, hypotheses: Sequence[Hypothesis], induction: Sequence[int],
    roles: Roles, kinds: Kinds | None = None, n_pairings: int = 3, seed: int = 0,
) -> Scrubbed:  # fmt: skip
    """Run every hypothesis for the V, Q and K inputs of the `induction` heads of layer 1 alone, and together.

    x' is another text of the pool, one for all hypotheses and inputs of a pairing. Raises ValueError where `why_not`
    gives a reason, or there is only 1 text.
    """
    if reason := why_not(model) or ("1 text has no other to be paired with" if len(prompts.tokens) < 2 else ""):
        raise ValueError(reason)
    pools, found = prompts.tokens.tensor_split(-(-len(prompts.tokens) // POOL_SIZE)), [[] for _ in range(n_pairings)]
    for index, tokens in enumerate(pools):
        pool = TextPool(model, tokens[:, :-1], induction, roles)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        for losses in found:
            rows = draw_rows(tokens[:, :-1], kinds or {}, generator)
            parts = zip(*(row.split(AT_A_TIME) for row in rows.values()))
            losses += [_losses(pool, tokens[:, -1], hypotheses, dict(zip(rows, part))) for part in parts]
    pairings = [[torch.cat(parts, -1) for parts in zip(*losses)] for losses in found]
    model_loss, silent, resampled, scrubbed, distance = (torch.stack(parts).cpu() for parts in zip(*pairings))
    moved, full = distance.double().sum((0, 3)).unbind(-1)
    runs = [(h.name, part) for h in hypotheses for part in ("v", "q", "k", "all")]
    return Scrubbed(runs, model_loss[0], silent[0], resampled, scrubbed, (1 - moved / full).view(-1, 3))


def draw_rows(tokens: Int[Tensor, "text pos"], kinds: Kinds, generator: torch.Generator) -> Rows:
    """The texts that "x", "x'" and kinds of token (another with the same kind there, or x') stand for."""
    texts = {X: torch.arange(len(tokens)), OTHER: derangement(len(tokens), generator)}
    rows = {name: row.to(tokens.device)[:, None].expand_as(tokens) for name, row in texts.items()}
    others = ~torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)[..., None]
    for name, kind in kinds.items():
        of = kind.to(tokens.device)[tokens]
        order = torch.rand(len(tokens), *tokens.shape, generator=generator).to(tokens.device)
        best, row = (order * (of[:, None] == of[None]) * others).max(1)
        rows[name] = torch.where(best > 0, row, rows[OTHER])
    return rows


class TextPool:
    """What a model computes on a pool of texts, from which the inputs of its induction heads are built.

    `rows` of one column, the last, stand for the last position; residual streams are built there alone.
    """

    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "text pos"], induction, roles: Roles):
        self.model, self.induction, self.roles = model, list(induction), roles
        self.positions, everyone = torch.arange(tokens.shape[1], device=tokens.device), range(model.cfg.n_heads)
        hooks = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "attn.hook_z", "hook_resid_post")
        names = [f"blocks.0.{hook}" for hook in hooks]
        runs = [model.run_with_cache(part, names_filter=names, stop_at_layer=1)[1] for part in tokens.split(AT_A_TIME)]
        self.embedding, self.pattern, self.v, self.z, self.on_x = (torch.cat([c[n] for c in runs]) for n in names)
        read = {"q": self.on_x[:, -1:], "k": self.on_x, "v": self.on_x}  # only the last position attends
        z = _attend(*(self.project(kind, stream, everyone) for kind, stream in read.items()))
        z[:, self.induction] = 0
        self.silent = self.on_x[:, -1] + z.flatten(1) @ model.W_O[1].flatten(0, 1) + model.b_O[1]

    def residual(self, built: Input, rows: Rows, output: Callable) -> Float[Tensor, "text pos d_model"]:
        """The residual stream before layer 1 that an input is projected from; `output` is `head_outputs` on `rows`."""
        z = output(built.rest, tuple(range(self.model.cfg.n_heads))).clone()
        for role, rule in built.roles:
            z[:, :, self.roles[role]] = output(rule, self.roles[role])
        embedding = _pick(self.embedding, rows[built.embedding])
        return embedding + z.flatten(2) @ self.model.W_O[0].flatten(0, 1) + self.model.b_O[0]

    def head_outputs(self, rows: Rows, rule: Rule, heads: tuple[int, ...]) -> Float[Tensor, "text pos head d_head"]:
        """z of layer-0 heads under a rule."""

        def values(of: str, keys: Tensor) -> Tensor:
            return self.v[rows[of][:, :1], keys][:, :, heads]

        row, at = rows[rule.pattern], self.positions[-rows[X].shape[1] :]
        if rule.pattern == rule.values and rule.pattern in (X, OTHER):  # one text, on which the model has run
            z = _pick(self.z, row)[:, :, heads]
        else:
            pattern = self.pattern[:, heads][row, :, at]
            z = torch.einsum("bqhk,bkhd->bqhd", pattern, values(rule.values, self.positions))
        for offset in rule.from_x:
            keys = (at - offset).clamp(min=0)
            weight = self.pattern[row, :, at, keys][..., heads] * (at >= offset)[:, None]  # [text, query, head]
            weight = torch.ones_like(weight) if rule.identity and offset == 0 else weight
            z = z + weight[..., None] * (values(X, keys) - values(rule.values, keys))
        return z

    def project(self, kind: str, residual: Float[Tensor, "text pos d_model"], heads) -> Float[Tensor, "text pos n d"]:
        """Queries, keys or values of layer-1 heads from the residual stream before them, to its last position."""
        x, end = self.model.blocks[1].ln1(residual), len(self.positions)
        if kind != "v" and isinstance(self.model.original_model, ShortformerModel):
            x = x + self.model.W_pos[end - x.shape[1] : end]
        weight, bias = (getattr(self.model, f"{letter}_{kind.upper()}")[1][list(heads)] for letter in "Wb")
        return torch.einsum("bqm,hmd->bqhd", x, weight) + bias

    def loss(self, z: Float[Tensor, "run text head d_head"], answers, texts) -> Float[Tensor, "run text"]:
        """Losses (nats) when `z` is what the induction heads give at the last position of these texts of the pool."""
        final = self.silent[texts] + z.flatten(2) @ self.model.W_O[1][self.induction].flatten(0, 1)
        logits = self.model.unembed(self.model.ln_final(final))
        return F.cross_entropy(logits.transpose(1, 2), answers[texts].expand(len(z), -1), reduction="none")


def _pick(tensor: Tensor, row: Int[Tensor, "text pos"]):
    """tensor[row[text, pos], pos], to the last position: what each has in the text that stands for its own."""
    return tensor[row, torch.arange(tensor.shape[1], device=row.device)[-row.shape[1] :]]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "text head d_head"]:
    """z at the last position, whose query stands alone in `q`."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))[:, :, 0]


def _losses(pool: TextPool, answers, hypotheses, rows: Rows) -> tuple[Tensor, ...]:
    """Losses [.., text] of model, silence, resampling and every run, and distances [hypothesis x kind, 2, text]."""
    last = {name: row[:, -1:] for name, row in rows.items()}  # queries matter at the last position only
    sources = [(where, cache(partial(pool.head_outputs, where))) for where in (rows, last)]

    @cache
    def projected(kind: str, built: Input) -> tuple[Tensor, Tensor]:
        where, output = sources[kind == "q"]
        recorded = {built: _pick(pool.on_x, where[of]) for built, of in ((UNSCRUBBED, X), (RESAMPLED, OTHER))}
        residual = recorded[built] if built in recorded else pool.residual(built, where, output)
        return pool.project(kind, residual, pool.induction), (residual - recorded[UNSCRUBBED]).square().sum((1, 2))

    def attended(**inputs: Input) -> Tensor:
        return _attend(*(projected(kind, inputs.get(kind, UNSCRUBBED))[0] for kind in "qkv"))

    inputs = [{kind: getattr(hypothesis, kind) for kind in "vqk"} for hypothesis in hypotheses]
    parts = [part for all_three in inputs for part in (*({k: i} for k, i in all_three.items()), all_three)]
    on_x = attended()
    z = [on_x, torch.zeros_like(on_x), attended(v=RESAMPLED, q=RESAMPLED, k=RESAMPLED)]
    losses = pool.loss(torch.stack(z + [attended(**part) for part in parts]), answers, rows[X][:, 0])
    pairs = [(kind, built) for all_three in inputs for kind, built in all_three.items()]
    distances = [torch.stack([projected(kind, i)[1] for i in (built, RESAMPLED)]) for kind, built in pairs]
    return *losses[:3], losses[3:], torch.stack(distances)
