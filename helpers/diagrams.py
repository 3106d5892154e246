"""Diagrams: boxes and arrows, the induction circuit that every notebook opens with, and circuits as measured."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.plots import PALETTE, subplots


def circuit(edges: pd.DataFrame, title: str = "") -> Figure:
    """Heads from left to right by layer; an arrow for each edge, as wide as its effect, in the colour of Q, K or V.

    `edges` has the columns sender, receiver (head names), through ("Q", "K" or "V") and effect_nats. Without
    edges the figure says so.
    """
    if edges.empty:
        figure, axis = subplots(figsize=(6, 1.2))
        _text(axis, "no edge is clear of zero", (0.5, 0.5), size=11, ha="center")
        axis.set(title=title)
        return figure
    ends = edges.sort_values(["receiver", "effect_nats"], ascending=[True, False], ignore_index=True)
    ends["y"] = -ends.index - 0.6 * ends.groupby("receiver").ngroup()
    heights = ends.groupby("receiver")["y"].mean().to_dict()
    senders = ends.loc[~ends["sender"].isin([*heights])].groupby("sender")["y"].mean().sort_values().index
    heights |= dict(zip(senders, np.linspace(ends["y"].min(), ends["y"].max(), len(senders) + 2)[1:-1]))
    layer = {name: int(name[1:].split("H")[0]) for name in heights}
    place = {name: (2 * sorted({*layer.values()}).index(layer[name]), y) for name, y in heights.items()}
    width = max(x for x, _ in place.values())
    figure, axis = subplots(figsize=(min(5.3 + 0.9 * width, 13), 1.2 + 0.4 * len(ends)))
    boxes = {name: _box(axis, name, place[name]) for name in place}
    for edge in ends.itertuples():
        sender, receiver, colour = boxes[edge.sender], boxes[edge.receiver], PALETTE["QKV".index(edge.through)]
        size, label_at = 0.8 + 5 * edge.effect_nats / ends["effect_nats"].max(), (receiver.xy[0] - 0.67, edge.y)
        axis.plot(*zip(sender.xy, label_at), color=colour, lw=size, zorder=0)
        label = _text(axis, f"{edge.through} {edge.effect_nats:.2f}", label_at, size=9, ha="center", color=colour)
        _arrow(axis, label, receiver, colour, size)
    axis.set(title=title, xlim=(-0.5, width + 0.5), ylim=(ends["y"].min() - 0.8, 0.8))
    return figure


def _text(axis, text, place, **style):
    axis.axis("off")
    return axis.annotate(text, place, va="center", **{"bbox": {"fc": "white", "ec": "none", "pad": 1}} | style)


def _arrow(axis, source, target, colour, width):
    """From one text to another, both drawn before: a box drawn later would hide the arrow's head."""
    clip = {"patchA": source.get_bbox_patch(), "patchB": target.get_bbox_patch(), "shrinkB": 2}
    axis.annotate("", target.xy, source.xy, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": width} | clip)


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
    if unknown := {*highlight} - {*CIRCUIT_NODES, "K-composition"}:
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of the circuit; see CIRCUIT_NODES in diagrams.py")
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
