"""Editions: a stub says that it waits, a wrong answer is refused with a sentence, the solution passes."""

import ast

import pytest
from examination import PATHS
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from wrong_answers import WRONG

from tools import editions
from tools.__main__ import main
from tools.run import read_notebook


def tagged(source, tag):
    return new_code_cell(source, metadata={"tags": [tag]})


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_notebook_has_two_to_four_exercises_and_a_wrong_answer_for_each(path):
    notebook = read_notebook(path)
    pairs = editions.exercises(notebook)
    assert 2 <= len(pairs) <= 4
    asked = [ast.parse(notebook.cells[i].source).body[0].name for i, _ in pairs]
    assert asked == [name for name, *_ in WRONG[path.stem]]


def test_the_student_edition_holds_no_solution(path):
    notebook = read_notebook(path)
    student = editions.student_edition(notebook)
    assert len(student.cells) == len(notebook.cells)
    for solution, check in editions.exercises(notebook):
        assert student.cells[solution].source == editions.stub(notebook.cells[solution].source)
        assert editions.NOT_ATTEMPTED in student.cells[check].source
        ast.parse(student.cells[check].source)


def test_malformed_exercises_are_refused():
    lonely = new_notebook(cells=[tagged("def f():\n    return 1", "solution"), new_markdown_cell("x")])
    with pytest.raises(ValueError, match="must be followed"):
        editions.exercises(lonely)
    swapped = new_notebook(cells=[tagged("1", "check"), tagged("def f():\n    return 1", "solution")])
    with pytest.raises(ValueError, match="must be followed"):
        editions.exercises(swapped)
    empty = new_notebook(cells=[tagged("x = 1", "solution"), tagged("x", "check")])
    with pytest.raises(ValueError, match="defines no function"):
        editions.exercises(empty)


def test_stub_keeps_signatures():
    left = editions.stub("def f(a, b=2, *, c: int = 3):\n    return a\n\ndef g():\n    return 1")
    names = {}
    exec(left, names)
    with pytest.raises(NotImplementedError, match=editions.NOT_ATTEMPTED):
        names["f"](1, c=2)
    assert [node.name for node in ast.parse(left).body] == ["f", "g"]


def test_the_command_writes_both_editions_and_the_page(tmp_path, capsys):
    assert main(["editions", "--out", str(tmp_path / "w")]) == 0
    for edition in ("student", "solutions"):
        assert sorted(p.name for p in (tmp_path / "w" / edition).iterdir()) == [p.name for p in PATHS]
    assert "Two hours" in (tmp_path / "w/INSTRUCTOR.md").read_text()
    (tmp_path / "file").write_text("")
    assert main(["editions", "--out", str(tmp_path / "file")]) == 2


@pytest.mark.slow
def test_wrong_answers_are_refused_solutions_pass_and_stubs_wait(executed, path):
    folder, errors = executed(path)
    assert not errors
    cells = read_notebook(folder / path.name).cells
    printed = "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    n = len(WRONG[path.stem])
    refusals = [line for line in printed.splitlines() if line.startswith("answer refused:")]
    assert len(refusals) == n and all(line.endswith("True") for line in refusals), refusals
    assert printed.count(editions.PASSED) == n
    assert printed.count(editions.NOT_ATTEMPTED) == n
