"""What a figure shows, in words, for readers who cannot see it: read from the cell that draws it."""

import ast
import re

from nbformat import NotebookNode

# What the functions that draw make.
KINDS = {
    "head_grid": "map of all heads, and the strongest with intervals",
    "intervals": "rows with intervals",
    "estimates": "rows with intervals",
    "matrices": "maps",
    "curve": "curves",
    "scatter": "scatter",
    "token_strip": "text with each token coloured",
    "circuit_diagram": "diagram of the circuit",
    "circuit": "diagram of the heads and edges that were measured",
}


def captions(notebook: NotebookNode) -> dict[str, str]:
    """What every figure shows that the notebook keeps, by the figure's name."""
    return {name: text for texts in by_cell(notebook) for name, text in texts.items()}


def describe(notebook: NotebookNode) -> NotebookNode:
    """Give every stored picture of an executed notebook its alternative text; the notebook itself is changed."""
    for cell, texts in zip(notebook.cells, by_cell(notebook)):
        text = " / ".join(texts.values()) or f"Figure of {texts.heading}"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": text}
    return notebook


class _Texts(dict):
    """The captions of one cell, and the heading that it stands under."""

    heading = ""


def by_cell(notebook: NotebookNode) -> list[_Texts]:
    """The captions of the figures that each cell keeps, by the figure's name."""
    found, heading = [], "the notebook"
    for cell in notebook.cells:
        texts = _Texts()
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, flags=re.M) or [heading])[-1]
        else:
            for name, shown in _kept(cell.source).items():
                texts[name] = f"{name.replace('_', ' ').capitalize()}: {shown}. Section: {heading}"
        texts.heading = heading
        found.append(texts)
    return found


def _kept(source: str) -> dict[str, str]:
    """What is drawn for each figure that a cell keeps, there and then or after giving it a name."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a command of IPython
        return {}
    named, kept = {}, []
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=variable)], value=value):
                named[variable] = _drawn(value)
            case ast.Call(func=ast.Attribute(attr="keep"), args=[ast.Constant(value=str(name)), value, *_]):
                kept.append((name, _drawn(value) or named.get(getattr(value, "id", None))))
    return {name: "; ".join(kinds) for name, kinds in kept if kinds}  # the estimates of a figure may have its name too


def _drawn(expression: ast.AST) -> list[str]:
    """The kind of every figure that an expression draws, with its labels."""
    calls = [node for node in ast.walk(expression) if isinstance(node, ast.Call)]
    return [_kind(call) for call in calls if getattr(call.func, "attr", None) in KINDS]


def _kind(call: ast.Call) -> str:
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    labels = [text for text in texts if isinstance(text, str) and text]
    return KINDS[call.func.attr] + (f" ({', '.join(labels)})" if labels else "")
