"""How a run goes: one live line for each notebook in work on a terminal, plain lines in a log."""

import asyncio
import sys
from contextlib import suppress

from tqdm import tqdm


class Progress:
    """The lines of the notebooks in work; `disable=None` of tqdm shows live ones on a terminal alone."""

    def __init__(self):
        self.bars: dict[str, tqdm] = {}

    def begin(self, label: str, n_cells: int, last_s: float | None) -> None:
        """A notebook starts; `last_s` is how long its last run took, in seconds, where that is known."""
        if again := self.bars.pop(label, None):  # the worker that had it has died
            again.close()
        last = f", {tqdm.format_interval(last_s)} last time" if last_s is not None else ""
        form = "{desc}  cell {n_fmt} of {total_fmt}, {elapsed}" + last
        bar = self.bars[label] = tqdm(total=n_cells, desc=label, bar_format=form, leave=False, disable=None)
        if bar.disable:
            self.say(f"started {label} ({n_cells} cells{last})")

    def at(self, label: str, n_done: int) -> None:
        """So many cells of a notebook are done."""
        if bar := self.bars.get(label):
            bar.n = n_done
            bar.refresh()

    def end(self, label: str, how: str) -> None:
        """A notebook has ended; `how` stays on the screen."""
        if bar := self.bars.pop(label, None):
            bar.close()
        self.say(how)

    def say(self, line: str, file=None) -> None:
        """A line that stays, above the live ones."""
        tqdm.write(line, file=file or sys.stdout)
        (file or sys.stdout).flush()

    async def __aenter__(self) -> "Progress":
        self.clock = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_) -> None:
        self.clock.cancel()
        with suppress(asyncio.CancelledError):
            await self.clock
        for bar in self.bars.values():
            bar.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            for bar in list(self.bars.values()):
                bar.refresh()
