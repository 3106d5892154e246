"""Requirements, environment and pyproject agree, and README says only what an output holds."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tools import readme, report
from tools.run import find_notebooks, read_notebook

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = [path.name for path in find_notebooks()]


def pins(lines):
    return {Requirement(line).name: Requirement(line) for line in lines if line and line[0] not in "#-"}


REQUIREMENTS = pins((ROOT / "requirements.txt").read_text().splitlines())


def test_requirements_are_exact_and_torch_is_the_pinned_build():
    assert all(str(r.specifier).startswith("==") for r in REQUIREMENTS.values())
    assert str(REQUIREMENTS["torch"].specifier) == "==2.13.0"


def test_environment_has_the_same_pins():
    lines = (ROOT / "environment.yml").read_text().split("- pip:\n")[1].splitlines()
    listed = [line.strip().removeprefix("- ") for line in lines]
    assert {r.name: str(r) for r in pins(listed).values()} == {r.name: str(r) for r in REQUIREMENTS.values()}


def test_every_range_in_pyproject_admits_its_pin():
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"] + extras["lab"] + extras["tools"] + extras["train"]:
        wanted = Requirement(text)
        (pin,) = REQUIREMENTS[wanted.name].specifier
        assert wanted.specifier.contains(pin.version), text


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The outputs as committed: `make run` writes them anew, with this machine's times."""
    if not (ROOT / ".git").exists():
        return ROOT / "outputs"
    folder = tmp_path_factory.mktemp("committed")
    wanted = ["outputs/*/*/summary.json", "outputs/benchmarks/*.json"]
    listed = subprocess.run(["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    archive = ["git", "archive", "HEAD", *listed.split()]
    with subprocess.Popen(archive, cwd=ROOT, stdout=subprocess.PIPE) as made:
        subprocess.run(["tar", "-x", "-C", folder], stdin=made.stdout, check=True)
    return folder / "outputs"


def test_measured_numbers_in_readme_are_those_of_the_outputs(committed):
    block = f"{readme.BEGIN}\n{readme.measured(committed)}\n\n{readme.END}"
    assert block in README, "type `python -m tools report --readme`"


def test_readme_has_no_measured_number_outside_its_block():
    prose = README.partition(readme.BEGIN)[0] + README.partition(readme.END)[2]
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.S)
    assert set(re.findall(r"\d+\.\d+", prose)) == {"3.11"}  # of Python


def test_readme_is_short_and_reads_as_text():
    lines = README.splitlines()
    assert len(lines) < 120
    assert README.count("<!--") == 2
    assert all(len(line) <= 120 for line in lines if "](" not in line and "]: " not in line)


def test_a_readme_without_its_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text(README.replace(readme.END, ""))
    with pytest.raises(ValueError, match="lost a marker"):
        readme.write_readme(ROOT / "outputs", tmp_path / "README.md")
    with pytest.raises(ValueError, match="make run"):
        readme.measured(tmp_path)


def test_the_documents_link_to_what_exists():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/INSTRUCTOR.md"):
        text, folder = (ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists(), f"{name}: {target}"


def test_readme_has_a_row_and_a_badge_for_every_notebook():
    address = PROJECT["urls"]["Repository"].replace("https://github.com/", "https://colab.research.google.com/github/")
    badges = re.findall(rf"^\[(\d\d)\]: {re.escape(address)}/blob/main/workshop/student/(\w+\.ipynb)$", README, re.M)
    assert badges == [(name[:2], name) for name in NOTEBOOKS]
    rows = re.findall(r"^\| (\d\d) [a-z ]+ \| [A-Z].*\? \| \d+ \| .*\[(\d\d)\] .*notebooks/(\w+\.ipynb)", README, re.M)
    assert rows == [(name[:2], name[:2], name) for name in NOTEBOOKS]


def test_the_minutes_in_readme_are_not_exceeded(committed):
    minutes = dict(re.findall(r"^\| (\d\d) .*\? \| (\d+) \|", README, re.M))
    seconds = report.read_summaries(committed / "induction-2l")
    for notebook in NOTEBOOKS:
        took = seconds[notebook.removesuffix(".ipynb")]["wall_time_s"]
        assert took <= 60 * int(minutes[notebook[:2]]), f"{notebook} took {took} s"


def test_where_to_add_things_is_true():
    for name in re.findall(r"`((?:helpers|tools)/\w+\.py)`", README):
        assert (ROOT / name).exists() or name == "tools/NAME.py", name
    assert re.search(r"^MODELS\b", (ROOT / "helpers/catalog.py").read_text(), re.M)
    commands = [path for path in (ROOT / "tools").glob("*.py") if "def main(" in path.read_text()]
    assert all("def add_arguments(" in path.read_text() for path in commands if path.name != "__main__.py")


def test_all_badges_and_installations_name_the_address_of_pyproject():
    places = ("notebooks/*.ipynb", "workshop/student/*.ipynb", "outputs/*/*.ipynb")
    text = README + "".join(path.read_text(encoding="utf-8") for place in places for path in ROOT.glob(place))
    found = re.findall(r"(?:research\.google\.com/github|git\+https://github\.com)/([\w.-]+/[\w.-]*\w)", text)
    assert {f"https://github.com/{name}" for name in found} == {PROJECT["urls"]["Repository"]}


def test_the_badge_of_a_notebook_opens_its_student_edition():
    for name in NOTEBOOKS:
        assert f"/blob/main/workshop/student/{name})" in read_notebook(ROOT / "notebooks" / name).cells[0].source, name


def test_the_ci_calls_readmes_test_command():
    assert "make test" in README and "make run" in README
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_citation_and_licence_name_the_project():
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["urls"]["Repository"] in citation and f"version: {PROJECT['version']}" in citation
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "MIT" in (ROOT / "LICENSE").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the size is that of the repository's own files")
def test_the_repository_is_small_and_holds_no_pickle():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert sum(p.stat().st_size for p in paths if p.exists()) < 60e6
    assert not [p for p in paths if p.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]


def test_cards_say_what_the_models_are_with_the_numbers_of_their_logs():
    losses = "validation_loss loss_token_50 loss_token_500 in_context_score first_copy_loss second_copy_loss".split()
    for name in ("induction-2l", "induction-1l"):
        folder = ROOT / "helpers/weights" / name
        card, last = (folder / "CARD.md").read_text(), json.loads((folder / "log.json").read_text())[-1]
        for word in ("Trained on", "Held out", "How", "validation loss", "Limits", "Licence"):
            assert word in card
        values = re.findall(r"^\|.*\| ([-\d. /]+) \|$", card, flags=re.M)
        strongest = [np.max(last["induction_score"]), np.max(last["previous_token_score"])]
        expected = [last[key] for key in losses] + strongest
        assert [float(number) for value in values for number in value.split("/")] == pytest.approx(expected, abs=6e-4)
        assert f"{last['tokens'] / 1e6:.1f} M tokens" in card and f"{last['seconds'] / 60:.0f} minutes" in card
