"""Editions of the notebooks for a workshop, made from the one source, the instructor's page and the handout.

The cells of an exercise carry a tag: `solution`, and after it `check`. The student edition has a stub in
place of each solution, and its checks say "not attempted yet" until the stub is replaced. The text before a
solution says how hard the exercise is and how long it takes, as in "(medium, 15 minutes)".
"""

import argparse
import ast
import copy
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from helpers.results import write_atomically, write_text
from tools.report import markdown_table
from tools.run import NOTEBOOKS, ROOT, find_notebooks, read_notebook

NOT_ATTEMPTED, PASSED = "not attempted yet", "check passed"
GRADES = ("easy", "medium", "research")
# "**1. Three copies** (easy, 5 minutes)" or "### 1. Three copies (easy, 5 minutes)".
GRADED = re.compile(rf"\d\. ([^*\n]+?)\.?\*{{0,2}} \(({'|'.join(GRADES)}), ([^)]+)\)")
EXERCISES = "<!-- exercises -->"  # where the instructor's page gets their table
HANDOUT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Induction heads on one page</title><style>
@page {{ size: A4; margin: 9mm 13mm }}
body {{ font: 9pt/1.24 system-ui, sans-serif; color: #111; max-width: 184mm; margin: auto }}
h1 {{ font-size: 16pt; margin: 0 0 1mm }} h2 {{ font-size: 11pt; margin: 2mm 0 1mm }} p {{ margin: 1.2mm 0 }}
img {{ width: 84%; display: block; margin: 0 auto }} .anchor-link {{ display: none }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .5mm 1.5mm; border-bottom: 1px solid #bbb; text-align: left; vertical-align: top }}
</style></head><body>{body}</body></html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def main(arguments: argparse.Namespace) -> int:
    write_editions(ROOT / "workshop")
    print("open workshop/INSTRUCTOR.md first, and print workshop/handout.pdf, or handout.html from a browser")
    return 0


def exercises(notebook: NotebookNode) -> list[tuple[int, int]]:
    """The indices of every solution cell and of its check.

    Raises:
        ValueError: the tagged cells do not come in pairs.
    """
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    solutions, checks = ([i for i, those in enumerate(tags) if tag in those] for tag in ("solution", "check"))
    if sorted(solutions + checks) != [i for pair in zip(solutions, checks) for i in pair]:
        raise ValueError("every cell tagged 'solution' must be followed by one tagged 'check'")
    return list(zip(solutions, checks))


def graded(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    """Title, grade and time of every exercise.

    Raises:
        ValueError: the text before a solution does not state them.
    """
    found = []
    for solution, _ in exercises(notebook):
        text = next(c.source for c in reversed(notebook.cells[:solution]) if c.cell_type == "markdown")
        if not (stated := GRADED.findall(text)):
            raise ValueError(f"the text before the solution in cell {solution} has no '1. Title (easy, 10 minutes)'")
        found.append(stated[-1])
    return found


def stub(solution: str) -> str:
    """The functions of a solution with nothing in them."""
    functions = [node for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
    body = f'    raise NotImplementedError("{NOT_ATTEMPTED}")  # your code here'
    return "\n\n".join(f"def {node.name}({ast.unparse(node.args)}):\n{body}" for node in functions)


def open_check(check: str) -> str:
    """A check that lets an untouched stub pass by and says so."""
    body = textwrap.indent(check, "    ")
    return f'try:\n{body}\nexcept NotImplementedError:\n    print("{NOT_ATTEMPTED}")\nelse:\n    print("{PASSED}")'


def student_edition(notebook: NotebookNode) -> NotebookNode:
    """Stubs in place of the solutions, and checks that wait for them."""
    edition = solution_edition(notebook)
    for solution, _ in exercises(edition):
        edition.cells[solution].source = stub(edition.cells[solution].source)
    return edition


def solution_edition(notebook: NotebookNode) -> NotebookNode:
    """The solutions in sight, and checks that say when they pass."""
    edition = copy.deepcopy(notebook)
    for solution, check in exercises(edition):
        edition.cells[solution].metadata = NotebookNode(tags=["solution"])  # and none that folds it
        edition.cells[check].source = open_check(edition.cells[check].source)
    return edition


def write_editions(out: Path, folder: Path = NOTEBOOKS) -> None:
    """Write `out/student/`, `out/solutions/`, the instructor's page and the handout.

    Raises:
        ValueError: there are no notebooks, or a notebook's exercises are malformed.
    """
    notebooks = {path.name: read_notebook(path) for path in find_notebooks(folder=folder)}
    write_text(out / "INSTRUCTOR.md", instructors_page(folder, notebooks))
    for file, notebook in notebooks.items():
        write_text(out / "student" / file, nbformat.writes(student_edition(notebook)) + "\n")
        write_text(out / "solutions" / file, nbformat.writes(solution_edition(notebook)) + "\n")
    write_handout(out)


def instructors_page(folder: Path, notebooks: dict[str, NotebookNode]) -> str:
    """The instructor's page, with the table of all exercises in its place."""
    rows = [(file[:2], *stated) for file, notebook in notebooks.items() for stated in graded(notebook)]
    table = markdown_table(pd.DataFrame(rows, columns=["notebook", "exercise", "grade", "time"]))
    page = (folder / "INSTRUCTOR.md").read_text(encoding="utf-8").replace(EXERCISES, "\n".join(table))
    return re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](student/\1)", page)


def write_handout(out: Path) -> None:
    """Write `handout.html`, `circuit.png`, its picture, and where there is a browser to print it, `handout.pdf`."""
    from helpers import diagrams, plots  # which take seconds to import

    plots.use_style()
    figure = diagrams.circuit_diagram()
    write_atomically(out / "circuit.png", lambda path: figure.savefig(path, dpi=200, bbox_inches="tight"))
    text = (NOTEBOOKS / "HANDOUT.md").read_text(encoding="utf-8")
    page = write_text(out / "handout.html", HANDOUT.format(body=markdown2html(text))).resolve()
    if program := browser():
        printing = [program, "--headless", "--no-sandbox", "--no-pdf-header-footer", page.as_uri()]
        quiet = {"check": True, "capture_output": True}
        write_atomically(
            out.resolve() / "handout.pdf", lambda path: subprocess.run([*printing, f"--print-to-pdf={path}"], **quiet)
        )


def browser() -> str | None:
    """The program of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
