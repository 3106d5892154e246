"""The executed series as a static site with a search: opened from a folder or a USB stick, it needs no network."""

import argparse
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import nbformat

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.captions import by_cell, describe
from tools.report import SCORES
from tools.run import read_notebook

NOTEBOOK = "[0-9][0-9]_*.ipynb"
# Pages beside the models, where they exist.
PAGES = ("atlas.md", "architectures.md", "runs.md", "benchmarks/sweeps.md", "benchmarks/scaling.md")
STYLE = Path(__file__).with_suffix(".css")
SPHINX = {
    "project": "The induction-head series",
    "html_title": "The induction-head series",
    "extensions": ["myst_nb"],
    "include_patterns": ["index.md", *PAGES, "*/report.md", f"*/{NOTEBOOK}"],
    "suppress_warnings": ["toc.not_included"],  # a report without notebooks, which search finds
    "smartquotes": False,
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # else asked of the network
    "html_theme_options": {"fixed_sidebar": True, "page_width": "1240px", "show_relbar_bottom": True},
    "html_static_path": ["_static", str(STYLE)],
    "html_css_files": [STYLE.name],
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_search_summary": False,  # a page opened from a folder may not read the others
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="default: site")


def main(arguments: argparse.Namespace) -> int:
    contents = write_site(arguments.outputs, arguments.out)
    size = sum(path.stat().st_size for path in contents.parent.rglob("*")) / 1e6
    print(f"open {contents} in a browser; the folder is {size:.1f} MB and needs no network")
    return 0


def write_site(outputs: Path, out: Path) -> Path:
    """Write a page for every executed notebook in `outputs/<model>/`, and `index.html`, which is returned.

    The folder is made anew beside its place and then moved there.

    Raises:
        ValueError: there are no executed notebooks, `out` exists and holds no site, or the builder is missing.
    """
    if find_spec("myst_nb") is None:
        raise ValueError("the site is built by Sphinx with MyST-NB; type `pip install myst-nb`")
    models = {path.parent.name for path in outputs.glob(f"*/{NOTEBOOK}") if ".failed" not in path.name}
    if not models:
        raise ValueError(f"no executed notebooks in {outputs}; type `make run` first")
    if out.exists() and not (out / ".buildinfo").exists():  # which the builder leaves
        raise ValueError(f"{out} exists and is not a site; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        source, new = Path(temporary) / "source", Path(temporary) / "site"
        shutil.copytree(outputs, source, ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
        write_contents(source, sorted(models, key=lambda name: (name != DEFAULT_MODEL, name)))
        _build(source, new)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return out / "index.html"


def _build(source: Path, out: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    with patch_docutils(), docutils_namespace():  # so that a second build finds nothing registered
        Sphinx(source, None, out, out.parent / "trees", "html", SPHINX, None, sys.stderr).build()


def write_contents(source: Path, models: list[str]) -> None:
    """Make a copy of the outputs ready for the builder, with `index.md`, which leads to every page."""
    (source / "_static").mkdir()
    figures = [source / model / SCORES / "figures/induction_score.png" for model in models]
    lead = [path.relative_to(source).as_posix() for path in figures if path.exists()][:1]
    text = ["# The induction-head series\n"]
    text += [f"![Induction score of every head: a few stand out]({file})" for file in lead]
    text += ["\nEvery page is an executed notebook, or a report made from the results of the model it ran on.\n"]
    parts = {"All models": [(file, f"[]({file})") for file in PAGES if (source / file).exists()]}
    for heading, pages in (parts | {model: _pages(source / model) for model in models}).items():
        text += [f"## {heading}\n", *[f"- {link}" for _, link in pages]]
        text += ["\n```{toctree}", ":hidden:", f":caption: {heading}\n", *[entry for entry, _ in pages], "```\n"]
    write_text(source / "index.md", "\n".join(text))


def _pages(folder: Path) -> list[tuple[str, str]]:
    """Make the notebooks of one model ready for the builder; returns what the navigation and the contents page show."""
    pages = []
    for path in sorted(folder.glob(NOTEBOOK)):
        notebook, file = read_notebook(path), f"{folder.name}/{path.name}"
        title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
        pages.append((f"{title} <{file}>", f"[{title}]({file}): {question(notebook)}"))
        write_text(path, nbformat.writes(prepare(notebook, path.with_suffix(""))))
    if (folder / "report.md").exists():
        pages.append((f"{folder.name}/report.md", f"[]({folder.name}/report.md)"))
    return pages


def question(notebook) -> str:
    """The question that a notebook's first cell asks."""
    text = re.sub(r"^#.*$|\[!.*$|\*\*Question\.\*\*", "", notebook.cells[0].source, flags=re.M)
    return " ".join(text.split("?")[0].replace("*", "").split()) + "?"


def prepare(notebook, folder: Path):
    """A notebook of a model as its page shall show it; `folder` holds what it kept.

    The title names the model, by which search results differ. The badge becomes a plain link, because its picture lies
    on another machine; a link to a notebook that was not run becomes text. A picture gets its alternative text; where a
    cell shows the one figure that it keeps, the page shows the kept file, which the report shows too. The script of the
    views, 1.3 MB, becomes a file of the site.
    """

    def linked(found: re.Match) -> str:
        return found[0] if (folder.parent / found[2]).exists() else found[1]

    for cell, texts in zip(describe(notebook).cells, by_cell(notebook)):
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[([^]]+)\]\((\d\d_\w+\.ipynb)\)", linked, cell.source)
        outputs = [output for output in cell.get("outputs", []) if "data" in output]
        pictures = [output for output in outputs if "image/png" in output.data]
        kept = [folder / "figures" / f"{name}.png" for name in texts]
        for output in pictures:
            alt = output.metadata["image/png"]["alt"]
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
            if len(pictures) == len(kept) == 1 and kept[0].exists():
                output.data = {"text/markdown": f"![{alt}]({folder.name}/figures/{kept[0].name})"}
        for output in outputs:
            script, _, rest = output.data.get("text/html", "").partition("</script>")
            if script.endswith("window.CircuitsVis = CircuitsVis;"):
                write_text(folder.parents[1] / "_static/circuitsvis.js", script.removeprefix("<script>"))
                output.data["text/html"] = f'<script src="../_static/circuitsvis.js"></script>{rest}'
    first = notebook.cells[0]
    first.source = re.sub(r"\A(#.*)", rf"\1 ({folder.parent.name})", first.source)
    first.source = re.sub(r"\[!\[([^]]+)\]\([^)]*\)\]", r"[\1]", first.source)
    return notebook
