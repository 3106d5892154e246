"""Requirements, environment and pyproject agree, and README says only what an output holds."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MEASURED = re.compile(r"<!--(?P<file>[^:>]+):(?P<key>[^:>]+):(?P<format>[^>]+)-->(?P<text>\d+(?:\.\d+)?)")


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


def committed(file: str) -> str:
    """A file as committed: `make run` writes outputs anew, with this machine's times."""
    shown = subprocess.run(["git", "show", f"HEAD:{file}"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else (ROOT / file).read_text(encoding="utf-8")


def test_measured_numbers_in_readme_are_in_the_outputs():
    found = list(MEASURED.finditer(README))
    assert found
    for match in found:
        value = json.loads(committed(match["file"]))
        for key in match["key"].split("."):
            value = value[key]
        assert format(value, match["format"]) == match["text"], match[0]


def test_readme_has_no_other_decimals():
    prose = MEASURED.sub("", re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", README, flags=re.S))
    allowed = {"3.11", "3.12", "3.13", "4.0", "4.3"}  # versions of Python and TransformerLens
    assert not set(re.findall(r"\d+\.\d+", prose)) - allowed


def test_readme_links_and_figures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_readme_has_a_badge_for_every_notebook():
    address = PROJECT["urls"]["Repository"].replace("https://github.com/", "https://colab.research.google.com/github/")
    notebooks = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert re.findall(re.escape(address) + r"/blob/main/notebooks/(\w+\.ipynb)", README) == notebooks


def test_the_ci_calls_readmes_test_command():
    assert "make test" in README and "make run" in README
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_citation_and_licence_name_the_project():
    assert PROJECT["urls"]["Repository"] in (ROOT / "CITATION.cff").read_text()
    assert "MIT" in (ROOT / "LICENSE").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the size is that of the repository's own files")
def test_the_repository_is_small_and_holds_no_pickle():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert sum(p.stat().st_size for p in paths if p.exists()) < 60e6
    assert not [p for p in paths if p.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]


def test_cards_say_what_the_models_are():
    for name in ("induction-2l", "induction-1l"):
        card = (ROOT / f"helpers/weights/{name}/CARD.md").read_text()
        for word in ("Trained on", "Held out", "How", "validation loss", "Limits", "Licence"):
            assert word in card
