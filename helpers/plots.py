"""Static figures in one look. Functions take tensors and tables, never models, and give the matplotlib figure back."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from helpers.stats import head_table

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # both readable with the common colour blindnesses
PALETTE = sns.color_palette("colorblind")
DASHES = ("-", "--", "-.", ":")
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "frameon": False}  # a legend at the right of the axes


def use_style() -> None:
    """Fonts and lines that can be read from the back of a room; colour-blind safe cycle."""
    own = {"figure.dpi": 90, "savefig.dpi": 110, "figure.constrained_layout.use": True, "axes.titlesize": "medium"}
    sns.set_theme(style="ticks", context="notebook", palette="colorblind", font_scale=1.1, rc=own)


def subplots(*args, **kwargs):
    """`plt.subplots`, forgotten by pyplot, which would show the figure again after the cell that gives it back."""
    figure, axes = plt.subplots(*args, **kwargs)
    plt.close(figure)
    return figure, axes


def _limits(values, diverging: bool) -> dict:
    """Colours: effects symmetric about 0, shares and scores from 0 to 1, other quantities from 0 to their largest."""
    if diverging:
        reach = float(np.nanmax(np.abs(values))) or 1.0
        return {"vmin": -reach, "vmax": reach, "cmap": DIVERGING}
    return {"vmin": 0, "vmax": max(1.0, float(np.nanmax(values))), "cmap": SEQUENTIAL}


def _array(values) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=float)


def _every(n: int) -> int:
    return 1 + (n - 1) // 16  # so many ticks can be read


def head_grid(samples: Float[Tensor, "sample layer head"], label: str, title="", diverging=False) -> Figure:
    """Layer by head map of the mean, beside the eight highest heads with their 95 % intervals, if there are samples.

    `label` names the quantity and its unit; effects (`diverging`) are drawn symmetrically about 0.
    """
    grid = samples.mean(0).cpu().numpy()
    n_layers, n_heads = grid.shape
    figure, (left, right) = subplots(1, 2, figsize=(11, max(3.4, 0.2 * n_layers + 1.8)), width_ratios=[3, 2])
    sns.heatmap(
        grid, ax=left, annot=grid.size <= 64, fmt=".2f", annot_kws={"size": 9},
        xticklabels=_every(n_heads), yticklabels=_every(n_layers), **_limits(grid, diverging),
    )  # fmt: skip
    left.set(xlabel="head", ylabel="layer", title=title if label in title.lower() else f"{title}: {label}".lstrip(": "))
    left.tick_params(axis="y", rotation=0)
    best = head_table(samples, "mean").head(8)
    return intervals({"": best}, "head", label, f"top {len(best)}" + ", 95 % interval" * (len(samples) > 1), right)


def intervals(tables: dict[str, pd.DataFrame], names: str, label: str, title: str = "", axis=None) -> Figure:
    """Means with intervals, a colour for each table and a row for each of its `names`, the same in all.

    Tables have the columns `names`, "mean", "low" and "high".
    """
    rows = next(iter(tables.values()))[names]
    y = np.arange(len(rows))
    axis = axis or subplots(figsize=(8.5, 1.6 + 0.32 * len(rows)))[1]
    for i, (name, table) in enumerate(tables.items()):
        mean, *ends = table.set_index(names).loc[rows, ["mean", "low", "high"]].to_numpy(float).T
        offset = 0.5 * (i + 0.5) / len(tables) - 0.25
        spread = np.abs(ends - mean)
        axis.errorbar(mean, y + offset, xerr=spread, fmt="o", ms=5, color=PALETTE[i], capsize=3, label=name)
    axis.axvline(0, color="0.6", lw=1)
    axis.margins(x=0.08)
    axis.set(yticks=y, yticklabels=rows, ylim=(len(y) - 0.5, -0.5), xlabel=label, title=title)
    if len(tables) > 1:  # many points leave no room inside
        axis.legend(**BESIDE)
    return axis.figure


def matrices(panels: dict, xlabel: str, ylabel: str, label: str, diverging=False, ticks: tuple | None = None) -> Figure:
    """Heat maps in a row on one colour scale; `panels` is `{title: matrix}`, `ticks` names columns and rows."""
    panels = {title: _array(matrix) for title, matrix in panels.items()}
    limits = _limits(np.concatenate([matrix.ravel() for matrix in panels.values()]), diverging)
    size = 5.4 if len(panels) == 1 else 3.4
    figure, axes = subplots(1, len(panels), figsize=(size * len(panels) + 1, size), squeeze=False)
    for axis, (title, matrix) in zip(axes[0], panels.items()):
        columns, rows = ticks or map(_every, matrix.shape[::-1])
        square = 0.5 < matrix.shape[0] / matrix.shape[1] < 2
        sns.heatmap(
            matrix, ax=axis, square=square, rasterized=True, xticklabels=columns, yticklabels=rows, fmt=".2f",
            annot=matrix.size <= 64 and matrix.shape[1] <= 8, annot_kws={"size": 7},
            cbar=axis is axes[0, -1], cbar_kws={"label": label}, **limits,
        )  # fmt: skip
        axis.set(xlabel=xlabel, ylabel=ylabel if axis is axes[0, 0] else "", title=title)
        axis.tick_params(axis="both", labelsize=9, length=0)
        axis.tick_params(axis="y", rotation=0)
    return figure


def curve(
    lines: dict[str, tuple], xlabel: str, ylabel: str, title="", marks: dict | None = None, log_x=False
) -> Figure:
    """Lines `{name: (x, mean)}` or `{name: (x, mean, low, high)}` over numbers or names; `marks` are vertical lines."""
    figure, axis = subplots(figsize=(8.5, 4.2))
    for i, (name, (x, mean, *interval)) in enumerate(lines.items()):
        style = DASHES[i % len(DASHES)]  # one line may lie on another
        axis.plot(x, mean, label=name, ls=style, marker="o" if isinstance(x[0], str) else "")
        if interval:
            axis.fill_between(x, *interval, alpha=0.3)
    if log_x:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    elif isinstance(x[0], str | int):
        axis.xaxis.set_major_locator(MaxNLocator(15, integer=True))  # of many names some; no half of a head
        axis.tick_params(axis="x", rotation=90 if isinstance(x[0], str) and len(x) > 8 else 0)
    for name, at in (marks or {}).items():
        axis.axvline(at, color="0.4", ls="--", lw=1)
        axis.text(at, 0.98, name, transform=axis.get_xaxis_transform(), rotation=90, ha="right", va="top", size=9)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        axis.legend(**BESIDE)
    sns.despine(figure)
    return figure


def scatter(x, y, xlabel: str, ylabel: str, title="", names: dict | None = None) -> Figure:
    """Points, some of them named (`{index: name}`) by a legend; dashed is x = y if units agree."""
    figure, axis = subplots(figsize=(8.5, 4.6))
    names = names or {}
    named = [names.get(i, "_") for i in range(len(x))]  # no legend shows what begins with an underscore
    order = ["_", *names.values()]
    levels = {"hue": named, "style": named, "hue_order": order, "style_order": order, "legend": bool(names)}
    sns.scatterplot(x=_array(x), y=_array(y), s=50, ax=axis, **levels)
    axis.axhline(0, color="0.7", lw=1)
    if (unit := re.search(r"\(.*\)$", xlabel)) and ylabel.endswith(unit[0]):
        axis.axline((0, 0), slope=1, color="0.7", ls="--")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if names:
        axis.legend(**BESIDE)
    sns.despine(figure)
    return figure


def token_strip(tokens: list[str], values: Float[Tensor, "pos"], label: str, title="", per_row=16) -> Figure:
    """Tokens as a strip of coloured cells, each showing its text: the static token view.

    Raises ValueError where there is not one value a token.
    """
    values = _array(values)
    if len(values) != len(tokens):
        raise ValueError(f"{len(values)} values for {len(tokens)} tokens")
    shape, empty = (-(-len(tokens) // per_row), per_row), -len(tokens) % per_row
    fits = 112 // per_row  # characters in a cell
    texts = [t if len(t) <= fits else t[: fits - 1] + "…" for t in map(visible, tokens)] + [""] * empty
    usual = np.clip(values, *np.quantile(values, [0.01, 0.99]))  # one extreme token would leave the others pale
    figure, axis = subplots(figsize=(12, 0.55 * shape[0] + 1.2))
    sns.heatmap(
        np.append(values, [np.nan] * empty).reshape(shape), ax=axis, annot=np.array(texts).reshape(shape), fmt="",
        annot_kws={"size": 10, "family": "monospace", "parse_math": False}, linewidths=0.5, xticklabels=False,
        yticklabels=False, cbar_kws={"label": label, "extend": "both"}, **_limits(usual, bool((values < 0).any())),
    )  # fmt: skip
    axis.set(title=title)
    return figure


def spaced(token: str) -> str:
    """A token's text with its spaces and line breaks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def visible(token: str) -> str:
    """`spaced` for a figure, where a letter of a script that the fonts lack is an empty box."""
    return re.sub(r"[^ -~¡-ſΣ-ωА-я–—‘-”…⏎⇥]", "▯", spaced(token))


def estimates(kept: dict[str, dict[str, dict]], label: str, title: str = "") -> Figure:
    """`intervals` of `{colour: {row: estimate}}`, as `results.keep` gives it back."""
    tables = {name: pd.DataFrame(rows).T.rename_axis("row").reset_index() for name, rows in kept.items()}
    return intervals(tables, "row", label, title)
