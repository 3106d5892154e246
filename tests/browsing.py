"""Interactive views as a browser shows them."""

import json
from pathlib import Path
from urllib.parse import urlsplit

COMMITTED = Path(__file__).resolve().parents[1] / "outputs/induction-2l"


class Visit:
    """A page, what it asked for, and what went wrong in it."""

    def __init__(self, browser, address: str, offline: bool):
        self.requests, self.errors = [], []
        self.context = browser.new_context(offline=offline, viewport={"width": 1200, "height": 900})
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)

    def outside(self) -> list[str]:
        """Requests for anything that is not on this machine."""
        places = [urlsplit(url) for url in self.requests]
        return [p.geturl() for p in places if p.scheme in ("http", "https", "ws") and p.hostname != "localhost"]


def drawn(canvas) -> bool:
    """Whether a canvas holds more than one colour."""
    return canvas.evaluate(
        """canvas => {
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [canvas.width, canvas.height];
            const context = copy.getContext("2d");
            context.drawImage(canvas, 0, 0);
            const pixels = new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer);
            return new Set(pixels).size > 1;
        }"""
    )


def check_heads(view, one: int):
    """All heads are drawn, and hovering one shows it large."""
    small = view.locator("canvas")
    small.first.wait_for(timeout=20_000)
    names = view.locator("h4").all_inner_texts()
    assert names == [f"L1H{head}" for head in range(8)]
    assert small.count() == len(names) + 1 and all(drawn(canvas) for canvas in small.all())
    before = small.last.evaluate("canvas => canvas.toDataURL()")
    small.nth(one).hover()
    view.get_by_text(f"{names[one]} Zoomed").wait_for()
    assert small.last.evaluate("canvas => canvas.toDataURL()") != before


def induction_head() -> int:
    """The number of the last layer's strongest head, from the committed results."""
    found = json.loads((COMMITTED / "02_attention_visualization/summary.json").read_text())["results"]
    return int(found["top_induction_head"].split("H")[1])
