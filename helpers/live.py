"""The tiny training run that the series shows live: one model, its optimisers, one step. `tools train` builds on it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers.shortformer import ShortformerModel, shortformer_config


@dataclass(frozen=True)
class Recipe:
    """What decides a training run besides its batches; the sizes are those of the live run."""

    n_layers: int
    seed: int = 0
    steps: int = 400
    n_ctx: int = 72
    d_model: int = 64
    n_heads: int = 4
    d_vocab: int = 64
    matrix_lr: float = 0.02
    other_lr: float = 0.01
    warmup: int = 20
    decay_from: float = 0.6


def new_model(recipe: Recipe) -> ShortformerModel:
    """A model at step 0: normal weights, no attention biases, sinusoidal positions.

    Positions start at unit amplitude because they are added after the norm, whose output has
    unit variance: small ones leave the model without a previous-token head for long.
    """
    fields = {k: getattr(recipe, k) for k in ("d_model", "n_layers", "n_heads", "n_ctx", "d_vocab")}
    model = ShortformerModel(shortformer_config({**fields, "d_head": recipe.d_model // recipe.n_heads}))
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias") and "ln" not in name:
            weight.data.zero_()
            weight.requires_grad_(False)
        elif "ln" not in name:
            weight.data.normal_(0, 0.05, generator=generator)
    model.pos.weight.data.copy_(sinusoids(recipe.n_ctx, recipe.d_model))
    return model


def sinusoids(n_ctx: int, d_model: int, base: float = 10_000.0) -> Float[Tensor, "n_ctx d_model"]:
    """Unit-amplitude sine and cosine positions. Source: Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(-math.log(base) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(n_ctx)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, all matrices as one batch; they must be square and of one shape.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, dict(lr=lr, momentum=momentum))
        self.state[weights[0]]["buffer"] = torch.zeros(len(weights), *weights[0].shape)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        weights, momentum = group["params"], group["momentum"]
        gradient = torch.stack([w.grad for w in weights])
        buffer = self.state[weights[0]]["buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum)
        update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):  # Newton-Schulz
            square = update @ update.mT
            update = 3.4445 * update + (2.0315 * square @ square - 4.775 * square) @ update
        torch._foreach_add_(weights, list(update), alpha=-group["lr"])


def optimisers(model: ShortformerModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the attention matrices, AdamW for embeddings, positions, norms and unembedding."""
    matrices = [w for w in model.layers.parameters() if w.ndim == 2]
    others = [w for w in model.parameters() if w.requires_grad and all(w is not m for m in matrices)]
    adamw = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [Muon(matrices, recipe.matrix_lr), adamw]


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to a twentieth."""
    decay = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min((step + 1) / recipe.warmup, 1.0, max(0.05, decay))


def train_step(model, optimisers_, tokens: Int[Tensor, "batch pos"], factor: float) -> float:
    """One update at `factor` times the learning rates; returns the mean loss in nats."""
    logits = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for optimiser in optimisers_:
        for group in optimiser.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()
