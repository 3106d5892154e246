"""Diagrams: boxes and arrows, the induction circuit that every notebook opens with, and circuits as measured."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots import BESIDE, PALETTE, subplots


def circuit(edges: pd.DataFrame, title: str = "") -> Figure:
    """Heads from left to right by layer; an arrow for each edge, as wide as its effect, in the colour of Q, K or V.

    `edges` has the columns sender, receiver (head names), through ("Q", "K" or "V") and effect_nats. Without
    edges the figure says so.
    """
    heads = sorted({*edges["sender"], *edges["receiver"]}, key=lambda name: [int(i) for i in name[1:].split("H")])
    layers = list(dict.fromkeys(name.split("H")[0] for name in heads))
    figure, axis = subplots(figsize=(9, 1.5 + 0.4 * len(heads)))
    boxes = {name: _box(axis, name, (layers.index(name.split("H")[0]), -row)) for row, name in enumerate(heads)}
    for edge in edges.itertuples():
        kind, width = "QKV".index(edge.through), 0.8 + 5 * edge.effect_nats / edges["effect_nats"].max()
        apart = {"connectionstyle": f"arc3,rad={0.15 * (kind - 1)}"}  # Q, K and V of one pair
        _arrow(axis, boxes[edge.sender], boxes[edge.receiver], PALETTE[kind], width, **apart)
    for colour, through in zip(PALETTE, "QKV"):
        axis.plot([], [], color=colour, label=through)
    axis.legend(**BESIDE)
    axis.set(title=title, xlim=(-0.5, max(len(layers), 1) - 0.5), ylim=(-len(heads), 1))
    if not heads:
        _text(axis, "no edge is clear of zero", (0, 0.5), size=11, ha="center")
    return figure


def _text(axis, text, place, **style):
    axis.axis("off")
    return axis.annotate(text, place, va="center", **{"bbox": {"fc": "white", "ec": "none", "pad": 1}} | style)


def _arrow(axis, source, target, colour, width, **style):
    """From one text to another, both drawn before: a box drawn later would hide the arrow's head."""
    clip = {"patchA": source.get_bbox_patch(), "patchB": target.get_bbox_patch(), "shrinkB": 2}
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": width} | clip | style
    axis.annotate("", target.xy, source.xy, arrowprops=arrow)


def _box(axis, text, place, colour="0.4", width=1.0):
    around = {"boxstyle": "round", "fc": "white", "ec": colour, "lw": width}
    return _text(axis, text, place, size=10, ha="center", bbox=around)


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
    ("stream", "induction", "key: “after A”", "K-composition"),
    ("A2", "induction", "query: “what\ncame after A?”", "induction head"),
    ("induction", "logits", "copies B", "copying"),
]


def circuit_diagram(highlight: Collection[str] = ()) -> Figure:
    """The induction circuit on A B … A -> B, with parts (of CIRCUIT_NODES, or "K-composition") in colour."""
    figure, axis = subplots(figsize=(11, 4.4))
    boxes = {}
    for part, nodes in CIRCUIT_NODES.items():
        for key, text, *place in nodes:
            boxes[key] = _box(axis, text, place, *((PALETTE[3], 2.5) if part in highlight else ()))
    for source, target, text, part in CIRCUIT_EDGES:
        colour, width = (PALETTE[3], 2.8) if part in highlight else ("0.55", 1.2)
        _arrow(axis, boxes[source], boxes[target], colour, width)
        middle = 0.58 * np.array(boxes[source].xy) + 0.42 * np.array(boxes[target].xy)
        _text(axis, text, middle, size=8.5, color=colour, ha="center")
    axis.set(xlim=(-0.5, 7.7), ylim=(-0.5, 2.9))
    return figure
