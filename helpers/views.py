"""Interactive CircuitsVis views. Beside each, put a static figure: GitHub runs no script."""

import re
from collections.abc import Sequence
from pathlib import Path

import circuitsvis
import torch
from circuitsvis.tokens import colored_tokens_multi
from IPython.display import HTML
from jaxtyping import Float
from torch import Tensor

from helpers.plots import spaced

_CALL = re.compile(
    r'from "(?P<cdn>[^"]+)";\s*render\(\s*"(?P<id>[^"]+)",\s*(?P<element>\w+),(?P<props>.*)\)\s*</script>', re.S
)


def script() -> HTML:
    """The CircuitsVis script from the installed package; show it once in a notebook.

    CircuitsVis itself inlines 1.3 MB in every view offline, and loads from a CDN online, so
    that a saved notebook is blank without a network.
    """
    text = (Path(circuitsvis.__file__).parent / "dist/cdn/iife.js").read_text(encoding="utf-8")
    # `</script` inside the text would end the element; the source map is not shipped with us.
    text = text.replace("</script", r"<\/script").replace("//# sourceMappingURL=iife.js.map", "")
    return HTML(f"<script>{text};window.CircuitsVis = CircuitsVis;</script>interactive views are ready")


def tokens(texts: list[str], values: Float[Tensor, "pos *label"], labels: Sequence[str] = ("value",)) -> HTML:
    """A text with a value per token, or one for each of `labels` to pick from; CircuitsVis refuses other lengths."""
    values = torch.as_tensor(values, dtype=torch.float64).cpu().round(decimals=3)
    return show(colored_tokens_multi([spaced(t) for t in texts], values.view(len(values), -1), labels))


def show(view) -> HTML:
    """A view of CircuitsVis that uses the script shown before, in place of one that it brings itself."""
    call = _CALL.search(view.cdn_src)
    # A token such as "</script>" or "<!--" must neither end the element nor swallow what follows it.
    props = call["props"].strip().replace("<", r"\u003c")
    # Colab puts every output into a page of its own, where only the CDN can be reached.
    return HTML(
        f'<div id="{call["id"]}" style="margin: 15px 0;"></div><script type="module">'
        f'const cv = window.CircuitsVis ?? await import("{call["cdn"]}");'
        f'cv.render("{call["id"]}", cv.{call["element"]}, {props})</script>'
    )
