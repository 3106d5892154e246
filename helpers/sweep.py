"""The engine of exact sweeps: run a batch of prompts once, then many edited rows upwards from any block.

The unedited run leaves a record: what every block was called with, what enters and leaves it, and parts of
it. An edit is a row of a batch, which goes up through the model's own blocks, so that every architecture is
exact. Rows are [item * prompt, pos, d_model]: every item of a sweep has all prompts.

Not run: the blocks below an edit; attention of the edited block, where the edit enters after it; positions
before `first`, whose keys and values are those of the unedited run; in the last block, queries before the
first position that the metric reads; the unembedding elsewhere than it reads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from helpers.blocks import PARTS, Calls, Stop, by_head, hooked, instead, only_tensor, stopped, times
from helpers.metrics import Metric, Tokens, final_logits, positions_read

ENOUGH = 64 * 2**20  # bytes of activations beyond which more rows at once gain nothing on a CPU


class Sweep:
    """A batch of prompts on a model: its record, its `baseline` metric, and the way up for edited rows.

    The first `n` prompts are measured; the others only lend activations. Rows start at position `first`.
    With `frozen`, every attention pattern stays as it was. `parts` (of PARTS) are recorded beside z and attn:
    `record[part][layer]`, with "resid" and "out" for what enters and leaves a block.

    Raises:
        ValueError: the batch is empty or too long, or the metric reads a position that is not there.
        RuntimeError: the model does more than blocks, final norm and unembedding.
    """

    def __init__(
        self, model: TransformerBridge, tokens: Tokens, metric: Metric,
        n: int | None = None, first: int | None = None, frozen: bool = False, parts: Sequence[str] = (),
    ):  # fmt: skip
        read = positions_read(model, tokens, metric)
        self.model, self.metric, self.blocks = model, metric, list(model.blocks)
        self.n, self.last, self.n_tokens = n or len(tokens), len(self.blocks) - 1, tokens.numel()
        # Nothing after the last position that is read can matter to a causal model.
        self.length, self.first = max(read) + 1, min(first or 0, *read)
        self.read = [position - self.length for position in read]
        self.calls, self.frozen = Calls(), False
        self.record = {part: [] for part in ["out", "z", "attn", *parts, *(["pattern"] if frozen else [])]}
        logits = self._run(tokens[:, : self.length].to(model.cfg.device))
        self._check_patterns()
        self.frozen = frozen
        ours = self.logits(self.record["out"][-1][:, self.read])
        error = float((ours - logits).abs().max() / logits.abs().max())
        if error > 1e-3:
            raise RuntimeError(f"sweeps do not follow {model.cfg.architecture}: logits differ by {error:.1e}")
        self.baseline = metric.of(ours[: self.n], torch.arange(self.n, device=ours.device))

    # ---- the record ----

    def _run(self, tokens):
        """Record the run from `first` on, and learn how blocks are called where only the last positions are run."""
        cache = DynamicCache()
        if self.first:
            self.model(tokens[:, : self.first], past_key_values=cache, return_type=None)
            if cache.get_seq_length() != self.first:  # this model keeps no keys and values
                cache, self.first = DynamicCache(), 0
        self.past = [(layer.keys[: self.n], layer.values[: self.n]) for layer in cache.layers]
        with hooked(self._recorders()):
            logits, self.record["resid"] = self.calls.learn(self.model, tokens[:, self.first :], cache, self.read)
        # Two positions at least, because products with a single row round differently from the whole run's.
        self.few = min(self.length - self.first, -min(*self.read, -2)) if cache.get_seq_length() else self.length
        if self.few < self.length - self.first:
            self.calls.learn(self.model, tokens[:1, -self.few :], self._before(cache), self.read)
        return logits

    def _before(self, cache):
        """The first prompt's keys and values before the last `few` positions."""
        before = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys_values = (x[:1, :, : self.length - self.few] for x in (layer.keys, layer.values))
            before.update(*keys_values, index)
        return before

    def _recorders(self):
        def keep(part):
            return lambda _, __, out: self.record[part].append(by_position(only_tensor(out)))

        def by_position(out):  # OPT's MLP gives all positions of all prompts on one axis
            return out if out.ndim > 2 else out.unflatten(0, (-1, self.length - self.first))

        # BLOOM's attention adds the residual stream itself, so it is more than what o gives.
        yield self.blocks[0].attn, lambda _, __, out: setattr(
            self, "ends_in_o", torch.equal(only_tensor(out), self.record["attn"][0])
        )
        for block in self.blocks:
            yield block, keep("out")
            yield from ((block.get_submodule(PARTS[part]), keep(part)) for part in self.record.keys() & PARTS.keys())

    def _check_patterns(self):
        """Refuse patterns that cannot be edited: TransformerLens computes some models' only to show them."""
        if "pattern" in self.record:
            nothing = (self.blocks[0].attn.hook_pattern, lambda _, __, pattern: torch.zeros_like(pattern))
            if torch.equal(self.block(0, self.rows("resid", 0, 1), [nothing]), self.record["out"][0][: self.n]):
                raise ValueError(f"attention patterns of {self.model.cfg.architecture} can be read but not edited")

    # ---- running upwards ----

    def part(self, layer: int, part: str) -> Float[Tensor, "prompt pos head width"]:
        """A part of the record; what belongs to no head has a single one."""
        return by_head(self.record[part][layer], part, self.model.cfg.d_head)

    def rows(self, part: str, layer: int, n_items: int) -> Tensor:
        """A part of the record at the measured prompts, once for each item."""
        return times(self.record[part][layer][: self.n], n_items)

    def block(self, layer: int, rows: Tensor, hooks: Iterable = (), join: Callable | None = None) -> Tensor:
        """Rows [row, pos, d_model] after one block; `hooks` are (module, torch forward hook)."""
        args, kwargs = self.calls.of(layer, rows, join or self._with_past(layer))
        if self.frozen:
            hooks = [*hooks, (self.blocks[layer].attn.hook_pattern, self._freeze(layer))]
        with hooked(hooks):
            return only_tensor(self.blocks[layer](rows, *args, **kwargs))

    def _with_past(self, layer):
        """Keys and values of positions before `first`, and then those of the rows."""

        def after(past, new):
            new = new.unflatten(0, (-1, self.n))
            return torch.cat([past.expand(len(new), *past.shape), new], 3).flatten(0, 1)

        return lambda *new: tuple(map(after, self.past[layer], new)) if self.first else new

    def _freeze(self, layer):
        pattern = self.record["pattern"][layer][: self.n]
        return lambda _, __, new: times(pattern[..., -new.shape[2] :, -new.shape[3] :], len(new) // self.n)

    def through(self, layer: int, rows: Tensor, hooks: Iterable = ()) -> Tensor:
        """Rows after a block; after the last one only its `few` last positions, from the first that is read on."""
        if layer < self.last or rows.shape[1] == self.few:
            return self.block(layer, rows, hooks)
        hooks, with_past = list(hooks), self._with_past(layer)

        def stop(*new):
            raise Stop(with_past(*new))

        keys_values = stopped(lambda: self.block(layer, rows, hooks, stop))
        return self.block(layer, rows[:, -self.few :], hooks, lambda *_: keys_values)

    def inner(self, layer: int, rows: Tensor, part: str, hooks: Iterable = ()) -> Tensor:
        """A part of a block on these rows, without running what follows it; `hooks` as in `block`."""

        def stop(_, __, out):
            raise Stop(out)

        module = self.blocks[layer].get_submodule(PARTS[part])
        return stopped(lambda: self.block(layer, rows, [*hooks, (module, stop)]))

    def after_attention(self, layer: int, attn: Tensor) -> Tensor:
        """Rows after a block whose attention gives `attn`, before any norm that follows it."""
        resid, out, old = (
            times(self.record[part][layer][: self.n, -attn.shape[1] :], len(attn) // self.n)
            for part in ("resid", "out", "attn")
        )
        if self.model.cfg.attn_only:
            return resid + attn
        if self.model.cfg.parallel_attn_mlp:
            return out + (attn - old)
        args, kwargs = self.calls.of(layer, resid)
        with instead(self.blocks[layer].attn, (attn, None)):
            return only_tensor(self.blocks[layer](resid, *args, **kwargs))

    def swap(self, layer: int, part: str, new: Tensor, where: Tensor) -> tuple[nn.Module, Callable]:
        """Hook that puts `new` where `where` says, both as in `replaced`, at the last positions of what comes."""

        def put(_, __, given):
            out = only_tensor(given)
            by_row = out if out.ndim > 2 else out.unflatten(0, (len(where) * self.n, -1))
            old = by_head(by_row, part, self.model.cfg.d_head).unflatten(0, (-1, self.n))
            tail = slice(-old.shape[2], None)
            mixed = torch.where(where[:, :, tail], new[:, :, tail], old).flatten(0, 1)
            mixed = (mixed.transpose(1, 2) if part == "pattern" else mixed).reshape(out.shape)
            return (mixed, *given[1:]) if isinstance(given, tuple) else mixed

        return self.blocks[layer].get_submodule(PARTS[part]), put

    def replaced(self, layer: int, part: str, new: Tensor, where: Tensor) -> Tensor:
        """Rows that leave a block in which `part` is `new` where `where` says.

        Shapes: new[#item, #prompt, pos, head, width] and where[item, 1, #pos, #head, 1]; what belongs to no head
        has a single one.
        """
        if part not in ("resid", "z", "attn") or (part != "resid" and not self.ends_in_o):
            return self.through(layer, self.rows("resid", layer, len(where)), [self.swap(layer, part, new, where)])
        tail = slice(-self.few if layer == self.last and part != "resid" else None, None)
        old = self.part(layer, part)[: self.n, tail]
        mixed = torch.where(where[:, :, tail], new[:, :, tail], old).flatten(0, 1).flatten(2)
        if part == "resid":
            return self.through(layer, mixed)
        # Not the change through W_O alone: what a large head writes cancels, and rounds badly.
        return self.after_attention(layer, self.blocks[layer].attn.o(mixed) if part == "z" else mixed)

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

        `edit(items)` gives the rows that leave the edited block.
        """
        values, prompts = [self.baseline[:0]], torch.arange(self.n, device=self.baseline.device)
        # As many unembedded at once as ENOUGH holds twice, or a plain run of the prompts.
        most = max(ENOUGH // (8 * self.model.cfg.d_vocab), self.n_tokens // 2) // (self.n * len(self.read))
        for rows in self._risen(edits):
            for part in rows.split(self.n * max(1, most)):
                values.append(self.metric.of(self.logits(part), times(prompts, len(part) // self.n)))
        return torch.cat(values).view(-1, self.n).T - self.baseline[:, None]

    def _risen(self, edits) -> Iterator[Tensor]:
        """Edited rows that left the last block, in order, where they are read: [row, read, d_model]."""
        cfg = self.model.cfg
        width = 6 * cfg.d_model + 2 * (cfg.d_mlp or 0) + 2 * cfg.n_heads * self.length
        size = max(1, ENOUGH // (4 * self.n * (self.length - self.first) * width))
        for layer, n_items, edit in edits:
            items = torch.arange(n_items, device=self.baseline.device)
            for part in items.tensor_split(-(-n_items // size)) if n_items else ():
                rows = edit(part)
                for above in range(layer + 1, len(self.blocks)):
                    rows = self.through(above, rows)
                yield rows[:, self.read]
