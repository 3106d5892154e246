"""The site in a real browser: every page and view, with no request leaving the machine."""

import io
import re
from contextlib import redirect_stderr
from pathlib import Path

import nbformat
import pytest
from browsing import check_heads, induction_head
from examination import PATHS
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import site
from tools.__main__ import main
from tools.run import read_notebook

OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"

# MyST calls what Sphinx will give up in two editions from now.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    with redirect_stderr(io.StringIO()) as complaints:
        contents = site.write_site(OUTPUTS, tmp_path_factory.mktemp("export") / "site")
    assert not complaints.getvalue()
    return contents.parent


def leads_to(page: Path) -> set[Path]:
    """The files of the site that the links of a page lead to."""
    links = re.findall(r'<a [^>]*href="([^":#]+)(?:#[^"]*)?"', page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links}


def test_heads_are_drawn_and_hovered_without_a_network(visit, exported, keep_screenshot):
    opened = visit((exported / "induction-2l/02_attention_visualization.html").as_uri())
    view = opened.page.locator("[id^=circuits-vis]")
    check_heads(view, induction_head())
    view.screenshot(path=keep_screenshot("attention_heads"))
    assert not opened.outside() and not opened.errors


@pytest.mark.parametrize(
    "notebook, name",
    [
        ("01_prompt_construction", "token_strip"),
        ("05_logit_lens", "tokens_by_stop"),
        ("10_in_the_wild", "text_by_token"),
    ],
)
def test_token_views_are_drawn_and_hovered_without_a_network(visit, exported, keep_screenshot, notebook, name):
    opened = visit((exported / f"induction-2l/{notebook}.html").as_uri())
    view = opened.page.locator("[id^=circuits-vis]").first
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
    pages = sorted(exported.rglob("*.html"))
    executed = {path.relative_to(OUTPUTS).with_suffix(".html") for path in OUTPUTS.glob("*/[0-9]*.ipynb")}
    assert executed < {path.relative_to(exported) for path in pages}
    opened = visit((exported / "index.html").as_uri())
    for path in pages:
        opened.page.goto(path.as_uri())
        assert opened.page.locator("h1:visible").count()
        pictures = opened.page.locator("img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])")
        assert all(text and width for text, width in pictures), path
        wide, seen = opened.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen, path
    assert not opened.outside() and not opened.errors


def test_every_page_is_reached_and_every_link_leads_to_a_file(exported):
    pages = set(exported.rglob("*.html"))
    assert pages - leads_to(exported / "index.html") <= {exported / "index.html", exported / "search.html"}
    assert {exported / "atlas.html", exported / "induction-2l/report.html"} < pages
    for page in pages:
        assert all(path.exists() for path in leads_to(page)), page
        assert 'href="#0' not in page.read_text(encoding="utf-8"), page  # what the builder did not find
    # The navigation leads everywhere; here, the links in the text.
    for page, link in {
        "induction-2l/report.html": "03_head_ablation.html",
        "smollm2-135m/02_attention_visualization.html": "01_prompt_construction.html",
        "atlas.html": "smollm2-135m/report.html",
    }.items():
        assert f'<a class="reference internal" href="{link}"><span' in (exported / page).read_text(encoding="utf-8")


def test_a_word_is_found_without_a_network(visit, exported):
    opened = visit((exported / "index.html").as_uri())
    opened.page.locator("input[name=q]").fill("ablation")
    opened.page.keyboard.press("Enter")
    found = opened.page.locator("ul.search li a")
    opened.page.get_by_text(re.compile("found .* pages")).wait_for()
    addresses = found.evaluate_all("all => all.map(link => link.href)")
    assert "induction-2l/03_head_ablation.html" in " ".join(addresses[:6])
    assert "03 · Head ablation (induction-2l)" in found.all_inner_texts()
    assert all(Path(re.sub(r"^file://|[#?].*", "", address)).exists() for address in addresses)
    found.first.click()
    opened.page.locator("h1", has_text="ablation").wait_for()
    assert not opened.outside() and not opened.errors


