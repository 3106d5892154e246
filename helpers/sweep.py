"""The engine of exact sweeps: run a model from any block upwards, many edited rows at once.

A sweep walks up the unedited model once. At each layer every edit becomes a row of one batch,
and the rows go through the blocks above, which are the model's own, so that every architecture
is exact. Not run: the blocks below an edit; attention of the edited block, where the edit enters
after it; positions before the edit, whose keys and values are those of the clean run; of the
last block, positions that the metric does not read; the unembedding elsewhere than it reads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import Cache, DynamicCache

from helpers.stats import progress

Tokens = Int[Tensor, "prompt pos"]
Rows = Int[Tensor, "row"]  # which prompt each row of a batch is
Resid = Float[Tensor, "row pos d_model"]
Values = Float[Tensor, "row"]
Hooks = list[tuple[nn.Module, Callable]]  # modules and torch forward hooks


@dataclass(frozen=True)
class Metric:
    """One number for each prompt, from the logits at `positions` (negative: from the end).

    `of(logits[row, read, vocab], rows[row])` gives one number for each row.
    """

    positions: tuple[int, ...]
    of: Callable[[Float[Tensor, "row read vocab"], Rows], Values]


@dataclass
class Layer:
    """What the unedited run left at one block, for every prompt, at the last positions."""

    index: int
    resid: Float[Tensor, "prompt pos d_model"]  # entering the block
    out: Float[Tensor, "prompt out_pos d_model"]  # leaving the block
    seen: dict[str, Tensor]  # by name; always z, and attn: z @ W_O before any norm that follows


class _Stop(Exception):
    """Carries a value out of a block that need not run further."""


class _Cache(Cache):
    """Shows a block's new keys and values to `function`; the block uses what that returns."""

    def __init__(self, function):
        self.function = function

    def update(self, keys, values, *_, **__):
        return self.function(keys, values)


@contextmanager
def _hooked(hooks):
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(function).remove)
        yield


@contextmanager
def _instead(module: nn.Module, output):
    """Make a module return `output` without running."""
    # Not a plain assignment: a bridge component hands those on to the module it wraps.
    object.__setattr__(module, "forward", lambda *_, **__: output)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")


def _stopped(run, *args):
    """Run a block that stops early and take the value it stopped with."""
    try:
        run(*args)
    except _Stop as stop:
        return stop.args[0]


