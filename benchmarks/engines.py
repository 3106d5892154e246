"""This checkout's sweeps beside those of another one, in turns: python -m benchmarks.engines OTHER [--models NAME ...]

OTHER is a git worktree of an earlier commit. Each checkout has a process of its own, both on the same prompts and
threads, in the environment of the runner's kernels. Writes outputs/benchmarks/engines.csv: medians in seconds, their
ratio, and the most that a sweep holds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tools.kernels import kernel_environment

HERE = Path(__file__).resolve().parents[1]
MODELS = ["induction-2l", "pythia-70m", "gpt2", "smollm2-135m", "gemma3-270m"]
SWEEPS = ["ablate, all positions", "patch z, last position", "patch z, all positions"]
LARGE = ("gpt2", "smollm2-135m", "gemma3-270m")  # whose last sweep says what the first says


class Engine:
    """A process that imports one checkout and runs what it is told."""

    def __init__(self, checkout: Path, model: str):
        # An earlier commit converts models into a format of its own.
        own = {} if checkout == HERE else {"XDG_CACHE_HOME": str(checkout / ".cache")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(checkout), "--models", model],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kernel_environment() | own,
        )  # fmt: skip

    def ask(self, **request):
        """Seconds, or bytes, of one run."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def serve(checkout: Path, model: str) -> None:
    """Answer requests from standard input, with the helpers of `checkout`."""
    sys.path[:0] = [str(checkout), str(checkout / "benchmarks"), str(HERE / "tests")]
    out, sys.stdout = sys.stdout, sys.stderr
    import oracles
    import sweeps

    from helpers import interventions

    bench = sweeps.Bench(model, 1, 1)
    (corrupted, clean), metric = bench.prompts(0)
    runs = {
        SWEEPS[0]: lambda: interventions.ablate_heads(bench.model, corrupted, metric),
        SWEEPS[1]: lambda: interventions.patch_heads(bench.model, corrupted, clean, metric, position="last"),
        SWEEPS[2]: lambda: interventions.patch_heads(bench.model, corrupted, clean, metric),
        "forward": lambda: bench.model(corrupted),
    }
    for line in sys.stdin:
        request = json.loads(line)
        run = runs[request["sweep"]]
        answer = oracles.peak_bytes(run) if request.get("memory") else sweeps.timed(run)
        print(json.dumps(answer), file=out, flush=True)


def compare(other: Path, model: str, repeats: int) -> list[dict]:
    """A row for every sweep of one model."""
    old, new = Engine(other, model), Engine(HERE, model)
    rows, forward = [], new.ask(sweep="forward", memory=True)
    for sweep in SWEEPS[: 2 if model in LARGE else 3]:
        turns, started = [], time.monotonic()
        old.ask(sweep=sweep), new.ask(sweep=sweep)  # a turn to warm up
        while len(turns) < repeats or time.monotonic() - started < 5:
            turns.append([engine.ask(sweep=sweep) for engine in (old, new)])
        before, after = map(statistics.median, zip(*turns))
        row = {"model": model, "sweep": sweep, "runs": len(turns)}
        row |= {"old_s": before, "new_s": after, "ratio": after / before}
        row |= {"peak_mb": new.ask(sweep=sweep, memory=True) / 2**20, "forward_mb": forward / 2**20}
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        rows.append(row)
    for engine in (old, new):
        engine.process.stdin.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.models[0])
    rows = [row for model in arguments.models for row in compare(arguments.other, model, arguments.repeats)]
    table = pd.DataFrame(rows)
    print(f"geometric mean of the ratios: {np.exp(np.log(table['ratio']).mean()):.2f}")
    path = Path("outputs/benchmarks/engines.csv")
    if path.exists():
        table = pd.concat([pd.read_csv(path), table]).drop_duplicates(["model", "sweep"], keep="last")
    table.round(4).to_csv(path, index=False)


if __name__ == "__main__":
    main()
