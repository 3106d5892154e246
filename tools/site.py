"""The executed series as a static site: opened from a folder or a USB stick, it asks no network for anything."""

import argparse
import hashlib
import html
import re
import shutil
import tempfile
from pathlib import Path

import nbformat

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.captions import by_cell, describe
from tools.handout import markdown_to_html
from tools.report import SCORES, folder_of
from tools.run import read_notebook

SCRIPT = "circuitsvis.js"
SHARED = 10_000  # characters of a style sheet from which on the pages share it as a file

# nbconvert's page loads three scripts from the network, for things that the series does not use; and its pictures
# have no alternative text.
_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block data_png scoped %}<div class="jp-RenderedImage jp-OutputArea-output">
<img src="{{ output.metadata.get('file') or 'data:image/png;base64,' + output.data['image/png'] | escape_html }}"
alt="{{ (output | get_metadata('alt', 'image/png') or '') | escape_html }}"></div>{% endblock %}
{% block html_head_js %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}"""

# The frame of the pages that are no notebooks, with a place for the title and one for the rest.
_FRAME = Path(__file__).with_suffix(".html")
# Pages beside the models, where they exist, and what the contents page calls them.
PAGES = {
    "atlas.md": "The models side by side",
    "architectures.md": "Which architectures are read rightly",
    "runs.md": "Along training and across seeds",
    "benchmarks/sweeps.md": "Sweeps: time beside other libraries",
    "benchmarks/scaling.md": "How the cost of a sweep grows",
}


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

    notebook = describe(nbformat.from_dict(notebook))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            source = re.sub(r"\[!\[([^]]+)\]\([^)]*\)\]", r"[\1]", cell.source)
            cell.source = re.sub(r"\((\d\d_\w+)\.ipynb\)", r"(\1.html)", source)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"offline.j2": _TEMPLATE})], template_file="offline.j2")
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def link_pictures(notebook, folder: Path, out: Path) -> None:
    """Where a cell shows the one figure that it keeps, let its page show the kept file, which the report shows too."""
    for cell, texts in zip(notebook.cells, by_cell(notebook)):
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        kept = [folder / "figures" / f"{name}.png" for name in texts]
        if len(pictures) == len(kept) == 1 and kept[0].exists():
            file = kept[0].relative_to(folder.parent)
            pictures[0].metadata["file"] = file.as_posix()
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept[0], out / file)


def _without_styles(text: str) -> tuple[str, dict[str, str]]:
    """A page that loads its large style sheets from the site's own files, and these by name; 0.3 MB a page else."""
    files = {}

    def share(found: re.Match) -> str:
        if len(found[1]) < SHARED:
            return found[0]
        name = f"style-{hashlib.sha256(found[1].encode()).hexdigest()[:8]}.css"
        files[name] = found[1]
        return f'<link rel="stylesheet" href="../{name}">'

    return re.sub(r"<style[^>]*>(.*?)</style>", share, text, flags=re.S), files


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
    markdown_to_html("")  # refuses a machine without nbconvert before anything is made
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
        body = [_lead_figure(folders, new), _INTRODUCTION, _write_pages(outputs, new), *tables]
        write_text(new / "index.html", framed("The induction-head series", "\n".join(body)))
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return out / "index.html"


_INTRODUCTION = "<p>Every page is an executed notebook, or a report made from the results of the model it ran on.</p>"


def framed(title: str, body: str) -> str:
    """A page of the site that is no notebook."""
    return _FRAME.read_text(encoding="utf-8").format(title=html.escape(title), body=body)


def write_page(source: Path, out: Path) -> Path:
    """A page in Markdown as HTML, with the pictures that it shows; links to notebooks and pages lead to the site's."""
    text = source.read_text(encoding="utf-8")
    for picture in re.findall(r"!\[[^]]*\]\(([^):]+)\)", text):
        (out.parent / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / picture, out.parent / picture)
    title, _, rest = text.partition("\n")
    rest = re.sub(r"(\]\([^):]+)\.(?:ipynb|md)\)", r"\1.html)", rest)
    return write_text(out, framed(title.lstrip("# "), markdown_to_html(rest)))


def _write_pages(outputs: Path, out: Path) -> str:
    """The pages beside the models; returns their part of the contents page."""
    present = {file: title for file, title in PAGES.items() if (outputs / file).exists()}
    for file in present:
        write_page(outputs / file, out / Path(file).with_suffix(".html"))
    links = [f'<li><a href="{file.removesuffix(".md")}.html">{text}</a></li>' for file, text in present.items()]
    return "<ul>\n" + "\n".join(links) + "\n</ul>"


def _executed(folder: Path) -> list[Path]:
    """A model's notebooks that ran to their end."""
    return [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if ".failed" not in path.name]


def _write_model(folder: Path, out: Path) -> str:
    """The pages of one model; returns their part of the contents page."""
    rows = []
    for path in _executed(folder):
        notebook = read_notebook(path)
        link_pictures(notebook, folder / path.stem, out)
        whole, script = _without_script(page(notebook))
        whole, styles = _without_styles(whole)
        for name, sheet in styles.items():
            write_text(out.parent / name, sheet)
        write_text(out / f"{path.stem}.html", whole)
        if script:
            write_text(out.parent / SCRIPT, script)
        title = html.escape(path.stem.replace("_", " "))
        rows.append(
            f'<tr><td><a href="{folder.name}/{path.stem}.html">{title}</a></td>'
            f"<td>{html.escape(question(notebook))}</td></tr>"
        )
    if (folder / "report.md").exists():
        write_page(folder / "report.md", out / "report.html")
        rows.append(f'<tr><td><a href="{folder.name}/report.html">report</a></td><td>All results on one page</td></tr>')
    return f"<h2>{html.escape(folder.name)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>"


def _lead_figure(folders: list[Path], out: Path) -> str:
    figures = [folder_of(folder, SCORES) / "figures/induction_score.png" for folder in folders]
    for figure in figures:
        if figure.exists():
            shutil.copyfile(figure, out / "induction_score.png")
            return '<img src="induction_score.png" alt="Induction score of every head: a few stand out">'
    return ""
