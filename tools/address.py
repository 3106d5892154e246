"""Change the repository's address, which pyproject.toml holds, in every file that repeats it."""

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

from helpers.results import write_text

ROOT = Path(__file__).resolve().parents[1]
# Where an address stands: links and `pip install`, and the badges that open a notebook on Colab.
_SITES = r"(?:github\.com|colab\.research\.google\.com/github)/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", nargs="?", metavar="OWNER/NAME", help="on GitHub; without it, shows the present one")


def main(arguments: argparse.Namespace) -> int:
    if arguments.address is None:
        print(address())
        return 0
    changed = change_address(arguments.address)
    print(f"{len(changed)} files now name {arguments.address}; look at `git diff --stat`")
    return 0


def address(root: Path = ROOT) -> str:
    """OWNER/NAME of the repository, from pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def repeats(text: str) -> list[str]:
    """Every OWNER/NAME to which a badge or an installation in a text refers."""
    return re.findall(r"(?:colab\.research\.google\.com/github|git\+https://github\.com)/([\w.-]+/[\w.-]*\w)", text)


def change_address(new: str, root: Path = ROOT) -> list[Path]:
    """Put `new` in place of the present address in every tracked text file; returns those that changed.

    Raises:
        ValueError: `new` is not OWNER/NAME, or `root` is no clone.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]*\w", new):
        raise ValueError(f"{new!r} is no address of a repository; type OWNER/NAME, as in {address(root)}")
    old, changed = re.compile(f"({_SITES}){re.escape(address(root))}(?![\\w-])"), []
    for path in tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a figure or weights
        if old.search(text):
            changed.append(write_text(path, old.sub(rf"\g<1>{new}", text)))
    return changed


def tracked(root: Path) -> list[Path]:
    """The files that git knows.

    Raises:
        ValueError: `root` is no clone, or git is missing.
    """
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{root} is no clone of the repository, or git is not installed; clone it first") from None
    return [root / name for name in done.stdout.split("\0") if name and (root / name).is_file()]
