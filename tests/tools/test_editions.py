"""Editions: a stub says that it waits, a wrong answer is refused with a sentence, the solution passes."""

import ast

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from wrong_answers import WRONG

from helpers import series, workshop
from helpers.__main__ import main
from helpers.catalog import DEFAULT_MODEL

PATHS = series.find_notebooks()


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(source, tag):
    return new_code_cell(source, metadata={"tags": [tag]})


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_notebook_has_two_to_four_exercises_and_a_wrong_answer_for_each(path):
    notebook = read(path)
    pairs = workshop.exercises(notebook)
    assert 2 <= len(pairs) <= 4
    asked = [ast.parse(notebook.cells[i].source).body[0].name for i, _ in pairs]
    assert asked == [name for name, *_ in WRONG[path.stem]]


def test_the_student_edition_holds_no_solution(path):
    notebook = read(path)
    student = workshop.student_edition(notebook)
    assert len(student.cells) == len(notebook.cells)
    for solution, check in workshop.exercises(notebook):
        assert student.cells[solution].source == workshop.stub(notebook.cells[solution].source)
        assert workshop.NOT_ATTEMPTED in student.cells[check].source
        ast.parse(student.cells[check].source)


def test_malformed_exercises_are_refused():
    lonely = new_notebook(cells=[tagged("def f():\n    return 1", "solution"), new_markdown_cell("x")])
    with pytest.raises(ValueError, match="must be followed"):
        workshop.exercises(lonely)
    swapped = new_notebook(cells=[tagged("1", "check"), tagged("def f():\n    return 1", "solution")])
    with pytest.raises(ValueError, match="must be followed"):
        workshop.exercises(swapped)
    empty = new_notebook(cells=[tagged("x = 1", "solution"), tagged("x", "check")])
    with pytest.raises(ValueError, match="defines no function"):
        workshop.exercises(empty)


def test_stub_keeps_signatures():
    left = workshop.stub("def f(a, b=2, *, c: int = 3):\n    return a\n\ndef g():\n    return 1")
    names = {}
    exec(left, names)
    with pytest.raises(NotImplementedError, match=workshop.NOT_ATTEMPTED):
        names["f"](1, c=2)
    assert [node.name for node in ast.parse(left).body] == ["f", "g"]


def test_the_command_writes_both_editions_and_the_page(tmp_path, capsys):
    assert main(["workshop", "--out", str(tmp_path / "w")]) == 0
    for edition in ("student", "solutions"):
        assert sorted(p.name for p in (tmp_path / "w" / edition).iterdir()) == [p.name for p in PATHS]
    assert "Two hours" in (tmp_path / "w/INSTRUCTOR.md").read_text()
    (tmp_path / "file").write_text("")
    assert main(["workshop", "--out", str(tmp_path / "file")]) == 2


# ---- executed ----


def expect_refusal(check: str, word: str) -> str:
    body = "\n".join("    " + line for line in check.splitlines())
    say = f"print('answer refused:', refusal, {word!r} in str(refusal))"
    return f"try:\n{body}\nexcept ValueError as refusal:\n    {say}"


def examination(notebook, wrong):
    """Before the end, at every exercise: a wrong answer, the solution, and then the untouched stub."""
    cells, pairs = [], workshop.exercises(notebook)
    student, solutions = workshop.student_edition(notebook), workshop.solution_edition(notebook)
    starts = {solution: k for k, (solution, _) in enumerate(pairs)}
    checks = {check for _, check in pairs}
    for i, cell in enumerate(notebook.cells):
        if i in starts:
            k, check = starts[i], pairs[starts[i]][1]
            _, answer, word = wrong[k]
            cells += [new_code_cell(answer), new_code_cell(expect_refusal(notebook.cells[check].source, word))]
            cells += [new_code_cell(solutions.cells[i].source), new_code_cell(solutions.cells[check].source)]
            cells += [new_code_cell(student.cells[i].source), new_code_cell(student.cells[check].source)]
        elif i not in checks:
            cells.append(cell)
    return new_notebook(cells=cells, metadata=notebook.metadata)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examination")
    for path in PATHS:
        nbformat.write(examination(read(path), WRONG[path.stem]), folder / path.name)
    jobs = series.plan([DEFAULT_MODEL], series.find_notebooks(folder=folder), folder / "out", {})
    return folder / "out" / DEFAULT_MODEL, series.run(jobs, 2)


@pytest.mark.slow
def test_wrong_answers_are_refused_solutions_pass_and_stubs_wait(examined, path):
    folder, errors = examined
    assert not [error for label, error in errors.items() if label.startswith(path.stem)]
    executed = read(folder / path.name)
    printed = "".join(o.get("text", "") for c in executed.cells if c.cell_type == "code" for o in c.outputs)
    n = len(WRONG[path.stem])
    refusals = [line for line in printed.splitlines() if line.startswith("answer refused:")]
    assert len(refusals) == n and all(line.endswith("True") for line in refusals), refusals
    assert printed.count(workshop.PASSED) == n
    assert printed.count(workshop.NOT_ATTEMPTED) == n
