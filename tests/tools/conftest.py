"""A real browser, without which the tests of views are skipped, or fail where nothing may be skipped."""

import os
from pathlib import Path

import pytest
from browsing import Visit

from tools import handout

# Besides drawing without a screen: nothing of the browser's own that asks the network.
FLAGS = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
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


@pytest.fixture
def visit(browser):
    visits = []

    def open_page(address, offline=True):
        visits.append(Visit(browser, address, offline))
        return visits[-1]

    yield open_page
    for one in visits:
        one.context.close()


@pytest.fixture
def keep_screenshot(request, tmp_path):
    """Where a screenshot goes: to the folder named by `--screenshots`, else to be forgotten."""
    folder = request.config.getoption("--screenshots")
    return lambda name: str((Path(folder) if folder else tmp_path) / f"{name}.png")