def test_what_pages_share_is_stored_once(exported):
    sizes = {path: path.stat().st_size for path in exported.rglob("*")}
    assert sum(sizes.values()) < 25e6 and sizes[exported / "searchindex.js"] < 1e6
    assert max(size for path, size in sizes.items() if path.suffix == ".html") < 3e5
    text = (exported / "induction-2l/02_attention_visualization.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="\.\./_images/([^"]+)"', text)
    assert set(shown) < set(re.findall(r"_images/([^\"]+)", (exported / "induction-2l/report.html").read_text()))


# ---- the command ----


@pytest.fixture
def outputs(tmp_path):
    """Outputs of one model: a notebook, one that failed, and a report."""
    folder = tmp_path / "outputs/tiny"
    (folder / "01_a/figures").mkdir(parents=True)
    (folder / "01_a/figures/f.png").write_bytes(b"picture")
    cells = [new_markdown_cell("# 01 · A\n\n**Why?** See [02](02_b.ipynb)."), new_code_cell("print('$a$')")]
    notebook = new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    for name in ("01_a", "02_b.failed"):
        nbformat.write(notebook, folder / f"{name}.ipynb")
    text = "# A report\n\n## [01_a](01_a.ipynb)\n\n![what it shows](01_a/figures/f.png)\n\n"
    text += "| a | b |\n|---|---|\n| 1 | $2$ |\n\n[more](../atlas.md) [away](https://example.org/page.md)\n"
    (folder / "report.md").write_text(text)
    (folder.parent / "atlas.md").write_text("# Atlas\n\n[tiny](tiny/report.md)\n")
    return folder.parent


def test_a_page_in_markdown_takes_its_pictures_along_and_links_within_the_site(outputs, tmp_path, capsys):
    assert main(["site", "--outputs", str(outputs), "--out", str(tmp_path / "new")]) == 0
    assert not capsys.readouterr().err
    report, notebook = (tmp_path / f"new/tiny/{name}.html" for name in ("report", "01_a"))
    assert {notebook, tmp_path / "new/atlas.html"} < leads_to(report)
    text = report.read_text(encoding="utf-8")
    assert 'href="https://example.org/page.md"' in text and "<td><p>$2$</p></td>" in text
    assert 'alt="what it shows"' in text and (tmp_path / "new/_images/f.png").read_bytes() == b"picture"
    # What failed has no page, and its name no link.
    assert not list((tmp_path / "new").rglob("02_b*")) and "</strong> See 02.</p>" in notebook.read_text(
        encoding="utf-8"
    )


def test_a_model_alone_is_a_site_too(outputs, tmp_path, capsys):
    (outputs / "atlas.md").unlink()
    (outputs / "tiny/report.md").unlink()
    assert main(["site", "--outputs", str(outputs), "--out", str(tmp_path / "new")]) == 0
    assert not capsys.readouterr().err


def test_a_site_stays_until_the_next_is_built(outputs, tmp_path, monkeypatch):
    contents = site.write_site(outputs, tmp_path / "new")
    before = contents.read_text()

    def broken(source, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(site, "_build", broken)
    with pytest.raises(KeyboardInterrupt):
        site.write_site(outputs, tmp_path / "new")
    assert contents.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "outputs"]


def test_a_machine_without_the_builder_is_told_what_to_install(outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(site, "find_spec", lambda name: None)
    assert main(["site", "--outputs", str(outputs), "--out", str(tmp_path / "new")]) == 2
    assert "pip install myst-nb" in capsys.readouterr().err


def test_questions_are_read_from_the_notebooks():
    questions = [site.question(read_notebook(path)) for path in PATHS]
    assert len(set(questions)) == len(questions)
    assert all(20 < len(q) < 160 and q[0].isupper() and q.endswith("?") for q in questions)


def test_the_command_refuses_what_it_would_destroy(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["site", "--outputs", str(OUTPUTS), "--out", str(tmp_path / "mine")]) == 2
    assert "is not a site" in capsys.readouterr().err
    (tmp_path / "mine/index.html").write_text("a page of my own")
    assert main(["site", "--outputs", str(OUTPUTS), "--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine/index.html").read_text() == "a page of my own"
    capsys.readouterr()
    assert main(["site", "--outputs", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "make run" in capsys.readouterr().err