class Sweep:
    """A batch of prompts on a model, ready to be run from any block upwards.

    The first `n` prompts are measured; the others only lend activations. Edited rows are run
    from position `first` on. With `frozen`, every attention pattern stays as it was. `budget`
    is in bytes, by default twice what one plain forward pass takes. Every tensor covers the
    last positions of the prompts, as many as it has, so that slices count from the end.

    Raises:
        ValueError: the batch is empty or too long, or the metric reads a position that is not there.
    """

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Tokens,
        metric: Metric,
        n: int | None = None,
        first: int | None = None,
        frozen: bool = False,
        budget: int | None = None,
    ):
        read = check(model, tokens, metric)
        self.model, self.metric, self.blocks = model, metric, list(model.blocks)
        self.n_layers, self.n_heads = model.cfg.n_layers, model.cfg.n_heads
        # Nothing after the last position that is read can matter to a causal model.
        self.n, self.length = n or len(tokens), max(read) + 1
        self.tokens = tokens[:, : self.length].to(model.cfg.device)
        self.everyone = torch.arange(len(tokens), device=self.tokens.device)
        self.read_at = [position - self.length for position in read]
        self.cache, self.arguments = DynamicCache(), {}
        self.arguments[self.length], self.logits = self._watch(self.tokens[:1], self.cache)
        self.first = self._learn_suffix(min(first or 0, *read))
        # The last block need not be run before the first position that is read; but two positions
        # at least, because products with a single row round differently from the full run's.
        self.cut = self._learn_suffix(max(self.first, min(*read, self.length - 2)))
        self.budget = budget or 2 * self._forward_bytes(tokens.shape[1])
        self._prepare(frozen)

    # What the model itself hands to its blocks, learnt from one prompt, fits any batch.

    def _watch(self, prompt, cache):
        seen = []

        def keep(_, args, kwargs):
            seen.append((args[1:], dict(kwargs)))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            logits = self.model(prompt, past_key_values=cache)
        return seen, logits

    def _learn_suffix(self, start) -> int:
        """Learn to run from position `start` on; 0 where the model keeps no keys and values."""
        if self.cache.get_seq_length() != self.length:
            return 0
        if self.length - start not in self.arguments:
            cache = DynamicCache()
            for index, layer in enumerate(self.cache.layers):
                cache.update(layer.keys[:, :, :start], layer.values[:, :, :start], index)
            self.arguments[self.length - start], _ = self._watch(self.tokens[:1, start:], cache)
        return start

    def _call(self, layer, resid, function=None):
        cache = _Cache(function) if function else None
        args, kwargs = self.arguments[resid.shape[1]][layer]
        args = [cache if isinstance(value, Cache) else value for value in args]
        kwargs = {key: cache if isinstance(value, Cache) else value for key, value in kwargs.items()}
        out = self.blocks[layer](resid, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _prepare(self, frozen):
        """Walk up once for the keys and values before `first`, or for the patterns to freeze."""
        self.past, self.patterns = [], []
        resid = self.embed = self.model(self.tokens, stop_at_layer=0)
        for layer in range(self.n_layers if self.first or frozen else 0):
            past, patterns = [], []

            def keep(*new, past=past):
                past.append([x[:, :, : self.first] for x in new])
                return new

            hook = (self.blocks[layer].attn.hook_pattern, lambda *call, patterns=patterns: patterns.append(call[2]))
            with _hooked([hook] if frozen else []):
                keep = keep if self.first else None
                resid = torch.cat([self._call(layer, part, keep) for part in self._parts(resid)])
            if self.first:
                self.past.append([torch.cat(pair) for pair in zip(*past)])
            if frozen:
                self.patterns.append(torch.cat(patterns))

    # Memory, counted in numbers that a block, or a metric, holds at once for one position of one row.

    def _forward_bytes(self, length):
        cfg = self.model.cfg
        attention = 2 * cfg.d_model + self._qkv() + 4 * cfg.n_heads * length
        return 4 * self.n * length * max(attention, cfg.d_vocab)

    def _qkv(self):
        cfg = self.model.cfg
        return cfg.d_head * (cfg.n_heads + 2 * (cfg.n_key_value_heads or cfg.n_heads))

    def _rows_at_once(self, start: int) -> int:
        """How many rows fit that run from block `start` up."""
        cfg, length = self.model.cfg, self.length - self.first
        block = 5 * cfg.d_model  # of the last block, only keys and values are wanted at most positions
        if start < self.n_layers - 1 or self.cut == self.first:
            # GELU written out in elementary steps, as GPT-2's is, holds five of its inputs.
            widths = 4 if cfg.gated_mlp else 5 if cfg.act_fn == "gelu_new" else 2
            mlp = 0 if cfg.attn_only else widths * cfg.d_mlp
            attention = 2 * self._qkv() + 5 * cfg.n_heads * self.length
            block = 4 * cfg.d_model + max(mlp, attention)
        past = 4 * self.first * (self._qkv() - cfg.d_head * cfg.n_heads)
        frozen = 2 * cfg.n_heads * self.length * length if self.patterns else 0
        row = length * block + past + frozen + 2 * len(self.read_at) * cfg.d_vocab
        # The embeddings, and of the layer at hand what enters and leaves it, z and attention's output.
        held = len(self.tokens) * (self.length + 4 * length) * cfg.d_model
        held += sum(x.numel() for x in self.patterns) + sum(x.numel() for pair in self.past for x in pair)
        return max(1, int((self.budget / 4 - held) / row))

    def _parts(self, resid):
        """Prompts of the unedited run, as many at a time as one plain forward pass takes."""
        return resid.split(self.n)

    # Running upwards.

    def _join(self, layer, rows):
        """What gives a block the clean keys and values before `first`; None where there are none."""
        if not self.first:
            return None
        past = [x.index_select(0, rows) for x in self.past[layer]]
        return lambda *new: [torch.cat(pair, 2) for pair in zip(past, new)]

    def block(self, layer: int, resid: Resid, rows: Rows, hooks: Hooks = (), function=None) -> Resid:
        """Residual streams after one block."""
        if self.patterns:
            pattern = self.patterns[layer]
            freeze = lambda _, __, new: pattern[rows][..., -new.shape[2] :, -new.shape[3] :]  # noqa: E731
            hooks = [*hooks, (self.blocks[layer].attn.hook_pattern, freeze)]
        with _hooked(hooks):
            return self._call(layer, resid, function or self._join(layer, rows))

    def part(self, layer: int, resid: Resid, rows: Rows, module: nn.Module) -> Tensor:
        """What a module of a block gives, without running what follows it."""

        def stop(_, __, out):
            raise _Stop(out)

        return _stopped(self.block, layer, resid, rows, [(module, stop)])

    def last_block(self, resid: Resid, rows: Rows, hooks: Hooks = ()) -> Float[Tensor, "row out_pos d_model"]:
        """Residual streams after the last block, from the first position that is read on."""
        layer, length = self.n_layers - 1, self.length - self.cut
        if resid.shape[1] == length:
            return self.block(layer, resid, rows, hooks)
        keys_values = self._keys_values(layer, resid, rows, hooks)
        return self.block(layer, resid[:, -length:], rows, hooks, lambda *_: keys_values)

    def _keys_values(self, layer, resid, rows, hooks):
        """Keys and values of a block at all positions, without queries or what follows them."""
        queries, join = self.blocks[layer].attn.q, self._join(layer, rows)
        nothing = resid.new_zeros(1, 1, 1).expand(*resid.shape[:2], self.n_heads * self.model.cfg.d_head)
        hooks = [hook for hook in hooks if hook[0] is not queries]

        def stop(*new):
            raise _Stop(join(*new) if join else new)

        with _instead(queries, nothing):
            return _stopped(self.block, layer, resid, rows, hooks, stop)

    def from_block(self, layer: int, resid: Resid, rows: Rows, hooks: dict[int, Hooks] | None = None) -> Values:
        """The metric of rows whose residual streams enter block `layer`; `hooks` by layer."""
        hooks = hooks or {}
        for index in range(layer, self.n_layers - 1):
            resid = self.block(index, resid, rows, hooks.get(index, []))
        if layer < self.n_layers:
            resid = self.last_block(resid, rows, hooks.get(self.n_layers - 1, []))
        return self.read(resid, rows)

    def from_attention(self, layer: Layer, attn: Resid, rows: Rows) -> Values:
        """The metric of rows where attention of a block gives `attn`, before any norm that follows."""

        def clean(tensor):
            return tensor[:, -attn.shape[1] :].index_select(0, rows)

        if self.model.cfg.attn_only:
            out = clean(layer.resid) + attn
        elif self.model.cfg.parallel_attn_mlp:
            out = clean(layer.out) + (attn - clean(layer.seen["attn"]))
        else:
            with _instead(self.blocks[layer.index].attn, (attn, None)):
                out = self._call(layer.index, clean(layer.resid))
        del attn  # it would be held, in every row, while the blocks above run
        return self.from_block(layer.index + 1, out, rows)

    def after_attention(self, layer: Layer) -> int:
        """The first block of which an edit of what attention gives runs more than that edit."""
        cfg = self.model.cfg
        return layer.index + int(cfg.attn_only or cfg.parallel_attn_mlp)

    def read(self, resid: Resid, rows: Rows) -> Values:
        """The metric of rows whose residual streams leave the last block."""
        return self.metric.of(self._logits(resid), rows)

    def _logits(self, resid):
        return finite(self.model.unembed(self.model.ln_final(resid[:, self.read_at])))

    # Sweeping.

    def layers(self, **record: str) -> Iterator[Layer]:
        """Walk up the unedited model; afterwards `baseline` holds its metric.

        `record` maps names in `Layer.seen` to the modules of a block to keep the output of.
        """
        resid = self.embed[:, self.first :]
        for index in progress(range(self.n_layers), "layers"):
            layer = self._layer(index, resid, record)
            yield layer
            resid = layer.out
        self._follows(resid)
        self.baseline = self.read(resid[: self.n], self.everyone[: self.n])

    def _layer(self, index, resid, record):
        block, seen = self.blocks[index], {name: [] for name in ("z", "attn", *record)}

        def keep_z(_, args, out):
            seen["z"].append(args[0].unflatten(2, (self.n_heads, -1)))
            seen["attn"].append(out)

        def keep(name):
            # Of keys and values of the last block the first call has all positions.
            return lambda _, __, out: None if len(seen[name]) == len(outs) + 1 else seen[name].append(out)

        hooks = [(block.attn.o, keep_z), *((block.get_submodule(path), keep(name)) for name, path in record.items())]
        outs = []
        for part, rows in zip(self._parts(resid), self._parts(self.everyone)):
            last = index == self.n_layers - 1
            outs.append(self.last_block(part, rows, hooks) if last else self.block(index, part, rows, hooks))
        return Layer(index, resid, torch.cat(outs), {name: torch.cat(parts) for name, parts in seen.items()})

    def _follows(self, resid):
        """Refuse a model that does more than blocks, final norm and unembedding."""
        ours, theirs = self._logits(resid[:1]), self.logits[:, self.read_at]
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if error > 1e-3:
            raise RuntimeError(f"sweeps do not follow {self.model.cfg.architecture}: logits differ by {error:.1e}")

    def measure(self, n_items: int, edit: Callable[[Rows, Rows], Values], start: int) -> Float[Tensor, "prompt item"]:
        """`edit(items, rows)` on every item and prompt, as many at once as memory allows.

        `start` is the first block that edits run.
        """
        pairs = torch.arange(n_items * self.n, device=self.tokens.device)
        parts = [edit(part // self.n, part % self.n) for part in pairs.split(self._rows_at_once(start))]
        return torch.cat(parts).view(n_items, self.n).T


@contextmanager
def sweeping(*args, **kwargs) -> Iterator[Sweep]:
    """A `Sweep` without gradients that leaves the model exactly as it was, also when interrupted.

    Raises:
        RuntimeError: the model's weights or hooks changed all the same.
    """
    with torch.no_grad():
        sweep = Sweep(*args, **kwargs)
        before = _fingerprint(sweep.model)
        yield sweep
        if _fingerprint(sweep.model) != before:
            raise RuntimeError("the sweep changed the model's weights or hooks; load the model again")


def _fingerprint(model):
    weights = [(id(weight), weight._version) for weight in model.original_model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return weights, hooks


def check(model: TransformerBridge, tokens: Tokens, metric: Metric) -> list[int]:
    """The positions that a metric reads, counted from 0; see `Sweep` for what is refused."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"empty batch of shape {tuple(tokens.shape)}")
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"prompts of {tokens.shape[1]} tokens do not fit the context of {model.cfg.n_ctx}")
    return [position_in(tokens, position, "the metric reads") for position in metric.positions]


def position_in(tokens: Tokens, position: int, who: str) -> int:
    """A position counted from 0.

    Raises:
        ValueError: the prompts have no such position; `who` opens the message.
    """
    length = tokens.shape[1]
    if not -length <= position < length:
        raise ValueError(f"{who} position {position} of prompts that have {length} tokens")
    return position % length


def finite(logits: Float[Tensor, "row read vocab"]) -> Float[Tensor, "row read vocab"]:
    """Pass logits on.

    Raises:
        ValueError: a logit is nan.
    """
    if logits.max().isnan():
        row, read, token = logits.isnan().nonzero()[0].tolist()
        raise ValueError(f"logits are nan, first in row {row}, read position {read}, token {token}")
    return logits
