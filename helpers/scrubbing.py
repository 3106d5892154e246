"""Causal scrubbing of two-layer attention-only models: a language of hypotheses, and their evaluator.

A hypothesis says from which datum, x or another one x', each part of the inputs of the induction heads is computed:
the embedding and, for every layer-0 head, a pattern and the values it weighs. Everything else runs on x.
Source: Lawrence Chan and others 2022, "Causal scrubbing: results on induction heads".
"""

from collections.abc import Sequence
from functools import cache
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
    parts, ends = [], [Hypothesis("", *[built] * 3) for built in (UNSCRUBBED, RESAMPLED)]
    for index, tokens in enumerate(prompts.tokens.tensor_split(-(-len(prompts.tokens) // POOL_SIZE))):
        pool = TextPool(model, tokens, induction, roles)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        pairings = [draw_rows(tokens[:, :-1], kinds or {}, generator) for _ in range(n_pairings)]
        found = [pool.losses(rows, [*hypotheses, *ends]) for rows in pairings]
        parts.append([torch.stack(each) for each in zip(*found)])
    silent, losses, moved = (torch.cat(each, -1).cpu() for each in zip(*parts))  # [pairing, .., text]
    moved = moved.double().sum((0, 2)).view(-1, 3)
    runs = [(h.name, part) for h in hypotheses for part in ("v", "q", "k", "all")]
    return Scrubbed(runs, losses[0, -5], silent[0], losses[:, -1], losses[:, :-8], 1 - moved[:-2] / moved[-1])


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
    """What a model computes on a pool of texts, from which the inputs of its induction heads are built."""

    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "text pos_1"], induction, roles: Roles):
        self.model, self.answers, self.induction, self.roles = model, tokens[:, -1], list(induction), roles
        self.positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)

        def silence(z, hook):
            z[:, -1, self.induction] = 0
            return z

        hooks = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_v", "hook_resid_post")
        names = [*(f"blocks.0.{hook}" for hook in hooks), "blocks.1.hook_resid_post"]
        with model.hooks([("blocks.1.attn.hook_z", silence)]):
            _, cache = model.run_with_cache(tokens[:, :-1], names_filter=names)
        self.embedding, self.pattern, self.v, self.on_x, silent = (cache[name] for name in names)
        self.silent = silent[:, -1]

    def losses(self, rows: Rows, hypotheses: Sequence[Hypothesis]) -> tuple[Tensor, ...]:
        """Loss of silence [text] and of every run [run, text]; squared distance of each input from x [input, text]."""
        stream = cache(lambda built: self.residual(built, rows))
        project = cache(lambda kind, built: self.project(kind, stream(built)))

        def at_the_end(written) -> Float[Tensor, "text"]:
            logits = self.model.unembed(self.model.ln_final((self.silent + written)[:, None]))[:, 0]
            return F.cross_entropy(logits, self.answers, reduction="none")

        def loss(v=UNSCRUBBED, q=UNSCRUBBED, k=UNSCRUBBED) -> Float[Tensor, "text"]:
            query = project("q", q)[:, :, -1:]  # only the last position attends
            z = F.scaled_dot_product_attention(query, project("k", k), project("v", v))
            return at_the_end(z.flatten(1) @ self.model.W_O[1][self.induction].flatten(0, 1))

        runs, moved = [], []
        for _, v, q, k in hypotheses:
            runs += [loss(v=v), loss(q=q), loss(k=k), loss(v, q, k)]
            of_v, of_q, of_k = ((stream(built) - stream(UNSCRUBBED)).square().sum(2) for built in (v, q, k))
            moved += [of_v.sum(1), of_q[:, -1], of_k.sum(1)]
        return at_the_end(0), torch.stack(runs), torch.stack(moved)

    def residual(self, built: Input, rows: Rows) -> Float[Tensor, "text pos d_model"]:
        """The residual stream before layer 1 that an input is projected from."""
        z = torch.empty_like(self.v.transpose(1, 2))  # [text, head, pos, d_head]
        fed = [(built.rest, range(self.model.cfg.n_heads)), *((rule, self.roles[role]) for role, rule in built.roles)]
        for rule, heads in fed:
            head = torch.tensor(heads, device=z.device)[:, None]
            pattern = self.pattern[rows[rule.pattern][:, None], head, self.positions]  # [text, head, query, key]
            on_x, values = (self.v[rows[of][:, None], self.positions, head] for of in (X, rule.values))
            given = pattern @ values
            for offset in rule.from_x:
                weight = pattern.diagonal(-offset, 2, 3)[..., None]  # of queries from `offset` on
                weight = torch.ones_like(weight) if rule.identity and offset == 0 else weight
                given[:, :, offset:] += weight * (on_x - values)[:, :, : len(self.positions) - offset]
            z[:, heads] = given
        embedding = self.embedding[rows[built.embedding], self.positions]
        return embedding + z.transpose(1, 2).flatten(2) @ self.model.W_O[0].flatten(0, 1) + self.model.b_O[0]

    def project(self, kind: str, residual: Float[Tensor, "text pos d_model"]) -> Float[Tensor, "text head pos d_head"]:
        """Queries, keys or values of the induction heads from the residual stream before them."""
        x = self.model.blocks[1].ln1(residual)
        if kind != "v" and isinstance(self.model.original_model, ShortformerModel):
            x = x + self.model.W_pos[: len(self.positions)]
        weight, bias = (getattr(self.model, f"{letter}_{kind.upper()}")[1][self.induction] for letter in "Wb")
        return torch.einsum("bqm,hmd->bhqd", x, weight) + bias[:, None]
