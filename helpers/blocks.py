"""One block of a model by itself: its parts, the arguments that it is called with, and hooks that do not stay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformer_lens.model_bridge import TransformerBridge
from transformers import Cache, DynamicCache

PARTS = {
    "z": "attn.o.hook_in", "attn": "attn.o", "q": "attn.q", "k": "attn.k", "v": "attn.v",
    "pattern": "attn.hook_pattern", "mlp": "mlp",
}  # fmt: skip


# ---- rows ----


def times(x: Tensor, n_items: int) -> Tensor:
    """[prompt, ...] once for each item: [item * prompt, ...]."""
    return x.expand(n_items, *x.shape).flatten(0, 1)


def by_head(x: Tensor, part: str, d_head: int) -> Float[Tensor, "row pos head width"]:
    """A part as [row, pos, head, width]; what belongs to no head has a single one."""
    if part == "pattern":
        return x.transpose(1, 2)
    if part in ("z", "q", "k", "v"):
        return x if x.ndim == 4 else x.unflatten(2, (-1, d_head))
    return x[:, :, None]


def only_tensor(out):
    """What a block gives, of which some models make a tuple."""
    return out[0] if isinstance(out, tuple) else out


# ---- arguments ----


class Shown(DynamicCache):
    """Shows a block's new keys and values to `join`; the block uses what that returns."""

    def __init__(self, join=None):
        super().__init__()
        self.join = join

    def update(self, keys, values, *_, **__):
        return self.join(keys, values)


class Calls:
    """What a model calls its blocks with beside the rows: the same for all prompts of one length.

    Learnt from a run of prompts, by how many positions it has, and given for any number of rows.
    """

    def __init__(self):
        self.learnt: dict[int, list] = {}

    def learn(self, model: TransformerBridge, tokens, cache: Cache, read: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Run prompts after the keys and values in `cache`: logits at the positions `read`, what enters each block."""
        resid, calls = [], self.learnt.setdefault(tokens.shape[1], [])

        def call(_, args, kwargs):
            resid.append(args[0])
            calls.append(tree_map(lambda value: _of_one(value, len(tokens)), (args[1:], kwargs)))

        with ExitStack() as stack:
            for block in model.blocks:
                stack.callback(block.register_forward_pre_hook(call, with_kwargs=True).remove)
            read_only = model.unembed.register_forward_pre_hook(lambda _, args: args[0][:, read])
            stack.callback(read_only.remove)
            return model(tokens, past_key_values=cache), resid

    def of(self, layer: int, rows: Tensor, join: Callable | None = None) -> tuple[tuple, dict]:
        """Arguments for `rows`, whose keys and values go through `join`."""
        return tree_map(lambda value: _of_rows(value, len(rows), Shown(join)), self.learnt[rows.shape[1]][layer])


def _of_one(value, n):
    if isinstance(value, Cache):
        return Shown()  # a place for another, without the keys and values
    is_batch = isinstance(value, Tensor) and value.ndim > 1 and len(value) % n == 0
    return value[: len(value) // n] if is_batch else value


def _of_rows(value, n, cache):
    if isinstance(value, Cache):
        return cache
    # BLOOM's positions have a row for every head of every prompt; a single row fits any batch as it is.
    return value.repeat(n, 1, 1) if isinstance(value, Tensor) and value.ndim == 3 and len(value) > 1 else value


# ---- hooks ----


class Stop(Exception):
    """Carries a value out of a block that need not run further."""


def stopped(run):
    """What `run` returns, or the value that it stopped with."""
    try:
        return run()
    except Stop as stop:
        return stop.args[0]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Torch forward hooks that are gone afterwards."""
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(function).remove)
        yield


@contextmanager
def instead(module: nn.Module, output):
    """Make a module return `output` without running."""
    # Not a plain assignment: a bridge component hands those on to the module it wraps.
    object.__setattr__(module, "forward", lambda *_, **__: output)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")
