"""Figures: drawn from tensors alone, shown once, in one look; views: one script, no network."""

import subprocess
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from circuitsvis.attention import attention_heads
from matplotlib.text import Text

from helpers import diagrams, plots, views


def saved(figure):
    figure.savefig("/dev/null", format="png")
    return figure


def labels_of(figure):
    return {axis.get_xlabel() for axis in figure.axes} | {axis.get_ylabel() for axis in figure.axes}


@pytest.mark.parametrize("shape", [(5, 1, 1), (6, 2, 8), (4, 30, 9)])
def test_head_grid_names_quantity_and_unit(shape):
    samples = torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.3
    figure = saved(plots.head_grid(samples, "delta loss (nats)", "title", diverging=True))
    assert {"head", "layer", "delta loss (nats)"} <= labels_of(figure)
    assert len(figure.axes[0].get_yticks()) <= 16


def test_scores_run_from_0_to_1_and_effects_are_symmetric_about_0():
    samples = torch.full((5, 2, 3), 0.2)
    assert plots.head_grid(samples, "score").axes[0].collections[0].get_clim() == (0, 1)
    samples[:, 0, 0] = -0.6
    low, high = plots.head_grid(samples, "effect (nats)", diverging=True).axes[0].collections[0].get_clim()
    assert low == -high == pytest.approx(-0.6)
    figure = plots.matrices({"a": np.eye(3), "b": 0.1 * np.eye(3)}, "x", "y", "share")
    assert all(axis.collections[0].get_clim() == (0, 1) for axis in figure.axes[:2])


def test_every_figure_draws_and_is_forgotten_by_pyplot():
    lines = {"a": ([0, 1], [1, 2], [0, 1], [2, 3]), "b": ([0, 1], [3, 4])}
    figure = saved(plots.curve(lines, "x", "y (nats)", "t", {"m": 0.5}, log_x=True))
    assert figure.axes[0].get_ylabel() == "y (nats)"
    saved(plots.token_strip(["a", " b", "\n", "$x$", "       "], torch.rand(5), "loss (nats)", "title", per_row=3))
    lines = [len(saved(plots.scatter([0, 1], [1, 2], "a (nats)", y)).axes[0].lines) for y in ("b (nats)", "c (logits)")]
    assert lines == [2, 1]  # x = y, beside zero, where it means something
    points = saved(plots.curve({"a": (["L0", "L1"], [1, 2], [0, 1], [2, 3])}, "layer", "nats")).axes[0]
    assert points.lines[0].get_linestyle() == "None"  # no slope between two layers
    table = pd.DataFrame({"head": ["L0H1", "L1H0"], "mean": [1.0, 2.0], "low": [0.5, 1.0], "high": [1.5, 2.5]})
    figure = saved(plots.intervals({"zero": table, "mean": table[::-1]}, "head", "delta loss (nats)"))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["L0H1", "L1H0"]
    assert not plt.get_fignums()


def test_names_along_an_axis_are_thinned():
    names = ["embedding"] + [f"L{i}" for i in range(30)]
    axis = saved(plots.curve({"a": (names, range(31))}, "stop", "nats")).axes[0]
    shown = [t.get_text() for t in axis.get_xticklabels()]
    assert shown[:2] == ["embedding", "L1"] and len(shown) == 16


def test_labels_of_a_scatter_never_overlap():
    x = torch.rand(40, generator=torch.Generator().manual_seed(0))
    figure = saved(plots.scatter(x, 0 * x, "score", "effect (nats)", names={i: f"L{i}H0" for i in range(14)}))
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the line to its point
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_circuit_has_the_parts_that_can_be_highlighted():
    figure = saved(diagrams.circuit_diagram(("K-composition", "induction head")))
    coloured = {t.get_text() for t in figure.axes[0].texts if t.get_color() == plots.PALETTE[3]}
    assert any("key" in text for text in coloured) and not any("copies" in text for text in coloured)
    plain = diagrams.circuit_diagram()
    assert not any(t.get_color() == plots.PALETTE[3] for t in plain.axes[0].texts)
    with pytest.raises(ValueError, match="MLP is no part"):
        diagrams.circuit_diagram(["MLP"])


