"""The engine of exact sweeps: run a model from any block upwards, many edited rows at once.

A sweep walks up the unedited model once. At each layer every edit becomes a row of one batch,
and the rows go through the blocks above, which are the model's own, so that every architecture
is exact. As far as memory allows, rows of all layers rise together and are unembedded together,
since a product with few rows costs nearly what one with many does. Not run: the blocks below an
edit; attention of the edited block, where the edit enters after it; positions before the edit,
whose keys and values are those of the clean run; of the last block, positions that the metric
does not read; the unembedding elsewhere than it reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import Cache, DynamicCache

from helpers.stats import progress

Tokens = Int[Tensor, "prompt pos"]
Rows = Int[Tensor, "row"]  # which prompt each row of a batch is
Resid = Float[Tensor, "row pos d_model"]
Values = Float[Tensor, "row"]
# Bytes of working set beyond which blocks, or the unembedding, gain nothing from more rows at once:
# the tensors leave the caches, and the system has to find new pages for them.
ENOUGH, ENOUGH_READ = 64 * 2**20, 512 * 2**20
Hooks = Sequence[tuple[nn.Module, Callable]]  # modules and torch forward hooks


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


@dataclass
class Batch:
    """Edited rows on their way up."""

    resid: Resid
    rows: Rows
    places: Int[Tensor, "row"]  # of their values among all that the sweep was asked for

    def chunks(self, size: int) -> Iterator["Batch"]:
        """Parts of at most `size` rows, of nearly equal size."""
        parts = (_evenly(x, size) for x in (self.resid, self.rows, self.places))
        return (Batch(*part) for part in zip(*parts))


def _evenly(tensor, size):
    """Parts of at most `size` along the first axis; none of an empty tensor."""
    n = -(-len(tensor) // size)
    return tensor.tensor_split(n) if n else ()


def _joined(batches):
    return Batch(*map(_cat, zip(*((batch.resid, batch.rows, batch.places) for batch in batches))))


def _cat(parts):
    """`torch.cat` that does not copy what is in one part already."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    """What `run` returns, or the value that it stopped with."""
    try:
        return run(*args)
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
        keeps = self.cache.get_seq_length() == self.length  # else positions cannot be run without earlier ones
        self.first = min(first or 0, *read) if keeps else 0
        self._learn_suffix(self.first)
        # The last block need not be run before the first position that is read; but two positions
        # at least, because products with a single row round differently from the full run's.
        self.cut = max(self.first, min(*read, self.length - 2)) if keeps else 0
        self.few_queries = getattr(self.blocks[-1].original_component, "few_queries", None)
        points = (module for module in self.blocks[-1].modules() if isinstance(module, HookPoint))
        self.watched = {point for point in points if point._forward_hooks}  # by whoever calls
        self.budget = budget or 2 * self._forward_bytes(tokens.shape[1])
        self.asked: list[int] = []  # how many items each call of `measure` has
        self.waiting: list[Batch] = []  # to enter the block that the walk comes to next
        self.unread: list[Batch] = []  # through the last block, at the positions that are read
        self.done: list[tuple[Tensor, Values]] = []  # places and values
        self.kept = 0  # numbers that the caller keeps of layers below
        self._prepare(frozen)

    # What the model itself hands to its blocks, learnt from one prompt, fits any batch.

    def _watch(self, prompt, cache):
        seen = []

        def keep(_, args, kwargs):
            seen.append((args[1:], dict(kwargs)))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            few = self.model.unembed.register_forward_pre_hook(lambda _, args: args[0][:, self.read_at])
            stack.callback(few.remove)
            return seen, self.model(prompt, past_key_values=cache)

    def _learn_suffix(self, start):
        """Learn to run from position `start` on."""
        if self.length - start not in self.arguments:
            cache = DynamicCache()
            for index, layer in enumerate(self.cache.layers):
                cache.update(layer.keys[:, :, :start], layer.values[:, :, :start], index)
            self.arguments[self.length - start], _ = self._watch(self.tokens[:1, start:], cache)

    def _call(self, layer, resid, function=None):
        cache = _Cache(function) if function else None
        args, kwargs = self.arguments[resid.shape[1]][layer]
        args = [cache if isinstance(value, Cache) else value for value in args]
        kwargs = {key: cache if isinstance(value, Cache) else value for key, value in kwargs.items()}
        out = self.blocks[layer](resid, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _prepare(self, frozen):
        """Walk up once for the keys and values that edited rows have before `first`, or for patterns to freeze."""
        self.past, self.patterns = [], []
        resid = self.embed = self.model(self.tokens, stop_at_layer=0)
        for layer in range(self.n_layers if self.first or frozen else 0):
            past, patterns = [], []

            def keep(*new, past=past, last=layer == self.n_layers - 1):
                past.append(new)
                if last and not frozen:
                    raise _Stop(new[0])  # nothing else of the last block is wanted
                return new

            hook = (self.blocks[layer].attn.hook_pattern, lambda *call, patterns=patterns: patterns.append(call[2]))
            with _hooked([hook] if frozen else []):
                keep = keep if self.first else None
                resid = _cat([_stopped(self._call, layer, part, keep) for part, _ in self._parts(layer, resid)])
            if self.first:
                self.past.append([_cat(parts) for parts in zip(*past)])
            if frozen:
                self.patterns.append(_cat(patterns))

    # Memory, counted in numbers that a block, or a metric, holds at once for one position of one row.

    def _forward_bytes(self, length):
        cfg = self.model.cfg
        attention = 2 * cfg.d_model + self._qkv() + 4 * cfg.n_heads * length
        return 4 * self.n * length * max(attention, cfg.d_vocab)

    def _qkv(self):
        cfg = self.model.cfg
        return cfg.d_head * (cfg.n_heads + 2 * (cfg.n_key_value_heads or cfg.n_heads))

    def width(self, layer: int) -> int:
        """Numbers held for one row that runs through block `layer`; none above the last."""
        cfg, length = self.model.cfg, self.length - self.first
        if layer == self.n_layers:
            return 0
        # GELU written out in elementary steps, as GPT-2's is, holds five of its inputs.
        widths = 4 if cfg.gated_mlp else 5 if cfg.act_fn == "gelu_new" else 2
        mlp = 0 if cfg.attn_only else widths * cfg.d_mlp
        copies = 2 if cfg.positional_embedding_type == "rotary" else 1  # before and after rotation
        whole = 4 * cfg.d_model + max(mlp, copies * self._qkv() + 5 * cfg.n_heads * self.length)
        if layer < self.n_layers - 1 or self.cut == self.first:
            block = length * whole
        else:  # at most positions of the last block only keys and values are wanted
            block = length * 5 * cfg.d_model + (self.length - self.cut) * whole
        past = 4 * self.first * (self._qkv() - cfg.d_head * cfg.n_heads)
        frozen = 2 * cfg.n_heads * self.length * length if self.patterns else 0
        return block + past + frozen

    def _rows(self, layer: int, width: int = 0) -> int:
        """How many rows to run at once through block `layer`, or through an edit that is wider."""
        return self._fit(max(width, self.width(layer)), ENOUGH)

    def _read_rows(self):
        width = 3 * self.model.cfg.d_model + 2 * self.model.cfg.d_vocab
        return self._fit(len(self.read_at) * width, ENOUGH_READ)

    def _fit(self, width, most):
        """How many rows of this width fit beside what is held, in `most` bytes."""
        # The embeddings, and of the layer at hand what enters and leaves it, z, attention's output, and an edit.
        held = len(self.tokens) * (self.length + 5 * (self.length - self.first)) * self.model.cfg.d_model
        held += sum(x.numel() for x in self.patterns) + sum(x.numel() for pair in self.past for x in pair)
        # Rows that wait are held twice while they are joined.
        held += self.kept + 2 * sum(batch.resid.numel() for batch in self.waiting + self.unread)
        return max(1, int(min(self.budget / 4 - held, most / 4) / width))

    def _parts(self, layer: int, resid) -> Iterator[tuple[Tensor, Rows]]:
        """Prompts of the unedited run and which they are, as many at a time as fit or are measured."""
        size = min(self.n, self._rows(layer))
        return zip(resid.split(size), self.everyone.split(size))

    # Running upwards.

    def _join(self, layer, rows):
        """What gives a block the clean keys and values before `first`; None where there are none."""
        if not self.first:
            return None

        def join(*new):
            joined = [x.index_select(0, rows) for x in self.past[layer]]
            for whole, late in zip(joined, new):
                whole[:, :, self.first :] = late
            return joined

        return join

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

    def last_block(
        self, layer: int, resid: Resid, rows: Rows, hooks: Hooks = ()
    ) -> Float[Tensor, "row out_pos d_model"]:
        """Residual streams after the last block, from the first position that is read on."""
        length = self.length - self.cut
        if resid.shape[1] == length:
            return self.block(layer, resid, rows, hooks)
        if few_queries := self._few_queries(hooks):
            with _hooked(hooks):
                return few_queries(resid, length)
        self._learn_suffix(self.cut)
        keys_values = self._keys_values(layer, resid, rows, hooks)
        return self.block(layer, resid[:, -length:], rows, hooks, lambda *_: keys_values)

    def _few_queries(self, hooks):
        """The last block's own way to run a few positions, where it has one and nothing but z is watched or changed."""
        if self.few_queries is None or self.first or self.patterns:
            return None
        watched = {module for module, _ in hooks} | self.watched
        return self.few_queries if watched <= set(self.blocks[-1].attn.o.modules()) else None

    def _keys_values(self, layer, resid, rows, hooks):
        """Keys and values of a block at all positions, without queries or what follows them."""
        queries, join = self.blocks[layer].attn.q, self._join(layer, rows)
        nothing = resid.new_zeros(1, 1, 1).expand(*resid.shape[:2], self.n_heads * self.model.cfg.d_head)
        hooks = [hook for hook in hooks if hook[0] is not queries]

        def stop(*new):
            raise _Stop(join(*new) if join else new)

        with _instead(queries, nothing):
            return _stopped(self.block, layer, resid, rows, hooks, stop)

    def through(self, layer: int, resid: Resid, rows: Rows, hooks: Hooks = ()) -> Float[Tensor, "row out_pos d_model"]:
        """Residual streams after a block; after the last one as `last_block` gives them."""
        return (self.last_block if layer == self.n_layers - 1 else self.block)(layer, resid, rows, hooks)

    def from_attention(self, layer: Layer, attn: Resid, rows: Rows) -> Resid:
        """Residual streams after a block whose attention gives `attn`, before any norm that follows."""

        def clean(tensor):
            return tensor[:, -attn.shape[1] :].index_select(0, rows)

        if self.model.cfg.attn_only:
            return clean(layer.resid).add_(attn)
        if self.model.cfg.parallel_attn_mlp:
            return clean(layer.out).add_(attn - clean(layer.seen["attn"]))
        with _instead(self.blocks[layer.index].attn, (attn, None)):
            return self._call(layer.index, clean(layer.resid))

    @property
    def attention_ends_block(self) -> bool:
        """Whether an edit of what attention gives leaves nothing of its block to run."""
        return self.model.cfg.attn_only or self.model.cfg.parallel_attn_mlp

    def _logits(self, resid):
        return finite(self.model.unembed(self.model.ln_final(resid)))

    # Sweeping.

    def layers(self, **record: str) -> Iterator[Layer]:
        """Walk up the unedited model; afterwards `baseline` holds its metric.

        `record` maps names in `Layer.seen` to the modules of a block to keep the output of. A layer is
        emptied before the next one comes.
        """
        resid = self.embed[:, self.first :]
        for index in progress(range(self.n_layers), "layers"):
            self._rise(index)
            layer = self._layer(index, resid, record)
            yield layer
            resid = layer.out
            # Whoever still has the layer shall not hold its tensors while the next one is computed.
            layer.resid = layer.out = layer.seen = None
        self.baseline = self._measure_unedited(resid)

    def _layer(self, index, resid, record):
        block, seen = self.blocks[index], {name: [] for name in ("out", "z", "attn", *record)}

        def keep_z(_, args, out):
            seen["z"].append(args[0].unflatten(2, (self.n_heads, -1)))
            seen["attn"].append(out)

        def keep(name):
            # Of keys and values of the last block the first call has all positions.
            return lambda _, __, out: None if len(seen[name]) > len(seen["out"]) else seen[name].append(out)

        hooks = [(block.attn.o, keep_z), *((block.get_submodule(path), keep(name)) for name, path in record.items())]
        for part, rows in self._parts(index, resid):
            seen["out"].append(self.through(index, part, rows, hooks))
        # One after the other, so that no more than one is there twice.
        seen = {name: _cat(seen.pop(name)) for name in list(seen)}
        return Layer(index, resid, seen.pop("out"), seen)

    def _measure_unedited(self, resid):
        values = []
        for rows in self.everyone[: self.n].split(self._read_rows()):
            logits = self._logits(resid[rows][:, self.read_at])
            if not values:
                self._follows(logits[:1])
            values.append(self.metric.of(logits, rows))
        return torch.cat(values)

    def _follows(self, ours):
        """Refuse a model that does more than blocks, final norm and unembedding."""
        error = float((ours - self.logits).abs().max() / self.logits.abs().max())
        if error > 1e-3:
            raise RuntimeError(f"sweeps do not follow {self.model.cfg.architecture}: logits differ by {error:.1e}")

    def measure(self, layer: int, n_items: int, edit: Callable[[Rows, Rows], Resid], width: int) -> None:
        """Ask for the metric of `edit(items, rows)`, which leave block `layer`, on every item and prompt.

        `width` is how many numbers the edit holds for one row; `values` has the answer.
        """
        pairs = torch.arange(n_items * self.n, device=self.tokens.device)
        start = self.n * sum(self.asked)
        for part in _evenly(pairs, self._rows(layer + 1, width)):
            items, rows = part // self.n, part % self.n
            batch = Batch(edit(items, rows), rows, start + part)
            waiting = sum(other.resid.numel() for other in [*self.waiting, batch])
            if layer + 1 < self.n_layers and waiting <= self.budget / 64:
                self.waiting.append(batch)
            else:
                self._up(batch, layer + 1, self.n_layers)
        self.asked.append(n_items)

    def _up(self, batch, start, end):
        """Take rows that enter block `start` up to block `end`."""
        for index in range(start, end):
            batch.resid = self.through(index, batch.resid, batch.rows)
        if end < self.n_layers:
            return self.waiting.append(batch)
        batch.resid = batch.resid[:, self.read_at]
        self.unread.append(batch)
        self._read(full=True)

    def _rise(self, index):
        """Let the rows that wait pass block `index`, so that those edited there can join them."""
        if not self.waiting:
            return
        size = self._rows(index)
        batch, self.waiting = _joined(self.waiting), []
        for part in batch.chunks(size):
            self._up(part, index, index + 1)

    def _read(self, full=False):
        """Measure the rows that are through; if `full`, only when they are as many as fit."""
        size = self._read_rows()
        if sum(len(batch.rows) for batch in self.unread) < (size if full else 1):
            return
        batch, self.unread = _joined(self.unread), []
        for part in batch.chunks(size):
            self.done.append((part.places, self.metric.of(self._logits(part.resid), part.rows)))

    def values(self) -> list[Float[Tensor, "prompt item"]]:
        """The metric that each call of `measure` asked for, once the walk is over."""
        self._read()
        nothing = self.everyone[:0], self.baseline[:0]
        places, values = (torch.cat(parts) for parts in zip(nothing, *self.done))
        values = values[places.argsort()].view(-1, self.n).T
        return list(values.split(self.asked, 1))


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
