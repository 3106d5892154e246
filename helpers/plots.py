"""Static figures in one look. Functions take tensors and tables, never models, and give the matplotlib figure back."""

import re
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogLocator
from torch import Tensor

from helpers.stats import head_table

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"  # both readable with the common colour blindnesses
PALETTE = sns.color_palette("colorblind")
DASHES = ("-", "-", "--", "-.", ":", (0, (7, 1, 1, 1)))  # of lines that may lie on each other, in their order
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


def _limits(values, diverging: bool, top: float | None = None) -> dict:
    """Colours: effects symmetric about 0, shares and scores from 0 to 1, other quantities from 0 to `top`."""
    if diverging:
        reach = float(np.nanmax(np.abs(values))) or 1.0
        return {"vmin": -reach, "vmax": reach, "cmap": DIVERGING}
    return {"vmin": 0, "vmax": top or 1.0, "cmap": SEQUENTIAL}


def _array(values) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=float)


def _every(n: int) -> int:
    return 1 + (n - 1) // 16  # so many ticks can be read


def head_grid(samples: Float[Tensor, "sample layer head"], label: str, title="", diverging=False) -> Figure:
    """Layer by head map of the mean, beside the eight highest heads with their 95 % intervals.

    `label` names the quantity and its unit. Scores are drawn from 0 to 1; effects (`diverging`)
    symmetrically about 0. One sample has no intervals.
    """
    grid = _array(samples.mean(0))
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
    """Means with intervals, a row for each of a table's `names` and a colour for each table.

    Tables have the columns `names`, "mean", "low" and "high", with the same names in each.
    """
    rows = next(iter(tables.values()))[names]
    y = np.arange(len(rows))
    axis = axis or subplots(figsize=(8.5, 1.6 + 0.32 * len(rows)))[1]
    for i, (name, table) in enumerate(tables.items()):
        mean, *ends = table.set_index(names).loc[rows, ["mean", "low", "high"]].to_numpy().T
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
    values = np.concatenate([matrix.ravel() for matrix in panels.values()])
    n_rows, n_columns = next(iter(panels.values())).shape
    limits, square = _limits(values, diverging, max(1.0, float(np.nanmax(values)))), 0.5 < n_rows / n_columns < 2
    size = 5.4 if square and len(panels) == 1 else 3.8
    figure, axes = subplots(1, len(panels), figsize=(size * len(panels) + 1, size), squeeze=False)
    for axis, (title, matrix) in zip(axes[0], panels.items()):
        columns, rows = ticks or map(_every, matrix.shape[::-1])
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
    """Lines `{name: (x, mean)}` or `{name: (x, mean, low, high)}`; `marks` are vertical lines, named above.

    x may be names; two or three of them are no way from one to the other, and are drawn as points.
    """
    figure, axis = subplots(figsize=(8.5, 4.2))
    names = next(iter(lines.values()))[0]
    named = isinstance(names[0], str)
    few = named and len(names) < 4
    for i, (name, (x, mean, *interval)) in enumerate(lines.items()):
        later = len(lines) - 1 - i  # lines drawn later are thinner, so that none is hidden
        style = {"ls": "", "marker": "o", "ms": 6 + 1.5 * later} if few else {"ls": DASHES[i % len(DASHES)]}
        (line,) = axis.plot(x, mean, label=name, lw=1.8 + 0.5 * later, **style)
        if interval:
            (axis.vlines if few else axis.fill_between)(x, *interval, alpha=0.3, color=line.get_color(), lw=5 * few)
    if log_x:  # plain numbers
        axis.set_xscale("log")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    if not (named or log_x) and all(isinstance(i, int) for i in names):
        axis.xaxis.get_major_locator().set_params(integer=True)  # no half of a head
    if named:
        shown = range(0, len(names), _every(len(names)))
        tilt = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        crowded = len(shown) * max(len(names[i]) for i in shown) > 60
        axis.set_xticks(shown, [names[i] for i in shown], **(tilt if crowded else {}))
        axis.margins(x=0.3 if few else 0.05)
    if marks:
        for x in marks.values():
            axis.axvline(x, color="0.4", ls="--", lw=1)
        above = axis.secondary_xaxis("top", frame_on=False)
        above.set_xticks([*marks.values()], [*marks], rotation=30, ha="left", size=9)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        axis.legend(**BESIDE)
    sns.despine(figure)
    return figure


