"""Seconds to convert the models from wheels, once after installation, and to load them later.

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

from helpers.catalog import MODELS
from helpers.results import write_text
from tools.convert import wheel_files

OUT = Path("outputs/benchmarks/loading.json")
TIMED = """
import sys, time
from helpers import models
from tools import convert
start = time.perf_counter()
{}
print("SECONDS", time.perf_counter() - start)
"""


def seconds(call: str, cache: str) -> float:
    """One call, with converted weights kept in `cache`."""
    env = os.environ | {"XDG_CACHE_HOME": cache, "TQDM_DISABLE": "1"}
    code = [sys.executable, "-c", TIMED.format(call)]
    return float(subprocess.run(code, env=env, capture_output=True, text=True, check=True).stdout.split("SECONDS")[1])


def main():
    found = {}
    for name, source in MODELS.items():
        if source.kind == "wheel" and wheel_files(name):
            with tempfile.TemporaryDirectory() as cache:
                convert = seconds(f"convert.ensure('{name}')", cache)
                loads = [seconds(f"models.load('{name}', device='cpu')", cache) for _ in range(3)]
            found[name] = {"convert_s": round(convert, 2), "load_s": round(statistics.median(loads), 2)}
            print(name, found[name])
    write_text(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
