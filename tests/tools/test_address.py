"""The repository's address is changed everywhere by one command, and no file repeats another one."""

import subprocess

import pytest

from tools import address
from tools.__main__ import main

OLD = "someone/induction-heads"


@pytest.fixture
def clone(tmp_path):
    files = {
        "pyproject.toml": f'[project.urls]\nRepository = "https://github.com/{OLD}"\n',
        "README.md": f"[b](https://colab.research.google.com/github/{OLD}/blob/main/notebooks/01.ipynb)",
        "notebooks/01.ipynb": f'"%pip install \\"induction-heads @ git+https://github.com/{OLD}\\""',
        "other.md": f"https://github.com/{OLD}-of-another and {OLD}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "figure.png").write_bytes(b"\x89PNG\xff")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def test_every_file_gets_the_new_address(clone):
    pages = {path.name for path in address.change_address("me/mine.v2", clone)}
    assert pages == {"pyproject.toml", "README.md", "01.ipynb"}
    assert address.address(clone) == "me/mine.v2"
    assert "/github/me/mine.v2/blob/main" in (clone / "README.md").read_text()
    assert "git+https://github.com/me/mine.v2" in (clone / "notebooks/01.ipynb").read_text()
    assert f"{OLD}-of-another" in (clone / "other.md").read_text()


def test_what_is_no_address_is_refused(clone, tmp_path_factory, capsys):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        address.change_address("https://github.com/me/mine", clone)
    bare = tmp_path_factory.mktemp("bare")
    (bare / "pyproject.toml").write_text((clone / "pyproject.toml").read_text())
    with pytest.raises(ValueError, match="no clone"):
        address.change_address("me/mine", bare)
    assert main(["address"]) == 0 and capsys.readouterr().out.strip() == address.address()


def test_all_badges_and_installations_name_the_address_of_pyproject():
    found = {}
    for path in address.tracked(address.ROOT):
        if path.suffix in (".md", ".ipynb"):
            for name in address.repeats(path.read_text(encoding="utf-8")):
                found.setdefault(name, path)
    assert set(found) == {address.address()}, found
