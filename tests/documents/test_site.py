"""The built site in a browser: opened from disk, nothing fetched, search works, nothing wider than the screen."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.reporting.browser import Browser, chromium, missing

from .pages import ROOT

SITE = ROOT / "site"
REASON = missing() or ("" if (SITE / "index.html").exists() else "needs `make docs`")
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.slow]
PAGES = ("index", "getting-started", "tutorials/calibrate", "reference/cli", "reference/targets", "benchmarks")
WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
SEARCH = """
const [text, done] = arguments, input = document.querySelector('.md-search__input');
const found = () => [...document.querySelectorAll('.md-search-result__link')].map(link => link.getAttribute('href'));
const list = document.querySelector('.md-search-result__list');
new MutationObserver(() => found().length && done(found())).observe(list, {childList: true, subtree: true});
input.focus();
input.value = text;
input.dispatchEvent(new Event('input', {bubbles: true}));
input.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_every_screen_and_fetches_nothing(browser: Browser, page: str) -> None:
    browser.requests(), browser.complaints()
    for width in (1280, 390):
        for dark in (False, True):
            browser.look(width, dark)
            browser.open(SITE / f"{page}.html")
            assert browser.run(WIDER) <= 0
            scheme = browser.run("return document.body.getAttribute('data-md-color-scheme')")
            assert scheme == ("slate" if dark else "default")
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    assert browser.complaints() == []


def test_search_works_from_disk(browser: Browser) -> None:
    browser.look(1280)
    browser.open(SITE / "index.html")
    links = browser.call("/execute/async", {"script": SEARCH, "args": ["hard router"]})
    assert any("concepts/routers.html" in link for link in links)


def test_pages_name_no_other_host_for_what_they_load() -> None:
    for page in SITE.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"?(https?:[^\"> ]+)", page.read_text())
        assert not loaded, page
