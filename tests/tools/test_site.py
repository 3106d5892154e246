"""The site in a real browser: every page and view, with no request leaving the machine."""

from pathlib import Path

import pytest
from browsing import check_heads, induction_head
from examination import PATHS

from tools import site
from tools.__main__ import main
from tools.run import read_notebook

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return site.write_site(OUTPUTS, tmp_path_factory.mktemp("export") / "site").parent


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


# ---- the command ----


def test_a_page_in_markdown_takes_its_pictures_along_and_links_within_the_site(tmp_path):
    source = tmp_path / "from/report.md"
    (source.parent / "01_a/figures").mkdir(parents=True)
    (source.parent / "01_a/figures/f.png").write_bytes(b"picture")
    text = "# A <report>\n\n## [01_a](01_a.ipynb)\n\n![what it shows](01_a/figures/f.png)\n\n"
    source.write_text(
        text + "| a | b |\n|---|---|\n| 1 | 2 |\n\n[more](../atlas.md) [away](https://example.org/page.md)\n"
    )
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