def scatter(x, y, xlabel: str, ylabel: str, title="", names: dict | None = None) -> Figure:
    """Points, some of them named (`{index: name}`) at the right, each by a line; dashed is x = y if units agree."""
    x, y = _array(x), _array(y)
    figure, axis = subplots(figsize=(8.5, 4.6))
    axis.scatter(x, y, s=22, color=PALETTE[0])
    axis.axhline(0, color="0.7", lw=1)
    if (unit := re.search(r"\(.*\)$", xlabel)) and ylabel.endswith(unit[0]):
        axis.axline((0, 0), slope=1, color="0.7", ls="--")
    order = sorted(names or {}, key=lambda i: y[i])
    apart = np.arange(len(order)) / max(len(order), 17)  # each name at its point's height, or as near as there is room
    heights = np.maximum.accumulate(axis.transLimits.transform(np.c_[x, y][order])[:, 1] - apart) + apart
    for place, i in zip(np.minimum(heights, 0.97 - apart[::-1]), order):
        axis.annotate(
            names[i], (x[i], y[i]), (1.03, place), textcoords="axes fraction", va="center", size=9,
            arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.6},
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    sns.despine(figure)
    return figure


def token_strip(tokens: list[str], values: Float[Tensor, "pos"], label: str, title="", per_row=16) -> Figure:
    """Tokens as a strip of coloured cells, each showing its text: the static token view.

    Raises:
        ValueError: there is not one value a token.
    """
    values = _array(values)
    if len(values) != len(tokens):
        raise ValueError(f"{len(values)} values for {len(tokens)} tokens")
    rows, empty = -(-len(tokens) // per_row), -len(tokens) % per_row
    fits = 112 // per_row  # characters in a cell
    texts = [t if len(t) <= fits else t[: fits - 1] + "…" for t in map(visible, tokens)] + [""] * empty
    padded = np.append(values, [np.nan] * empty)
    usual = np.clip(values, *np.quantile(values, [0.01, 0.99]))  # one extreme token would leave the others pale
    bar = {"label": label, "extend": "both" if (values < 0).any() else "max"}
    figure, axis = subplots(figsize=(12, 0.55 * rows + 1.2))
    sns.heatmap(
        padded.reshape(rows, per_row), ax=axis, annot=np.array(texts).reshape(rows, per_row), fmt="",
        annot_kws={"size": 10, "family": "monospace", "parse_math": False}, linewidths=0.5, xticklabels=False,
        yticklabels=False, cbar_kws=bar, **_limits(usual, bool((values < 0).any()), float(usual.max())),
    )  # fmt: skip
    axis.set(title=title)
    return figure


def spaced(token: str) -> str:
    """A token's text with its spaces and line breaks made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def visible(token: str) -> str:
    """`spaced` for a figure: a run of spaces is counted, and a letter that the fonts lack is an empty box."""
    counted = re.sub("·{3,}", lambda run: f"·×{len(run[0])}", spaced(token))
    return "".join(c if ord(c) in _letters() else "▯" for c in counted)


@cache
def _letters() -> frozenset[int]:
    fonts = (get_font(findfont(name)) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def estimates(kept: dict[str, dict[str, dict]], label: str, title: str = "") -> Figure:
    """`intervals` of `{colour: {row: estimate}}`, as `results.keep` gives it back."""
    tables = {name: pd.DataFrame(rows).T.rename_axis("row").reset_index() for name, rows in kept.items()}
    return intervals(tables, "row", label, title)
