"""What a figure shows, in words, for readers who cannot see it: read from the cell that draws it."""

import ast
import re

from nbformat import NotebookNode

# What the functions that draw make.
KINDS = {
    "head_grid": "map of all heads, and the strongest with intervals",
    "intervals": "rows with intervals",
    "pattern": "attention pattern",
    "matrices": "maps",
    "curve": "curves",
    "histogram": "histogram",
    "scatter": "scatter",
    "token_strip": "text with each token coloured",
    "circuit_diagram": "diagram of the circuit",
    "graph": "diagram",
}


def captions(notebook: NotebookNode) -> dict[str, str]:
    """What every figure shows that the notebook keeps, by the figure's name."""
    return {name: text for texts in _by_cell(notebook) for name, text in texts.items()}


def describe(notebook: NotebookNode) -> NotebookNode:
    """Give every stored picture of an executed notebook its alternative text; the notebook itself is changed."""
    for cell, texts in zip(notebook.cells, _by_cell(notebook)):
        text = " / ".join(texts.values()) or f"Figure of {texts.heading}"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": text}
    return notebook


class _Texts(dict):
    """The captions of one cell, and the heading that it stands under."""

    heading = ""


def _by_cell(notebook: NotebookNode) -> list[_Texts]:
    found, heading = [], "the notebook"
    for cell in notebook.cells:
        texts = _Texts()
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, flags=re.M) or [heading])[-1]
        else:
            texts |= {name: f"{_words(name)}: {shown}. Section: {heading}" for name, shown in _kept(cell.source).items()}
        texts.heading = heading
        found.append(texts)
    return found


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _kept(source: str) -> dict[str, str]:
    """What is drawn for each name that a cell keeps."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # a cell with a command of IPython
        return {}
    everywhere = [drawn for call in calls for drawn in _drawn(call)]
    kept = {}
    for call in calls:
        match call:
            case ast.Call(func=ast.Attribute(attr="keep"), args=[ast.Constant(value=str(name)), value, *_]):
                inside = [drawn for node in ast.walk(value) if isinstance(node, ast.Call) for drawn in _drawn(node)]
                if inside or (everywhere and isinstance(value, ast.Name)):
                    kept[name] = "; ".join(inside or everywhere)
    return kept


def _drawn(call: ast.Call) -> list[str]:
    """The kind of figure that a call draws, with its labels; nothing if it draws none."""
    kind = KINDS.get(call.func.attr) if isinstance(call.func, ast.Attribute) else None
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    labels = [text for text in texts if isinstance(text, str) and text]
    return [f"{kind} ({', '.join(labels)})" if labels else kind] if kind else []
