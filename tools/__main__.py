"""Command line: python -m helpers run | report | models | workshop | html | train."""

import argparse
import sys
from pathlib import Path

from helpers.catalog import DEFAULT_MODEL, model_states


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute notebooks and write their outputs and report")
    run.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help="names, folders or hub ids")
    run.add_argument("--notebooks", nargs="+", metavar="NN", help="numbers or names; all by default")
    run.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    run.add_argument("--small", action="store_true", help="smaller batches, for models that are large for a CPU")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks; may be repeated",
    )  # fmt: skip

    commands.add_parser("models", help="list the models and whether each is ready on this machine")

    workshop = commands.add_parser("workshop", help="write student and solution editions of the notebooks")
    workshop.add_argument("--out", type=Path, default=Path("workshop"), metavar="DIR", help="default: workshop")

    report = commands.add_parser("report", help="compare the models of which there are outputs on one page")
    report.add_argument("--model", nargs="+", metavar="NAME", help="all that have outputs by default")
    report.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")

    site = commands.add_parser("html", help="export the executed notebooks as a static site")
    site.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    site.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="default: site")

    train = commands.add_parser("train", help="train an embedded model from its recipe")
    train.add_argument("name")
    train.add_argument("--folder", type=Path, default=Path("training-runs"), metavar="DIR")
    train.add_argument("--ship", action="store_true", help="put the result into the package")
    return parser


def _run(arguments) -> int:
    from helpers import series

    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}")
    notebooks = series.find_notebooks(arguments.notebooks)
    jobs = series.plan(arguments.model, notebooks, arguments.out, dict(arguments.parameters), arguments.small)
    errors = series.run(jobs, arguments.jobs)
    for label, error in errors.items():
        print(f"{label} failed at {error}", file=sys.stderr)
    print(f"{len(jobs) - len(errors)} of {len(jobs)} notebooks done; see {arguments.out}/<model>/report.md")
    return 1 if errors else 0


def _models(_) -> int:
    for name, state, needs, summary in model_states():
        print(f"{name:20}  {state:14}  {needs:42}  {summary}")
    print("A folder with a Hugging Face model, and any hub id written owner/name, work too.")
    return 0


def _workshop(arguments) -> int:
    from helpers.workshop import write_editions

    written = write_editions(arguments.out)
    print(f"{len(written)} files in {arguments.out}; open {arguments.out}/INSTRUCTOR.md first")
    return 0


def _report(arguments) -> int:
    from helpers.atlas import write_atlas

    print(f"see {write_atlas(arguments.outputs, arguments.model)}")
    return 0


def _html(arguments) -> int:
    from helpers.site import write_site

    contents = write_site(arguments.outputs, arguments.out)
    size = sum(path.stat().st_size for path in contents.parent.rglob("*")) / 1e6
    print(f"open {contents} in a browser; the folder is {size:.1f} MB and needs no network")
    return 0


def _train(arguments) -> int:
    from helpers import training

    folder = arguments.folder / arguments.name
    training.train(arguments.name, folder)
    print(f"done; `python -m helpers run --model {folder}` runs the series on it")
    if arguments.ship:
        training.ship(arguments.name, folder)
    return 0


COMMANDS = {"run": _run, "report": _report, "models": _models, "workshop": _workshop, "html": _html, "train": _train}


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake in its arguments is one line on standard error and exit code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; earlier results are untouched", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
