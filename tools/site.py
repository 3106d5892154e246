"""The executed series as a static site: opened from a folder or a USB stick, it asks no network for anything."""

import argparse
import html
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbformat

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.run import read_notebook

SCRIPT = "circuitsvis.js"

# nbconvert's page loads three scripts from the network, for things that the series does not use.
_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}"""

# The contents page, with a place for the figure and one for the tables.
_CONTENTS = Path(__file__).with_suffix(".html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="default: site")


def main(arguments: argparse.Namespace) -> int:
    contents = write_site(arguments.outputs, arguments.out)
    size = sum(path.stat().st_size for path in contents.parent.rglob("*")) / 1e6
    print(f"open {contents} in a browser; the folder is {size:.1f} MB and needs no network")
    return 0


def question(notebook) -> str:
    """The question that a notebook's first cell asks."""
    text = re.sub(r"^#.*$|\[!.*$|\*\*Question\.\*\*", "", notebook.cells[0].source, flags=re.M)
    return " ".join(text.split("?")[0].replace("*", "").split()) + "?"


def page(notebook) -> str:
    """An executed notebook as one HTML page that needs no network.

    The badge becomes a plain link, because its picture lies on another machine.
    """
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            source = re.sub(r"\[!\[([^]]+)\]\([^)]*\)\]", r"[\1]", cell.source)
            cell.source = re.sub(r"\((\d\d_\w+)\.ipynb\)", r"(\1.html)", source)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"offline.j2": _TEMPLATE})], template_file="offline.j2")
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def _without_script(text: str) -> tuple[str, str]:
    """A page that loads the views' script from the site's own file, and that script; 1.3 MB for each page else."""
    found = re.search(r"<script>([^<]*(?:<(?!/script)[^<]*)*;window\.CircuitsVis = CircuitsVis;)</script>", text)
    if not found:
        return text, ""
    return text.replace(found[0], f'<script src="../{SCRIPT}"></script>'), found[1]


def write_site(outputs: Path, out: Path) -> Path:
    """Write a page for every executed notebook in `outputs/<model>/`, and `index.html`, which is returned.

    The folder is made anew beside its place and then moved there.

    Raises:
        ValueError: there are no executed notebooks, `out` exists and holds no site, or nbconvert is missing.
    """
    if find_spec("nbconvert") is None:
        raise ValueError("pages are made with nbconvert, which JupyterLab brings; type `pip install nbconvert`")
    folders = filter(_executed, outputs.glob("*/"))
    folders = sorted(folders, key=lambda folder: (folder.name != DEFAULT_MODEL, folder.name))
    if not folders:
        raise ValueError(f"no executed notebooks in {outputs}; type `make run` first")
    if out.exists() and not (out / "index.html").exists():
        raise ValueError(f"{out} exists and is not a site; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        new = Path(temporary) / "site"
        tables = [_write_model(folder, new / folder.name) for folder in folders]
        contents = _CONTENTS.read_text(encoding="utf-8")
        write_text(new / "index.html", contents.format(figure=_lead_figure(folders, new), tables="\n".join(tables)))
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return out / "index.html"


def _executed(folder: Path) -> list[Path]:
    """A model's notebooks that ran to their end."""
    return [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if ".failed" not in path.name]


def _write_model(folder: Path, out: Path) -> str:
    """The pages of one model; returns their part of the contents page."""
    rows = []
    for path in _executed(folder):
        notebook = read_notebook(path)
        whole, script = _without_script(page(notebook))
        write_text(out / f"{path.stem}.html", whole)
        if script:
            write_text(out.parent / SCRIPT, script)
        title = html.escape(path.stem.replace("_", " "))
        rows.append(
            f'<tr><td><a href="{folder.name}/{path.stem}.html">{title}</a></td>'
            f"<td>{html.escape(question(notebook))}</td></tr>"
        )
    return f"<h2>{html.escape(folder.name)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>"


def _lead_figure(folders: list[Path], out: Path) -> str:
    figures = [folder / "02_attention_visualization/figures/induction_score.png" for folder in folders]
    for figure in figures:
        if figure.exists():
            shutil.copyfile(figure, out / "induction_score.png")
            return '<img src="induction_score.png" alt="Induction score of every head: a few stand out">'
    return ""
