"""Every notebook, executed once for all tests: at each exercise with a wrong answer, the solution and the stub."""

from itertools import groupby

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from wrong_answers import WRONG

from tools import editions, run

PATHS = run.find_notebooks()


def expect_refusal(check: str, word: str) -> str:
    body = "\n".join("    " + line for line in check.splitlines())
    say = f"print('answer refused:', refusal, {word!r} in str(refusal))"
    return f"try:\n{body}\nexcept ValueError as refusal:\n    {say}"


def examination(notebook, wrong):
    """Before the end, at every exercise: its wrong answers, the solution, and then the untouched stub."""
    cells, pairs = [], editions.exercises(notebook)
    answers = [[*group] for _, group in groupby(wrong, key=lambda answer: answer[0])]
    student, solutions = editions.student_edition(notebook), editions.solution_edition(notebook)
    starts = {solution: k for k, (solution, _) in enumerate(pairs)}
    checks = {check for _, check in pairs}
    for i, cell in enumerate(notebook.cells):
        if i in starts:
            k, check = starts[i], pairs[starts[i]][1]
            for _, answer, word in answers[k]:
                cells += [new_code_cell(answer), new_code_cell(expect_refusal(notebook.cells[check].source, word))]
            cells += [new_code_cell(solutions.cells[i].source), new_code_cell(solutions.cells[check].source)]
            cells += [new_code_cell(student.cells[i].source), new_code_cell(student.cells[check].source)]
        elif i not in checks:
            cells.append(cell)
    return new_notebook(cells=cells, metadata=notebook.metadata)


def failures(jobs, n_parallel=1):
    """Execute jobs; returns label -> error of those that failed."""
    outcomes = run.run_jobs(jobs, n_parallel=n_parallel)
    return {label: outcome.error for label, outcome in outcomes.items() if outcome.error}


def execute(path, folder, model):
    """Execute the examination of one notebook; returns the folder of the model's outputs, and the errors."""
    source = folder / path.name
    nbformat.write(examination(run.read_notebook(path), WRONG[path.stem]), source)
    errors = failures(run.plan([model], [source], folder / "out", {}))
    return folder / "out" / model, errors
