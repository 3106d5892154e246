"""Editions: a stub says that it waits, a wrong answer is refused with a sentence, the solution passes."""

import ast
import re

import nbformat
import pytest
from examination import PATHS
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from wrong_answers import WRONG

from tools import editions
from tools.run import read_notebook


def tagged(source, tag):
    return new_code_cell(source, metadata={"tags": [tag]})


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_every_exercise_is_graded_and_has_a_time(path):
    stated = editions.graded(read_notebook(path))
    order = [editions.GRADES.index(grade) for _, grade, _ in stated]
    assert order == sorted(order) and order[0] < 2, stated
    assert all(re.fullmatch(r"\d+ minutes|an hour|half an hour", time) for *_, time in stated), stated


def test_an_exercise_without_a_grade_is_refused():
    cells = [new_markdown_cell("Do it."), tagged("def f():\n    return 1", "solution"), tagged("f()", "check")]
    with pytest.raises(ValueError, match="easy, 10 minutes"):
        editions.graded(new_notebook(cells=cells))
    cells[0].source = "**1. First** (easy, 5 minutes).\n\n### 2. Two at once (research, an hour)\nDo it."
    assert editions.graded(new_notebook(cells=cells)) == [("Two at once", "research", "an hour")]


def test_the_committed_student_edition_is_that_of_the_notebook(path):
    committed = editions.NOTEBOOKS.parent / "workshop/student" / path.name
    fresh = nbformat.writes(editions.student_edition(read_notebook(path))) + "\n"
    assert committed.exists() and committed.read_text(encoding="utf-8") == fresh, "type `make workshop`"


def test_every_notebook_has_two_to_four_exercises_and_a_wrong_answer_for_each(path):
    notebook = read_notebook(path)
    pairs = editions.exercises(notebook)
    assert 2 <= len(pairs) <= 4
    asked = [ast.parse(notebook.cells[i].source).body[0].name for i, _ in pairs]
    assert asked == list(dict.fromkeys(name for name, *_ in WRONG[path.stem]))


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


def test_stub_keeps_signatures():
    left = editions.stub("def f(a, b=2, *, c: int = 3):\n    return a\n\ndef g():\n    return 1")
    names = {}
    exec(left, names)
    with pytest.raises(NotImplementedError, match=editions.NOT_ATTEMPTED):
        names["f"](1, c=2)
    assert [node.name for node in ast.parse(left).body] == ["f", "g"]


def tiny_series(folder):
    cells = [new_markdown_cell("# 01 · One\n\n**Why?**\n\n**1. Add** (easy, 5 minutes).")]
    cells += [tagged("def f():\n    return 1", "solution"), tagged("f()", "check")]
    nbformat.write(new_notebook(cells=cells), folder / "01_one.ipynb")
    (folder / "INSTRUCTOR.md").write_text(f"# For instructors: [01](01_one.ipynb)\n\n{editions.EXERCISES}\n")
    return folder


def test_the_editions_and_the_page_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(editions, "browser", lambda: None)
    (tmp_path / "notebooks").mkdir()
    out = tmp_path / "w"
    editions.write_editions(out, tiny_series(tmp_path / "notebooks"))
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {
        "student/01_one.ipynb", "solutions/01_one.ipynb", "INSTRUCTOR.md", "handout.html", "circuit.png",
    }  # fmt: skip
    page = (out / "INSTRUCTOR.md").read_text()
    assert "| 01 | Add | easy | 5 minutes |" in page and "[01](student/01_one.ipynb)" in page


def test_the_handout_is_one_page(tmp_path):
    if editions.browser() is None:
        pytest.skip("no Chromium or Chrome on this machine")
    editions.write_handout(tmp_path)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "handout.pdf").read_bytes())) == 1
    text = (tmp_path / "handout.html").read_text()
    assert 'src="circuit.png"' in text and "http" not in text and 'alt="The induction circuit' in text


@pytest.mark.slow
def test_wrong_answers_are_refused_solutions_pass_and_stubs_wait(executed, path):
    folder, errors = executed(path)
    assert not errors
    cells = read_notebook(folder / path.name).cells
    printed = "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    n, n_exercises = len(WRONG[path.stem]), len({name for name, *_ in WRONG[path.stem]})
    refusals = [line for line in printed.splitlines() if line.startswith("answer refused:")]
    assert len(refusals) == n and all(line.endswith("True") for line in refusals), refusals
    assert printed.count(editions.PASSED) == n_exercises
    assert printed.count(editions.NOT_ATTEMPTED) == n_exercises
