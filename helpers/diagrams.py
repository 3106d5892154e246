"""Diagrams: boxes and arrows, and the induction circuit that every notebook opens with."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from helpers.plots import PALETTE, subplots


def graph(
    nodes: dict[str, tuple],
    edges: list[tuple],
    title: str = "",
    size: tuple = (13, 3.4),
    colours: dict[str, object] | None = None,
) -> Figure:
    """Boxes and arrows: `nodes` are `{key: (text, x, y)}`, `edges` (from, to, text, colour, line width)."""
    figure, axis = subplots(figsize=size)
    for source, target, text, colour, width in edges:
        start, end = (np.array(nodes[key][1:]) for key in (source, target))
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 8, "shrinkB": 22}
        axis.annotate("", end, start, arrowprops=arrow)
        blank = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"}
        axis.annotate(text, 0.58 * start + 0.42 * end, ha="center", va="center", size=8.5, color=colour, bbox=blank)
    for key, (text, x, y) in nodes.items():
        colour = (colours or {}).get(key, "0.4")
        box = {"boxstyle": "round", "fc": "white", "ec": colour, "lw": 1 if colour == "0.4" else 2.5}
        axis.annotate(text, (x, y), ha="center", va="center", size=10, bbox=box)
    x, y = zip(*(node[1:] for node in nodes.values()))
    axis.set(title=title, xlim=(min(x) - 0.5, max(x) + 0.5), ylim=(min(y) - 0.5, max(y) + 0.5))
    axis.axis("off")
    return figure


# The induction circuit: what belongs to a part, as (key, text, x, y), and (from, to, text, part).
CIRCUIT_NODES = {
    "tokens": [("A1", "A", 0, 0), ("B1", "B", 1.6, 0), ("dots", "…", 3.2, 0), ("A2", "A", 4.8, 0)],
    "previous-token head": [("previous", "previous-token head\n(earlier layer)", 1.6, 1.2)],
    "residual stream": [("stream", "residual stream at B:\n“B, and A before me”", 1.6, 2.4)],
    "induction head": [("induction", "induction head\n(later layer)\nattends from A to B", 4.8, 2.4)],
    "copying": [("logits", "logits at A:\nB goes up", 7.2, 2.4)],
}
CIRCUIT_EDGES = [
    ("A1", "previous", "value of A", "previous-token head"),
    ("B1", "previous", "looks one back", "previous-token head"),
    ("previous", "stream", "writes “after A”", "residual stream"),
    ("stream", "induction", "key: “after A”\n(K-composition)", "K-composition"),
    ("A2", "induction", "query: “what\ncame after A?”", "induction head"),
    ("induction", "logits", "OV: copies B", "copying"),
]


def circuit_diagram(highlight: str | Sequence[str] = ()) -> Figure:
    """The induction circuit on A B … A -> B, with the parts that a notebook is about in colour.

    Parts: "tokens", "previous-token head", "residual stream", "K-composition", "induction head", "copying".

    Raises:
        ValueError: a part is not one of these.
    """
    chosen = {highlight} if isinstance(highlight, str) else set(highlight)
    if unknown := chosen - {*CIRCUIT_NODES, "K-composition"}:
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of the circuit; see circuit_diagram's list")
    nodes = {key: tuple(node) for part in CIRCUIT_NODES.values() for key, *node in part}
    colours = {key: PALETTE[3] for part in chosen & CIRCUIT_NODES.keys() for key, *_ in CIRCUIT_NODES[part]}
    edges = [
        (source, target, text, *((PALETTE[3], 2.8) if part in chosen else ("0.55", 1.2)))
        for source, target, text, part in CIRCUIT_EDGES
    ]
    return graph(nodes, edges, size=(11, 4.4), colours=colours)
