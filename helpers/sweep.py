"""The engine of exact sweeps: run a batch of prompts once, then many edited rows upwards from any block.

The unedited run leaves a record: what enters and leaves every block, and parts of it. An edit is a row of a batch,
which goes up through the model's own blocks, so that every architecture is exact. Rows are
[item * prompt, pos, d_model]: every item of a sweep has all prompts.

Not run: the blocks below an edit; attention of the edited block, where the edit enters after it; positions
before `first`, whose keys and values are those of the unedited run; in the last block, queries before the
first position that the metric reads; the unembedding elsewhere than it reads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from helpers.blocks import PARTS, Shown, Stop, by_head, hooked, instead, like, only_tensor, stopped, times
from helpers.metrics import Metric, Tokens, final_logits, positions_read

ENOUGH = 64 * 2**20  # bytes of activations beyond which more rows at once gain nothing on a CPU


class Sweep:
    """A batch of prompts on a model: its record, its `baseline` metric, and the way up for edited rows.

    The first `n` prompts are measured; the others only lend activations. Rows start at position `first`.
    With `frozen`, every attention pattern stays as it was. `record[part][layer]`, as in `by_head`, holds what enters
    ("resid") and leaves ("out") a block, z, attn, and `parts` (of PARTS).

    Raises:
        ValueError: the batch is empty or too long, or the metric reads a position that is not there.
        RuntimeError: the model does more than blocks, final norm and unembedding.
    """

    def __init__(
        self, model: TransformerBridge, tokens: Tokens, metric: Metric,
        n: int | None = None, first: int | None = None, frozen: bool = False, parts: Sequence[str] = (),
    ):  # fmt: skip
        read = positions_read(model, tokens, metric)
        self.model, self.metric, self.blocks, self.n = model, metric, list(model.blocks), n or len(tokens)
        # Nothing after the last position that is read can matter to a causal model.
        self.length, self.first = max(read) + 1, min(first or 0, *read)
        self.read = [position - self.length for position in read]
        self.tokens, self.frozen = tokens[:, : self.length].to(model.cfg.device), frozen
        self.gives, self.calls = {}, {}
        parts = ["resid", "out", "z", "attn", "attention", *parts, *(["pattern"] if frozen else [])]
        self.record = {part: [] for part in parts}
        logits = self._run()
        # BLOOM's attention adds the residual stream itself, so it is more than what o gives.
        self.ends_in_o = torch.equal(self.record["attention"][0], self.record["attn"][0])
        self._check_patterns()
        ours = self.logits(self.record["out"][-1][:, self.read, 0])
        error = float((ours - logits).abs().max() / logits.abs().max())
        if error > 1e-3:
            raise RuntimeError(f"sweeps do not follow {model.cfg.architecture}: logits differ by {error:.1e}")
        self.prompts = torch.arange(self.n, device=ours.device)
        self.baseline = metric.of(ours[: self.n], self.prompts)

    # ---- the record ----

    def _run(self) -> Float[Tensor, "prompt read d_vocab"]:
        """Record the run from `first` on; its logits where the metric reads."""
        cache = DynamicCache()
        if self.first:
            self._run_blocks(self.tokens[:, : self.first], cache)
            self.first = cache.get_seq_length()  # 0 where a model keeps no keys and values
        self.past = [(layer.keys[: self.n], layer.values[: self.n]) for layer in cache.layers]
        read_only = (self.model.unembed.hook_in, lambda _, __, resid: resid[:, self.read])
        with hooked([read_only, *self._recorders()]):
            logits = self.model(self.tokens[:, self.first :], past_key_values=cache)
        # Two positions at least, because products with a single row round differently from the whole run's.
        self.few = min(self.length - self.first, -min(*self.read, -2)) if cache.get_seq_length() else self.length
        return logits

    def _run_blocks(self, tokens: Tensor, cache: DynamicCache) -> None:
        def stop(*_):
            raise Stop  # before any logits

        with hooked([(self.blocks[-1], stop)]), suppress(Stop):
            self.model(tokens, past_key_values=cache)

    def _recorders(self) -> Iterator[tuple[nn.Module, Callable]]:
        def enter(_, args, __):
            self.record["resid"].append(by_head(self.model, args[0], "resid", len(args[0])))

        def keep(part, _, __, out):
            self.gives[part] = out
            self.record[part].append(by_head(self.model, out, part, len(self.tokens)))

        for block in self.blocks:
            yield block, enter
            for part in self.record.keys() & PARTS.keys():
                yield block.get_submodule(PARTS[part]), partial(keep, part)

    def _check_patterns(self) -> None:
        """Refuse patterns that cannot be edited: TransformerLens computes some models' only to show them."""
        if "pattern" in self.record:
            nothing = (self.blocks[0].attn.hook_pattern, lambda _, __, pattern: torch.zeros_like(pattern))
            if torch.equal(self.block(0, self.rows("resid", 0, 1), [nothing]), self.rows("out", 0, 1)):
                raise ValueError(f"attention patterns of {self.model.cfg.architecture} can be read but not edited")

    def rows(self, part: str, layer: int, n_items: int, n_pos: int = 0) -> Float[Tensor, "row pos d_model"]:
        """A part of the record at the measured prompts, once for each item; the last `n_pos` positions, or all."""
        return times(self.record[part][layer][: self.n, -n_pos:].flatten(2), n_items)

    # ---- running upwards ----

    def _called(self, n_rows: int, n_pos: int) -> tuple[Shown, list[tuple[tuple, dict]]]:
        """What the model calls its blocks with beside so many rows of the last positions, and the cache in it.

        Learnt from the model, whose blocks do nothing meanwhile, since every architecture has its own arguments.
        """
        if (n_rows, n_pos) not in self.calls:
            cache, calls = Shown(self.length - n_pos, len(self.blocks)), []

            def call(resid, *args, **kwargs):
                calls.append((args, kwargs))
                return like(self.gives["out"], resid)

            with instead(self.blocks, call):
                self._run_blocks(times(self.tokens[: self.n, -n_pos:], n_rows // self.n), cache)
            self.calls[n_rows, n_pos] = cache, calls
        return self.calls[n_rows, n_pos]

    def block(self, layer: int, rows: Tensor, hooks: Sequence = (), join: Callable | None = None) -> Tensor:
        """Rows [row, pos, d_model] after one block; `hooks` are (module, torch forward hook)."""
        cache, calls = self._called(*rows.shape[:2])
        cache.join, (args, kwargs) = join or self._with_past(layer), calls[layer]
        if self.frozen:  # first, so that hooks may edit what was frozen
            hooks = [self._freeze(layer), *hooks]
        with hooked(hooks):
            return only_tensor(self.blocks[layer](rows, *args, **kwargs))

    def _with_past(self, layer: int) -> Callable:
        """Keys and values of positions before `first`, and then those of the rows."""
        # Holds no sweep, which would hold itself by way of its caches and outlive its use.
        n, past = self.n, self.past[layer] if self.first else ()

        def after(past, new):
            new = new.unflatten(0, (-1, n))
            return torch.cat([past.expand(len(new), *past.shape), new], 3).flatten(0, 1)

        return lambda *new: tuple(map(after, past, new)) if past else new

    def _freeze(self, layer: int) -> tuple[nn.Module, Callable]:
        pattern = self.record["pattern"][layer][: self.n].transpose(1, 2)

        def put(_, __, new):
            return times(pattern[:, :, -new.shape[2] :], len(new) // self.n)

        return self.blocks[layer].attn.hook_pattern, put

    def through(self, layer: int, rows: Tensor, hooks: Sequence = ()) -> Tensor:
        """Rows after a block; after the last one only its `few` last positions, from the first that is read on."""
        if layer < len(self.blocks) - 1 or rows.shape[1] == self.few:
            return self.block(layer, rows, hooks)
        with_past = self._with_past(layer)

        def stop(*new):
            raise Stop(with_past(*new))

        keys_values = stopped(lambda: self.block(layer, rows, hooks, stop))
        return self.block(layer, rows[:, -self.few :], hooks, lambda *_: keys_values)

    def inner(self, layer: int, rows: Tensor, part: str, hooks: Sequence = ()) -> Float[Tensor, "row pos head width"]:
        """A part of a block on these rows, without running what follows it; `hooks` as in `block`."""

        def stop(_, __, out):
            raise Stop(by_head(self.model, out, part, len(rows)))

        module = self.blocks[layer].get_submodule(PARTS[part])
        return stopped(lambda: self.block(layer, rows, [*hooks, (module, stop)]))

    def swap(self, layer: int, part: str, new: Tensor, where: Tensor) -> tuple[nn.Module, Callable]:
        """Hook that puts `new` where `where` says, both as in `replaced`, at the last positions of what comes."""

        def put(_, __, given):
            old = by_head(self.model, given, part, len(where) * self.n).unflatten(0, (-1, self.n))
            tail = slice(-old.shape[2], None)
            mixed = torch.where(where[:, :, tail], new[:, :, tail], old).flatten(0, 1)
            mixed = mixed.transpose(1, 2) if part == "pattern" else mixed
            return like(given, mixed.reshape(only_tensor(given).shape))

        return self.blocks[layer].get_submodule(PARTS[part]), put

    def replaced(self, layer: int, part: str, new: Tensor, where: Tensor) -> Tensor:
        """Rows that leave a block in which `part` is `new` where `where` says.

        Shapes: new[#item, #prompt, pos, head, width] and where[item, 1, #pos, #head, 1]; what belongs to no head
        has a single one.
        """
        if part != "resid" and not (part in ("z", "attn") and self.ends_in_o):
            return self.through(layer, self.rows("resid", layer, len(where)), [self.swap(layer, part, new, where)])
        tail = slice(-self.few if part != "resid" and layer == len(self.blocks) - 1 else None, None)
        old = self.record[part][layer][: self.n, tail]
        mixed = torch.where(where[:, :, tail], new[:, :, tail], old).flatten(0, 1).flatten(2)
        if part == "resid":
            return self.through(layer, mixed)
        # Not the change through W_O alone: what a large head writes cancels, and rounds badly.
        attn = self.blocks[layer].attn.o(mixed) if part == "z" else mixed
        if self.model.cfg.attn_only or self.model.cfg.parallel_attn_mlp:
            out, before = (self.rows(which, layer, 1, attn.shape[1]) for which in ("out", "attn"))
            return (attn.unflatten(0, (-1, self.n)) + (out - before)).flatten(0, 1)
        with instead([self.blocks[layer].attn], lambda *_, **__: like(self.gives["attention"], attn)):
            return self.block(layer, self.rows("resid", layer, len(where), attn.shape[1]))

    # ---- measuring ----

    def logits(self, rows: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row read d_vocab"]:
        """Logits of rows that left the last block.

        Raises:
            ValueError: a logit is nan.
        """
        logits = final_logits(self.model, rows)
        if logits.max().isnan():
            row, read, token = logits.isnan().nonzero()[0].tolist()
            raise ValueError(f"logits are nan, first in row {row}, read position {read}, token {token}")
        return logits

    def effects(self, edits: Iterable[tuple[int, int, Callable]]) -> Float[Tensor, "prompt item"]:
        """Edited minus unedited metric for every item of every (layer, number of items, edit).

        `edit(items)` gives the rows that leave the edited block. What is measured comes back on the CPU.
        """
        values, size = [self.baseline[:0]], self._items_at_once()
        for layer, n_items, edit in edits:
            items = torch.arange(n_items, device=self.prompts.device)
            for part in items.tensor_split(-(-n_items // size)) if n_items else ():
                rows = edit(part)
                for above in range(layer + 1, len(self.blocks)):
                    rows = self.through(above, rows)
                values.append(self.metric.of(self.logits(rows[:, self.read]), times(self.prompts, len(part))))
        return (torch.cat(values).view(-1, self.n).T - self.baseline[:, None]).cpu()

    def _items_at_once(self) -> int:
        """As many as make ENOUGH activations, and ENOUGH logits or half of those of a plain run."""
        cfg = self.model.cfg
        width = 6 * cfg.d_model + 2 * (cfg.d_mlp or 0) + 2 * cfg.n_heads * self.length
        # Eight times as many halve the seconds of an H100 on 500 million weights; more gain nothing there either.
        enough = ENOUGH if self.baseline.device.type == "cpu" else 8 * ENOUGH
        by_width = enough // (4 * (self.length - self.first) * width)
        by_logits = max(enough // (8 * cfg.d_vocab), self.tokens.numel() // 2) // len(self.read)
        return max(1, min(by_width, by_logits) // self.n)
