"""Every figure gets an alternative text that says what is drawn, under its own name, in its own section."""

import base64

import nbformat
from examination import PATHS
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import captions, site
from tools.run import read_notebook


def small():
    picture = {"image/png": base64.b64encode(b"a picture").decode()}
    cells = [
        new_markdown_cell("# 02 · Scores\n\n**Why?**"),
        new_code_cell("%pip install x"),
        new_markdown_cell("## 1. Every head\n\n**Expect** two."),
        new_code_cell(
            'results.keep("top", 3.0)\nresults.keep("all_heads", plots.head_grid(s, "induction score", name))',
            outputs=[new_output("display_data", picture)],
        ),
        new_code_cell('figure = plots.curve(lines, "layer", "loss (nats)")\nresults.keep("loss", figure)'),
        new_code_cell("another.show()", outputs=[new_output("display_data", picture)]),
    ]
    return new_notebook(cells=cells)


def test_a_caption_says_what_is_drawn_and_where():
    found = captions.captions(small())
    assert found == {
        "all_heads": f"All heads: {captions.KINDS['head_grid']} (induction score). Section: 1. Every head",
        "loss": "Loss: curves (layer, loss (nats)). Section: 1. Every head",
    }


def test_every_picture_of_a_page_has_its_text(tmp_path):
    notebook = captions.describe(small())
    nbformat.validate(notebook)
    shown = [cell for cell in site.prepare(notebook, tmp_path / "02_scores").cells if cell.get("outputs")]
    nbformat.validate(notebook)
    texts = [cell.metadata["mystnb"]["image"]["alt"] for cell in shown]
    assert texts[0].startswith("All heads: map of all heads") and texts[1] == "Figure of 1. Every head"


def test_most_figures_of_the_series_are_described_by_more_than_their_name():
    drawn = [text for path in PATHS for text in captions.captions(read_notebook(path)).values()]
    assert len(drawn) >= 3 * len(PATHS)
    assert all(any(kind in text for kind in captions.KINDS.values()) for text in drawn)


def test_a_page_shows_the_kept_file_where_a_cell_shows_the_one_figure_that_it_keeps(tmp_path):
    kept = tmp_path / "02_scores/figures/all_heads.png"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"as kept")
    shown = [cell.outputs[0] for cell in site.prepare(small(), kept.parents[1]).cells if cell.get("outputs")]
    assert "image/png" not in shown[0].data
    assert shown[0].data["text/markdown"].endswith("Section: 1. Every head](02_scores/figures/all_heads.png)")
    assert "image/png" in shown[1].data  # of the cell that keeps nothing
