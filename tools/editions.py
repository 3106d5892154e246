"""Editions of the notebooks for a workshop, made from the one source.

The cells of an exercise carry a tag: `solution`, and after it `check`. The student edition has a stub in
place of each solution, and its checks say "not attempted yet" until the stub is replaced.
"""

import argparse
import ast
import copy
import shutil
import textwrap
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.results import write_text
from tools.run import NOTEBOOKS, find_notebooks, read_notebook

NOT_ATTEMPTED, PASSED = "not attempted yet", "check passed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("workshop"), metavar="DIR", help="default: workshop")


def main(arguments: argparse.Namespace) -> int:
    written = write_editions(arguments.out)
    print(f"{len(written)} files in {arguments.out}; open {arguments.out}/INSTRUCTOR.md first")
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
    """`out/student/`, `out/solutions/` and the instructor's page; returns what was written.

    Raises:
        ValueError: there are no notebooks, `out` is a file, or a notebook's exercises are malformed.
    """
    sources = find_notebooks(folder=folder)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    written = []
    for path in sources:
        notebook = read_notebook(path)
        for name, edition in (("student", student_edition), ("solutions", solution_edition)):
            written.append(write_text(out / name / path.name, nbformat.writes(edition(notebook)) + "\n"))
    shutil.copyfile(folder / "INSTRUCTOR.md", out / "INSTRUCTOR.md")
    return [*written, out / "INSTRUCTOR.md"]
