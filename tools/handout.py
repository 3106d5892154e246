"""The one-page handout of a workshop: HTML and PDF from `notebooks/HANDOUT.md`."""

import base64
import io
import shutil
from importlib.util import find_spec
from pathlib import Path

from helpers.results import write_atomically, write_text
from tools.run import NOTEBOOKS

SOURCE = NOTEBOOKS / "HANDOUT.md"
# Of the circuit: all that is not tokens, in colour.
PARTS = ("previous-token head", "residual stream", "K-composition", "induction head", "copying")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Induction heads on one page</title><style>
@page {{ size: A4; margin: 9mm 13mm }}
body {{ font: 9pt/1.24 system-ui, sans-serif; color: #111; max-width: 184mm; margin: auto }}
h1 {{ font-size: 16pt; margin: 0 0 1mm }} h2 {{ font-size: 11pt; margin: 2mm 0 1mm }} p {{ margin: 1.2mm 0 }}
img {{ width: 84%; display: block; margin: 0 auto }} .anchor-link {{ display: none }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .5mm 1.5mm; border-bottom: 1px solid #bbb; text-align: left; vertical-align: top }}
</style></head><body>{body}</body></html>
"""


def markdown_to_html(text: str) -> str:
    """Markdown with tables as the inside of a page.

    Raises:
        ValueError: nbconvert is missing.
    """
    if find_spec("nbconvert") is None:
        raise ValueError("pages are made with nbconvert, which JupyterLab brings; type `pip install nbconvert`")
    from nbconvert.filters import markdown2html

    return markdown2html(text)


def no_browser() -> str:
    """Why no PDF can be printed on this machine, in a sentence; empty if one can."""
    if find_spec("playwright") is None:
        return "no PDF: it is printed through playwright; type `pip install playwright`, or print handout.html yourself"
    if browser() is None:
        return "no PDF: there is no Chromium or Chrome on this machine; print handout.html from any browser"
    return ""


def browser() -> str | None:
    """The program of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def write_handout(out: Path) -> list[Path]:
    """`handout.html`, and `handout.pdf` where a browser can print it; returns what was written."""
    body = markdown_to_html(SOURCE.read_text(encoding="utf-8")).replace("circuit.png", _circuit())
    written = [write_text(out / "handout.html", PAGE.format(body=body))]
    if not no_browser():
        written.append(write_atomically(out / "handout.pdf", lambda path: _print(written[0], path)))
    return written


def _circuit() -> str:
    from helpers import diagrams, plots

    plots.use_style()
    picture = io.BytesIO()
    diagrams.circuit_diagram(PARTS).savefig(picture, dpi=200, bbox_inches="tight", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def _print(page: Path, pdf: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        try:
            tab = opened.new_page()
            tab.goto(page.resolve().as_uri())
            tab.pdf(path=pdf, prefer_css_page_size=True, print_background=True)
        finally:
            opened.close()
