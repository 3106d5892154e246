"""Interactive views in a real browser: from exported pages and in JupyterLab, with no request leaving the machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from examination import PATHS

from tools import handout, site
from tools.__main__ import main
from tools.run import read_notebook

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"
COMMITTED = OUTPUTS / "induction-2l"
# Besides drawing without a screen: nothing of the browser's own that asks the network.
FLAGS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    program = handout.browser()
    if program is None and os.environ.get("REQUIRE_ALL"):
        pytest.fail("no browser, and REQUIRE_ALL is set")
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *FLAGS])
        yield opened
        opened.close()


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


@pytest.fixture
def visit(browser):
    visits = []

    def open_page(address, offline=True):
        visits.append(Visit(browser, address, offline))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return site.write_site(OUTPUTS, tmp_path_factory.mktemp("export") / "site").parent


@pytest.fixture
def keep_screenshot(request, tmp_path):
    """Where a screenshot goes: to the folder named by `--screenshots`, else to be forgotten."""
    folder = request.config.getoption("--screenshots")
    return lambda name: str((Path(folder) if folder else tmp_path) / f"{name}.png")


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


def test_heads_are_drawn_and_hovered_without_a_network(visit, exported, keep_screenshot):
    opened = visit((exported / "induction-2l/02_attention_visualization.html").as_uri())
    view = opened.page.locator("[id^=circuits-vis]")
    check_heads(view, induction_head())
    view.screenshot(path=keep_screenshot("attention_heads"))
    assert not opened.outside() and not opened.errors


@pytest.mark.parametrize(
    "notebook, name", [("01_prompt_construction", "token_strip"), ("05_logit_lens", "tokens_by_stop")]
)
def test_token_views_are_drawn_and_hovered_without_a_network(visit, exported, keep_screenshot, notebook, name):
    opened = visit((exported / f"induction-2l/{notebook}.html").as_uri())
    view = opened.page.locator("[id^=circuits-vis]")
    cells = view.locator("span > span[style*=background-color]")
    cells.first.wait_for()
    assert cells.count() > 20
    colours = {cell.evaluate("cell => cell.style.backgroundColor") for cell in cells.all()}
    assert len(colours) > 5
    before = opened.page.locator("body").inner_text()
    cells.nth(10).hover()
    opened.page.wait_for_function("before => document.body.innerText !== before", arg=before)
    view.screenshot(path=keep_screenshot(name))
    assert not opened.outside() and not opened.errors


def test_every_page_of_the_site_asks_the_network_for_nothing(visit, exported):
    opened = visit((exported / "index.html").as_uri())
    links = [link.get_attribute("href") for link in opened.page.locator("a").all()]
    pages = [exported / link for link in links if not link.startswith("http")]
    assert len(pages) > len(PATHS) and exported / "atlas.html" in pages
    assert exported / "induction-2l/report.html" in pages
    for path in pages:
        opened.page.goto(path.as_uri())
        assert opened.page.locator("h1").first.is_visible()
        pictures = opened.page.locator("img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])")
        assert all(text and width for text, width in pictures), path
    assert not opened.outside() and not opened.errors
    assert sum(path.stat().st_size for path in exported.rglob("*")) < 25e6


# ---- JupyterLab ----


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab with the executed notebook 02, trusted, as one that was just run; its address."""
    shutil.copy(COMMITTED / "02_attention_visualization.ipynb", tmp_path / "executed.ipynb")
    settings = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    env = os.environ | {key: str(tmp_path / value) for key, value in settings.items()}
    subprocess.run([sys.executable, "-m", "jupyter", "trust", "executed.ipynb"], cwd=tmp_path, env=env, check=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ip=localhost", "--IdentityProvider.token="]
    options += ["--no-browser", "--allow-root"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=env, **quiet) as server:
        try:
            wait_for(port, server)
            yield f"http://localhost:{port}/lab/tree/executed.ipynb"
        finally:
            server.terminate()


def wait_for(port: int, server, seconds: float = 60):
    for _ in range(int(seconds / 0.5)):
        assert server.poll() is None, "JupyterLab ended"
        with socket.socket() as attempt:
            if attempt.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer within {seconds} s")


def test_heads_are_drawn_in_jupyterlab(visit, lab):
    opened = visit(lab, offline=False)
    opened.page.locator("h1").first.wait_for(timeout=60_000)
    view = opened.page.locator("[id^=circuits-vis]")
    panel = opened.page.locator(".jp-WindowedPanel-outer, .jp-Notebook").first
    for _ in range(150):  # cells are rendered as they come into sight
        if view.count():
            break
        panel.evaluate("panel => panel.scrollBy(0, 400)")
        opened.page.wait_for_timeout(250)
    view.first.scroll_into_view_if_needed()
    opened.page.wait_for_timeout(3_000)  # a view is filled after it was attached
    check_heads(view, induction_head())
    # The badge's picture is the one thing that the notebook itself names on another machine.
    assert all(url.endswith("/colab-badge.svg") for url in opened.outside())


# ---- the command ----


def test_a_page_in_markdown_takes_its_pictures_along_and_links_within_the_site(tmp_path):
    source = tmp_path / "from/report.md"
    (source.parent / "01_a/figures").mkdir(parents=True)
    (source.parent / "01_a/figures/f.png").write_bytes(b"picture")
    text = "# A <report>\n\n## [01_a](01_a.ipynb)\n\n![what it shows](01_a/figures/f.png)\n\n"
    source.write_text(text + "| a | b |\n|---|---|\n| 1 | 2 |\n\n[more](../atlas.md) [away](https://example.org/page.md)\n")
    page = site.write_page(source, tmp_path / "to/report.html").read_text()
    assert "<h1>A &lt;report&gt;</h1>" in page and 'href="01_a.html"' in page and "<td>1</td>" in page
    assert 'href="../atlas.html"' in page and 'href="https://example.org/page.md"' in page
    assert 'alt="what it shows"' in page and (tmp_path / "to/01_a/figures/f.png").exists()


def test_questions_are_read_from_the_notebooks():
    questions = [site.question(read_notebook(path)) for path in PATHS]
    assert len(set(questions)) == len(questions)
    assert all(20 < len(q) < 160 and q[0].isupper() and q.endswith("?") for q in questions)


def test_the_command_refuses_what_it_would_destroy(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["site", "--outputs", str(OUTPUTS), "--out", str(tmp_path / "mine")]) == 2
    assert "is not a site" in capsys.readouterr().err
    assert main(["site", "--outputs", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "make run" in capsys.readouterr().err
