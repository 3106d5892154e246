"""The executed series as a static site with a search: opened from a folder or a USB stick, it needs no network."""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import myst_nb
import nbformat
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from helpers.catalog import DEFAULT_MODEL
from helpers.results import write_text
from tools.report import captions
from tools.run import read_notebook

NOTEBOOK = "[0-9][0-9]_*.ipynb"
PAGES = "atlas\narchitectures\nruns\nbenchmarks/sweeps\nbenchmarks/scaling"
STYLE = Path(__file__).with_suffix(".css")
SPHINX = {
    "project": "The induction-head series",
    "html_title": "The induction-head series",
    "extensions": [myst_nb.__name__],
    "include_patterns": ["*.md", "benchmarks/*.md", "*/report.md", f"*/{NOTEBOOK}"],
    "suppress_warnings": ["toc.not_readable", "toc.not_included"],  # pages that were not made, models without notebooks
    "smartquotes": False,
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # else asked of the network
    "html_theme_options": {"fixed_sidebar": True, "page_width": "1240px", "show_relbar_bottom": True},
    "html_static_path": [str(STYLE)],
    "html_css_files": [STYLE.name],
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_search_summary": False,  # a page opened from a folder may not read the others
}
# A part of the contents, which is a part of the navigation too.
PART = """
```{{toctree}}
:caption: {}
:glob:
:maxdepth: 1

{}
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    parser.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="default: site")


def main(arguments: argparse.Namespace) -> int:
    print(f"open {write_site(arguments.outputs, arguments.out)} in a browser; it needs no network")
    return 0


def write_site(outputs: Path, out: Path) -> Path:
    """Write a page for every executed notebook in `outputs/<model>/`, and `index.html`, which is returned.

    The folder is made anew beside its place and then moved there.

    Raises:
        ValueError: there are no executed notebooks, or `out` exists and holds no site.
    """
    executed = [path for path in outputs.glob(f"*/{NOTEBOOK}") if ".failed" not in path.name]
    if not executed:
        raise ValueError(f"no executed notebooks in {outputs}; type `make run` first")
    if out.exists() and not (out / ".buildinfo").exists():  # which the builder leaves
        raise ValueError(f"{out} exists and is not a site; name another folder")
    models = sorted({path.parent.name for path in executed}, key=lambda name: (name != DEFAULT_MODEL, name))
    parts = [PART.format(model, f"{model}/*") for model in models]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as temporary:
        source, new = Path(temporary) / "source", Path(temporary) / "site"
        shutil.copytree(outputs, source, ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
        for path in executed:
            prepare(source / path.relative_to(outputs))
        text = ["# The induction-head series", PART.format("All models", PAGES), *parts]
        write_text(source / "index.md", "\n".join(text))
        build(source, new)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return out / "index.html"


def build(source: Path, out: Path) -> None:
    """Let Sphinx write the pages of a folder into another."""
    with patch_docutils(), docutils_namespace():  # so that a second build finds nothing registered
        Sphinx(source, None, out, out.parent / "trees", "html", SPHINX, None, sys.stderr).build()


def prepare(path: Path) -> None:
    """Rewrite the executed notebook of a model as its page shall show it.

    The title names the model, by which search results differ. The badge becomes a plain link, because its picture lies
    on another machine; a link to a notebook that was not run becomes text. Pictures get an alternative text.
    """

    def linked(found: re.Match) -> str:
        return found[0] if path.with_name(found[2]).exists() else found[1]

    notebook = read_notebook(path)
    for cell, text in zip(notebook.cells, captions(notebook)):
        cell.metadata["mystnb"] = {"image": {"alt": text}}
        cell.source = re.sub(r"\[([^]]+)\]\((\d\d_\w+\.ipynb)\)", linked, cell.source)
    first = notebook.cells[0]
    first.source = re.sub(r"\A(#.*)", rf"\1 ({path.parent.name})", first.source)
    first.source = re.sub(r"\[!\[([^]]+)\]\([^)]*\)\]", r"[\1]", first.source)
    write_text(path, nbformat.writes(notebook))
