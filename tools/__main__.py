"""What maintainers and teachers run from a clone; `python -m tools COMMAND --help` says more."""

import argparse
import signal
import sys
from importlib import import_module

from helpers.catalog import ModelUnavailable

# A command is the module of its name, with `add_arguments(parser)` and `main(arguments) -> exit code`.
COMMANDS = {
    "run": "execute notebooks and write their outputs and report",
    "report": "compare the models of which there are outputs, or put the measured numbers into README",
    "check": "what a model is, and whether it can be trusted here",
    "models": "list the models and whether each is ready on this machine",
    "editions": "write student and solution editions of the notebooks, and the handout",
    "site": "build a static site with a search from the executed notebooks",
    "train": "train an embedded model from its recipe",
    "convert": "turn weights of another format into a folder that can be loaded",
}


def interrupt(*_) -> None:
    """Interrupt once: later signals must not disturb what ends the kernels."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake in its arguments is one line on standard error and exit code 2."""
    lines = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "python -m tools", description=f"{__doc__}\n\n{lines}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    chosen = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        # Only now, because some commands need torch and most must answer at once.
        command = import_module(f"tools.{chosen.command}")
        parser = argparse.ArgumentParser(f"python -m tools {chosen.command}", description=COMMANDS[chosen.command])
        command.add_arguments(parser)
        return command.main(parser.parse_args(chosen.arguments))
    except ModuleNotFoundError as error:
        print(f"error: {error}; type `pip install -r requirements.txt`", file=sys.stderr)
        return 2
    except (ValueError, ModelUnavailable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was done is kept, and earlier results are untouched", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
