"""Two storeys: `helpers` is thin and knows nothing of `tools`; the package that is installed holds `helpers` alone."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
HELPERS = sorted((ROOT / "helpers").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(source: str) -> set[str]:
    """The top-level packages that a module or a notebook's cells import, wherever in them."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def code_of(notebook: Path) -> str:
    """The code cells, with `pass` in place of every line that only IPython can read."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.M)


def test_helpers_are_thin():
    # 2,100 in all is the aim. Loading alone, which refuses what would load as another model, is 757; what may still
    # go is for the next hand, and nothing may be added without taking something out.
    sizes = {path.name: n_lines(path) for path in HELPERS}
    assert sum(sizes.values()) <= 3002, sizes
    assert max(sizes.values()) <= 250, sizes


@pytest.mark.parametrize("path", [*HELPERS, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_below_imports_the_tools(path):
    source = code_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    assert not imported(source) & {"tools", "tests", "benchmarks"}
    if path.suffix == ".ipynb":
        assert "helpers" in imported(source)


def test_the_commands_are_those_of_tools_alone():
    assert not (ROOT / "helpers/__main__.py").exists() and (ROOT / "tools/__main__.py").exists()


def test_the_installed_package_holds_helpers_alone():
    # That an installation has no `tools` is seen in test_colab.py; here, that the build is told so.
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert build["packages"] == ["helpers"] and set(build["package-data"]) == {"helpers"}
    assert not [path.parent for path in HELPERS if path.parent != ROOT / "helpers"]


def is_declaration(statement: ast.stmt) -> bool:
    """An import, a definition, a docstring, or a name that is given a value."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return all(isinstance(target, ast.Name | ast.Tuple) for target in targets)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


@pytest.mark.parametrize("path", HELPERS, ids=lambda path: path.name)
def test_importing_a_helper_does_nothing_else(path):
    # No warning filter, no rcParams, no environment: what a process shares is not for an import to change.
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        assert is_declaration(statement), f"{path.name}, line {statement.lineno}"
