"""The four figures used everywhere, in one look, and the interactive views beside them.

Functions take tensors and tables, never models, and return the matplotlib figure.
"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from helpers.stats import head_name

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # both readable with the common colour blindnesses
PALETTE = sns.color_palette("colorblind")


def use_style() -> None:
    """Fonts and lines that can be read from the back of a room; colour-blind safe cycle."""
    sns.set_theme(style="ticks", context="notebook", palette="colorblind", font_scale=1.1)
    plt.rcParams.update(
        {"figure.dpi": 90, "savefig.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": "medium"}
    )


def _limits(values: np.ndarray, diverging: bool) -> dict:
    top = float(np.nanmax(np.abs(values))) or 1.0
    return {"vmin": -top, "vmax": top, "cmap": DIVERGING} if diverging else {"vmin": 0, "cmap": SEQUENTIAL}


def head_grid(
    samples: Float[Tensor, "sample layer head"],
    table: pd.DataFrame,
    value: str,
    label: str,
    title: str,
    diverging: bool = False,
    top: int = 8,
) -> Figure:
    """Layer by head heat map of the mean, beside the `top` heads with their 95 % intervals.

    `table` is `stats.head_table(samples, value)`; `label` names the quantity and its unit.
    """
    grid = samples.mean(0).cpu().numpy()
    n_layers, n_heads = grid.shape
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.4, 0.3 * n_layers + 1.5)), width_ratios=[3, 2])
    sns.heatmap(
        grid, ax=left, annot=grid.size <= 64, fmt=".2f", annot_kws={"size": 9},
        cbar_kws={"label": label}, **_limits(grid, diverging),
    )  # fmt: skip
    left.set(xlabel="head", ylabel="layer", title=title)
    left.tick_params(axis="y", rotation=0)
    best = table.head(top)[::-1]
    spread = np.abs(best[["low", "high"]].to_numpy().T - best[value].to_numpy())
    right.errorbar(best[value], best["head"], xerr=spread, fmt="o", color=PALETTE[0], capsize=3)
    right.set(xlabel=label, title=f"top {len(best)}, 95 % interval")
    right.axvline(0, color="0.6", lw=1)
    right.margins(x=0.08)
    return figure


def pattern(
    attention: Float[Tensor, "query key"],
    title: str,
    labels: list[str] | None = None,
    stripe: int | None = None,
) -> Figure:
    """One head's attention pattern; `stripe` marks the diagonal at that offset."""
    n = attention.shape[-1]
    figure, axis = plt.subplots(figsize=(6.4, 5.4))
    sns.heatmap(
        attention.cpu().numpy(), ax=axis, vmin=0, vmax=1, cmap=SEQUENTIAL, square=True,
        cbar_kws={"label": "attention (probability)"}, rasterized=True,
        xticklabels=labels or max(1, n // 8), yticklabels=labels or max(1, n // 8),
    )  # fmt: skip
    if labels:
        axis.tick_params(labelsize=8)
    if stripe is not None:
        axis.plot([0.5, n - stripe + 0.5], [stripe + 0.5, n + 0.5], color="white", lw=0.8, ls=":")
    axis.set(xlabel="key position (attended to)", ylabel="query position", title=title)
    return figure


def matrices(
    panels: dict[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    label: str,
    diverging: bool = False,
    ticks: tuple[list, list] | None = None,
) -> Figure:
    """Heat maps in a row on one colour scale; `panels` is `{title: matrix}`, `ticks` names columns and rows."""
    n = len(panels)
    limits = _limits(np.concatenate([np.asarray(m, dtype=float).ravel() for m in panels.values()]), diverging)
    limits.setdefault("vmax", max(float(np.nanmax(m)) for m in panels.values()))
    figure, axes = plt.subplots(1, n, figsize=(3.8 * n + 1, 3.9), squeeze=False)
    columns, rows = ticks or ("auto", "auto")
    for axis, (title, matrix) in zip(axes[0], panels.items()):
        sns.heatmap(
            np.asarray(matrix, dtype=float), ax=axis, square=True, rasterized=True, xticklabels=columns,
            yticklabels=rows, cbar=axis is axes[0, -1], cbar_kws={"label": label, "shrink": 0.8}, **limits,
        )  # fmt: skip
        axis.set(xlabel=xlabel, ylabel=ylabel if axis is axes[0, 0] else "", title=title)
        axis.tick_params(axis="both", labelsize=9)
        axis.tick_params(axis="y", rotation=0)
    return figure


def curve(
    lines: dict[str, tuple],
    xlabel: str,
    ylabel: str,
    title: str,
    marks: dict[str, float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Lines `{name: (x, mean)}` or `{name: (x, mean, low, high)}`; `marks` are vertical lines."""
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    for name, (x, mean, *interval) in lines.items():
        (line,) = axis.plot(x, mean, label=name)
        if interval:
            axis.fill_between(x, *interval, alpha=0.25, color=line.get_color(), lw=0)
    for name, x in (marks or {}).items():
        axis.axvline(x, color="0.4", ls="--", lw=1)
        axis.annotate(name, (x, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", size=9)
    if log_x:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=min(min(x) for x, *_ in lines.values()))
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def token_strip(tokens: list[str], values: Float[Tensor, "pos"], label: str, title: str, per_row: int = 16) -> Figure:
    """Tokens as a strip of coloured cells, each showing its text: the static token view."""
    values = np.asarray(values, dtype=float)
    rows = -(-len(tokens) // per_row)
    padded = np.full(rows * per_row, np.nan)
    padded[: len(values)] = values
    texts = [_short(t) for t in tokens] + [""] * (len(padded) - len(tokens))
    figure, axis = plt.subplots(figsize=(12, 0.55 * rows + 1.2))
    sns.heatmap(
        padded.reshape(rows, per_row), ax=axis, annot=np.array(texts).reshape(rows, per_row), fmt="",
        annot_kws={"size": 10, "family": "monospace", "parse_math": False}, linewidths=0.5,
        xticklabels=False, yticklabels=False,
        cbar_kws={"label": label}, **_limits(padded, bool(np.nanmin(padded) < 0)),
    )  # fmt: skip
    axis.set(title=title)
    return figure


def _short(token: str) -> str:
    return re.sub("·{3,}", lambda run: f"·×{len(run[0])}", visible(token))


def visible(token: str) -> str:
    """A token's text with its spaces and line breaks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def graph(
    nodes: dict[str, tuple[str, float, float]],
    edges: list[tuple[str, str, str, object, float]],
    title: str,
    size: tuple[float, float] = (13, 3.4),
) -> Figure:
    """Boxes and arrows: `nodes` are `{key: (text, x, y)}`, `edges` (from, to, text, colour, line width)."""
    figure, axis = plt.subplots(figsize=size)
    for source, target, text, colour, width in edges:
        start, end = (np.array(nodes[key][1:]) for key in (source, target))
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 8, "shrinkB": 22}
        axis.annotate("", end, start, arrowprops=arrow)
        blank = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}
        axis.annotate(text, 0.58 * start + 0.42 * end, ha="center", va="center", size=8.5, color=colour, bbox=blank)
    for text, x, y in nodes.values():
        box = {"boxstyle": "round", "fc": "white", "ec": "0.4"}
        axis.annotate(text, (x, y), ha="center", va="center", size=10, bbox=box)
    x, y = zip(*(node[1:] for node in nodes.values()))
    axis.set(title=title, xlim=(min(x) - 0.5, max(x) + 0.5), ylim=(min(y) - 0.5, max(y) + 0.5))
    axis.axis("off")
    return figure


# ---- interactive views ----

_CALL = re.compile(
    r'CircuitsVis\.render\(\s*"(?P<id>[^"]+)",\s*CircuitsVis\.(?P<element>\w+),(?P<props>.*)\)\s*</script>', re.S
)


class Html:
    """HTML that a notebook shows."""

    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        return self.text


def interactive_script() -> Html:
    """The CircuitsVis script from the installed package; show it once in a notebook.

    CircuitsVis itself inlines 1.3 MB in every view offline, and loads from a CDN online, so
    that a saved notebook is blank without a network.
    """
    from pathlib import Path

    import circuitsvis

    script = (Path(circuitsvis.__file__).parent / "dist/cdn/iife.js").read_text(encoding="utf-8")
    # `</script` inside the text would end the element; the source map is not shipped with us.
    script = script.replace("</script", r"<\/script").replace("//# sourceMappingURL=iife.js.map", "")
    return Html(f"<script>{script};window.CircuitsVis = CircuitsVis;</script>interactive views are ready")


def _reuse_script(view) -> Html:
    call = _CALL.search(view.local_src)
    online = re.search(r'from "(https:[^"]+)"', view.cdn_src)[1]
    # Colab puts every output into a page of its own, where only the CDN can be reached.
    # A token such as "</script>" must not end the element.
    props = call["props"].strip().replace("</", r"<\/")
    return Html(
        f'<div id="{call["id"]}" style="margin: 15px 0;"></div><script type="module">'
        f'const cv = window.CircuitsVis ?? await import("{online}");'
        f'cv.render("{call["id"]}", cv.{call["element"]}, {props})</script>'
    )


def interactive_heads(
    attention: Float[Tensor, "head query key"], tokens: list[str], names: list[str] | None = None
) -> Html:
    """CircuitsVis view of several heads' patterns; hover a head to see it, a token to follow it."""
    from circuitsvis.attention import attention_heads

    rounded = np.round(attention.cpu().numpy().astype(np.float64), 3).tolist()
    names = names or [head_name(0, h) for h in range(len(rounded))]
    return _reuse_script(attention_heads(rounded, [visible(t) for t in tokens], names))


def interactive_tokens(
    tokens: list[str], values: Float[Tensor, "pos *label"], labels: list[str] | None = None
) -> Html:
    """CircuitsVis view of a text with a value per token, or one for each of `labels` to pick from."""
    from circuitsvis.tokens import colored_tokens, colored_tokens_multi

    rounded = torch.as_tensor(values, dtype=torch.float64).cpu().round(decimals=3)
    texts = [visible(t) for t in tokens]
    if labels:
        return _reuse_script(colored_tokens_multi(texts, rounded, labels))
    return _reuse_script(colored_tokens(texts, rounded.tolist()))
