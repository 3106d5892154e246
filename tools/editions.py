"""Editions of the notebooks for a workshop, made from the one source.

The cells of an exercise carry a tag: `solution`, and after it `check`. The student edition has a stub in
place of each solution, and its checks say "not attempted yet" until the stub is replaced. The text before a
solution says how hard the exercise is and how long it takes, as in "(medium, 15 minutes)".
"""

import argparse
import ast
import copy
import re
import textwrap
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode

from helpers.results import write_text
from tools.handout import no_browser, write_handout
from tools.report import markdown_table
from tools.run import NOTEBOOKS, find_notebooks, read_notebook

NOT_ATTEMPTED, PASSED = "not attempted yet", "check passed"
GRADES = ("easy", "medium", "research")
# "**1. Three copies** (easy, 5 minutes)" or "### 1. Three copies (easy, 5 minutes)".
GRADED = re.compile(rf"\d\. ([^*\n]+?)\.?\*{{0,2}} \(({'|'.join(GRADES)}), ([^)]+)\)")
EXERCISES = "<!-- exercises -->"  # where the instructor's page gets their table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("workshop"), metavar="DIR", help="default: workshop")


def main(arguments: argparse.Namespace) -> int:
    written = write_editions(arguments.out)
    print(f"{len(written)} files in {arguments.out}; open {arguments.out}/INSTRUCTOR.md first")
    if reason := no_browser():
        print(reason)
    return 0


def exercises(notebook: NotebookNode) -> list[tuple[int, int]]:
    """The indices of every solution cell and of its check.

    Raises:
        ValueError: the tagged cells do not come in pairs, or a solution defines no function.
    """
    tagged = [(i, tag) for i, cell in enumerate(notebook.cells) for tag in _tags(cell) & {"solution", "check"}]
    solutions, checks = tagged[::2], tagged[1::2]
    if [tag for _, tag in tagged] != ["solution", "check"] * len(checks):
        raise ValueError("every cell tagged 'solution' must be followed by one tagged 'check'")
    for i, _ in solutions:
        if not _functions(notebook.cells[i].source):
            raise ValueError(f"the solution in cell {i} defines no function to leave to the student")
    return [(i, j) for (i, _), (j, _) in zip(solutions, checks)]


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


def _tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def stub(solution: str) -> str:
    """The functions of a solution with nothing in them."""
    heads = [f"def {node.name}({ast.unparse(node.args)}):" for node in _functions(solution)]
    body = f'    raise NotImplementedError("{NOT_ATTEMPTED}")  # your code here'
    return "\n\n".join(f"{head}\n{body}" for head in heads)


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
        for key in ("jupyter", "cellView"):  # nothing to fold
            edition.cells[solution].metadata.pop(key, None)
        edition.cells[check].source = open_check(edition.cells[check].source)
    return edition


def write_editions(out: Path, folder: Path = NOTEBOOKS) -> list[Path]:
    """`out/student/`, `out/solutions/`, the instructor's page and the handout; returns what was written.

    Editions of notebooks that are gone are removed.

    Raises:
        ValueError: there are no notebooks, `out` is a file, or a notebook's exercises are malformed.
    """
    sources = find_notebooks(folder=folder)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    notebooks = {path.name: read_notebook(path) for path in sources}
    page = instructors_page(folder, notebooks)
    written = []
    for name, edition in (("student", student_edition), ("solutions", solution_edition)):
        for left in (out / name).glob("[0-9][0-9]_*.ipynb"):
            if left.name not in notebooks:
                left.unlink()
        for file, notebook in notebooks.items():
            written.append(write_text(out / name / file, nbformat.writes(edition(notebook)) + "\n"))
    return [*written, write_text(out / "INSTRUCTOR.md", page), *write_handout(out)]


def instructors_page(folder: Path, notebooks: dict[str, NotebookNode]) -> str:
    """The instructor's page, with the table of all exercises in its place."""
    rows = [(file[:2], *stated) for file, notebook in notebooks.items() for stated in graded(notebook)]
    table = markdown_table(pd.DataFrame(rows, columns=["notebook", "exercise", "grade", "time"]))
    page = (folder / "INSTRUCTOR.md").read_text(encoding="utf-8").replace(EXERCISES, "\n".join(table))
    return re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](student/\1)", page)
