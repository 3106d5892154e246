"""One block of a model by itself: its parts, the keys and values that it is shown, and hooks that do not stay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

PARTS = {
    "out": "", "z": "attn.o.hook_in", "attn": "attn.o", "q": "attn.q", "k": "attn.k", "v": "attn.v",
    "pattern": "attn.hook_pattern", "attention": "attn", "mlp": "mlp",
}  # fmt: skip


class Shown(DynamicCache):
    """Says that it holds `past` positions, and gives blocks the keys and values that `join` makes of their new ones."""

    def __init__(self, past: int, n_layers: int):
        super().__init__()
        for layer in range(n_layers if past else 0):
            super().update(*torch.zeros(2, 1, 1, past, 1), layer)
        self.join = None

    def update(self, keys, values, *_, **__):
        return self.join(keys, values)


class Stop(Exception):
    """Carries a value out of a run that need not go further."""


def stopped(run: Callable):
    """The value that `run` stopped with."""
    try:
        run()
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
def instead(modules: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """`forward` in the place of what modules do."""
    with ExitStack() as stack:
        for module in modules:
            # Not a plain assignment: a bridge component hands those on to the module it wraps.
            object.__setattr__(module, "forward", forward)
            stack.callback(object.__delattr__, module, "forward")
        yield


def times(x: Tensor, n_items: int) -> Tensor:
    """[prompt, ...] once for each item: [item * prompt, ...]."""
    return x.expand(n_items, *x.shape).flatten(0, 1)


def only_tensor(out):
    """What a module gives, of which some models make a tuple or a list."""
    return out if isinstance(out, Tensor) else out[0]


def like(out, x: Tensor):
    """`x` in the place of the tensor of what a module gives."""
    return x if isinstance(out, Tensor) else type(out)([x, *out[1:]])


def by_head(model: TransformerBridge, out, part: str, n_rows: int) -> Float[Tensor, "row pos head width"]:
    """What a module of PARTS gives, as [row, pos, head, width]; what belongs to no head has a single one."""
    x = only_tensor(out)
    if part == "pattern":
        return x.transpose(1, 2)
    if x.ndim == 2:  # OPT's MLP
        x = x.unflatten(0, (n_rows, -1))
    n_heads = model.cfg.n_heads
    heads = {"z": n_heads, "q": n_heads} | dict.fromkeys("kv", model.cfg.n_key_value_heads or n_heads)
    return x if x.ndim == 4 else x.unflatten(2, (heads.get(part, 1), -1))


def residual_multiplier(model: TransformerBridge) -> float:
    """How many times what attention gives a block adds to the residual stream: Granite's is not 1."""
    return getattr(getattr(model.original_model, "config", None), "residual_multiplier", 1.0)
