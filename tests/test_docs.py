"""The built site in a real browser, opened from its folder: pages fit a phone, and search finds."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the site needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").is_file()


def test_pages_fit_a_phone(browser, site):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    wide, errors = {}, []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri(), wait_until="load")
        excess = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wrapped = page.evaluate(
            "[...document.querySelectorAll('pre > code')].map(getComputedStyle)"
            ".some((style) => style.whiteSpace !== 'pre' || style.overflowX !== 'auto')"
        )
        if excess > 0 or wrapped:
            wide[str(path.relative_to(site))] = (excess, wrapped)
    page.close()
    assert wide == {} and errors == []


def test_search_works_from_the_folder(browser, site):
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").click()
    page.keyboard.type("padding tokens")
    page.wait_for_selector(".md-search-result__item")
    found = page.locator(".md-search-result__item").all_inner_texts()
    page.close()
    assert any("scan" in text.lower() for text in found)