def test_importing_plots_leaves_matplotlib_as_it_was():
    code = (
        "import matplotlib as m, seaborn, transformer_lens; before = dict(m.rcParams); import helpers.plots, "
        "helpers.results; assert before == dict(m.rcParams)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_views_carry_data_but_not_the_script():
    texts = ["</script>", "<!--", "<script>", "c"]
    view = views.show(attention_heads(torch.rand(2, 4, 4), texts, ["L0H0", "L0H1"]))._repr_html_()
    assert "AttentionHeads" in view and "L0H1" in view and len(view) < 5_000
    assert view.count("</script>") == 1 and "window.CircuitsVis" in view
    assert "<!--" not in view and view.count("<script") == 1
    strip = views.tokens(["a", "<!--"], torch.tensor([0.5, 1.0]))._repr_html_()
    assert "ColoredTokensMulti" in strip and len(strip) < 2_000 and "<!--" not in strip
    several = views.tokens(["a", "b"], torch.rand(2, 3), ["x", "y", "z"])._repr_html_()
    assert "ColoredTokensMulti" in several
    script = views.script()._repr_html_()
    assert script.count("</script") == 1 and script.count("<script") >= 1 and len(script) > 1_000_000


def test_lengths_that_do_not_match_are_refused():
    with pytest.raises(AssertionError, match="Number of tokens"):
        views.tokens(list("abc"), torch.rand(2))
    with pytest.raises(AssertionError, match="Number of labels"):
        views.tokens(list("abc"), torch.rand(3, 3), ["x", "y"])
    with pytest.raises(ValueError, match="2 values for 3 tokens"):
        plots.token_strip(list("abc"), torch.rand(2), "loss (nats)")


def test_a_circuit_goes_from_left_to_right_and_no_label_lies_over_another():
    edges = [(f"L{i % 4}H{i % 3}", f"L{5 + i % 2}H1", "QKV"[i % 3], 1 / (i + 1)) for i in range(14)]
    table = pd.DataFrame(edges, columns=["sender", "receiver", "through", "effect_nats"])
    figure = saved(diagrams.circuit(table, "title"))
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    place = {text.get_text(): text.xy[0] for text in texts}
    assert place["L0H0"] < place["L1H1"] < place["L5H1"] < place["L6H1"]
    widths = {round(text.arrow_patch.get_linewidth(), 3) for text in figure.axes[0].texts if text.arrow_patch}
    assert len(widths) == 14


def test_estimates_draws_a_row_for_each_name_and_a_colour_for_each_side():
    kept = {side: {name: {"mean": 1.0, "low": 0.5, "high": 2.0, "n": 20} for name in ("a", "b", "c")} for side in "xy"}
    (axis,) = plots.estimates(kept, "nats").axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["x", "y"]


def test_a_circuit_without_edges_says_so():
    edges = pd.DataFrame(columns=["sender", "receiver", "through", "effect_nats"])
    axis = saved(diagrams.circuit(edges, "a model")).axes[0]
    assert [text.get_text() for text in axis.texts] == ["no edge is clear of zero"]


def test_no_token_of_a_strip_lies_over_its_neighbour():
    with matplotlib.rc_context():
        plots.use_style()
        figure = plots.token_strip(["exaggeration", "a", "insufficient"] * 8, torch.rand(24), "loss (nats)")
    figure.draw_without_rendering()  # lays it out
    texts = [text.get_window_extent() for text in figure.axes[0].texts[:16]]
    assert all(left.x1 <= right.x0 for left, right in zip(texts, texts[1:]))
    assert figure.axes[0].texts[0].get_text() == "exagge…"


def test_a_letter_that_the_fonts_lack_is_a_box():
    assert plots.visible(" সা졸é\n") == "·▯▯▯é⏎"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(plots.token_strip(["졸", " é"], torch.rand(2), "loss (nats)"))
