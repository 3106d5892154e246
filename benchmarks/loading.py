"""Seconds to load the models from wheels: the first time after installation, and later.

    python benchmarks/loading.py

Every load is in a process of its own, imports apart. Writes outputs/benchmarks/loading.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.catalog import MODELS, wheel_files
from helpers.results import write_text

OUT = Path("outputs/benchmarks/loading.json")
LOAD = """
import sys, time
from helpers import models
start = time.perf_counter()
models.load(sys.argv[1], device="cpu")
print("SECONDS", time.perf_counter() - start)
"""


def seconds(name: str, cache: str) -> float:
    """One load, with converted weights kept in `cache`."""
    env = os.environ | {"XDG_CACHE_HOME": cache, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, name], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split("SECONDS")[1])


def main():
    found = {}
    for name, source in MODELS.items():
        if source.kind == "wheel" and wheel_files(source):
            with tempfile.TemporaryDirectory() as cache:
                first, *later = (seconds(name, cache) for _ in range(4))
            found[name] = {"first_s": round(first, 2), "later_s": round(statistics.median(later), 2)}
            print(name, found[name])
    write_text(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
