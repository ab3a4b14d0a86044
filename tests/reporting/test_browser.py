"""The page in a browser: nothing fetched, nothing complained of, pickers that draw what they should."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Browser, chromium, missing
from .sample import SMOLLM, report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from llamamoe.reporting.page import render

REASON = missing()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=REASON or ""), pytest.mark.slow]

RIGHT, HOME = "\ue014", "\ue011"
COLOURS = """return [...document.querySelectorAll('.of-model:not([hidden]) .passage:not([hidden]) .text > span')]
    .map(span => getComputedStyle(span).backgroundColor).join()"""
DRAWN = "return [...document.querySelectorAll('.map svg, .bars svg, .text, .experts, .top')].map(e => e.innerHTML)"
CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
function rgb(colour) {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
}
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
function behind(node) {
    for (; node; node = node.parentElement) {
        const found = rgb(getComputedStyle(node).backgroundColor);
        if (found[3] === 255) return found;
    }
    return [255, 255, 255];
}
const poor = new Set();
for (const node of document.querySelectorAll('body *')) {
    const texts = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!texts || !node.checkVisibility() || node.closest('script, style, :disabled')) continue;
    const style = getComputedStyle(node);
    const pair = [light(rgb(node.closest('svg') ? style.fill : style.color)), light(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) poor.add(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
}
return [...poor];
"""
WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(report(SMOLLM)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for screenshots: LLAMAMOE_SHOTS, if it is set."""
    named = os.environ.get("LLAMAMOE_SHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(session: Browser, page: Path) -> Browser:
    """The page freshly opened on a desktop."""
    session.look(1280)
    session.open(page)
    return session


def test_opens_in_silence_and_fetches_nothing(browser: Browser, page: Path) -> None:
    browser.requests()
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run("return window.broken === undefined")


def test_scripts_draw_what_stood_there_without_them(browser: Browser, page: Path) -> None:
    """page.js has drawn the first layer again: the same as page_view.py had drawn."""
    parts = """const page = arguments.length ? new DOMParser().parseFromString(arguments[0], 'text/html') : document;
        const told = (selector, tell) => [...page.querySelectorAll(selector)].map(tell).join('\\n');
        return [told('.map path, .bars path', e => e.getAttribute('class') + e.getAttribute('d')),
                told('.text > span', e => e.className + e.style.getPropertyValue('--e').trim() + e.textContent),
                told('.experts', e => e.innerHTML), told('.top > li', e => e.innerHTML), told('.busiest', e => e.innerText),
                told('.uniform', e => e.style.bottom)]"""
    static = browser.run(parts, page.read_text(encoding="utf-8"))
    assert len(static[1]) > 10_000
    for drawn, stood in zip(browser.run(parts), static, strict=True):
        assert drawn == stood


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_looks(browser: Browser, shots: Path, width: int, dark: bool) -> None:
    browser.look(width, dark)
    assert browser.run(WIDER) == 0
    assert browser.run(CONTRAST) == []
    path = shots / f"report-{width}-{'dark' if dark else 'light'}.png"
    browser.shoot(path)
    assert path.stat().st_size > 100_000
    assert browser.complaints() == []


def test_layer_picker_changes_every_view(browser: Browser) -> None:
    before, colours = browser.run(DRAWN), browser.run(COLOURS)
    browser.run("document.querySelector('[data-step=\"1\"]').click()")
    after = browser.run(DRAWN)
    assert browser.run("return document.querySelector('#pickers output').textContent") == "16"
    assert browser.run(COLOURS) != colours
    # the map layer x expert shows all layers already; the list, the bars, the other map and the passages follow
    same = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a == b]
    maps = browser.run("return [...document.querySelectorAll('.map svg, .bars svg, .text, .experts, .top')]"
                       ".map((e, i) => e.closest('[data-map=load]') ? i : -1).filter(i => i >= 0)")  # fmt: skip
    assert same == maps
    browser.run("document.querySelector('[data-step=\"-1\"]').click()")
    assert browser.run(DRAWN) == before


def test_layer_picker_by_keyboard(browser: Browser) -> None:
    colours = browser.run(COLOURS)
    browser.run("document.getElementById('layer').focus()")
    browser.press(RIGHT)
    assert browser.run("return document.getElementById('layer').getAttribute('aria-valuetext')") == "layer 16"
    assert browser.run(COLOURS) != colours
    browser.press(HOME)
    assert browser.run("return document.querySelector('[data-step=\"-1\"]').disabled") is True
    assert browser.run("return document.querySelector('#pickers output').textContent") == "1"
    assert browser.complaints() == []


def test_token_says_its_expert(browser: Browser) -> None:
    browser.run("document.querySelector('.passage:not([hidden]) .text').focus()")
    browser.press(RIGHT, RIGHT)
    said = browser.run("return document.querySelector('.passage:not([hidden]) .readout').textContent")
    assert re.fullmatch(r"“ router”: expert \d+ first, as for \d+ of 250 tokens here\.", said)
    assert browser.run("return document.querySelectorAll('.passage:not([hidden]) .same').length") >= 1


def test_text_and_model_pickers(browser: Browser) -> None:
    visible = (
        "return [...document.querySelectorAll('.passage')].filter(e => e.checkVisibility()).map(e => e.dataset.passage)"
    )
    assert browser.run(visible) == ["0"]
    browser.run("""const picker = document.getElementById('domain');
        picker.value = '3'; picker.dispatchEvent(new Event('change'))""")
    assert browser.run(visible) == ["3"]
    browser.run("document.querySelectorAll('input[name=model]')[1].click()")
    shown = "return [...document.querySelectorAll('#routing .of-model')].filter(e => e.checkVisibility()).map(e => e.dataset.model)"
    assert browser.run(shown) == ["1"]


def test_copies_a_command(browser: Browser) -> None:
    browser.run("document.querySelector('.copy').click()")
    assert browser.run("return document.querySelector('.copy').checkVisibility()")
    assert browser.complaints() == []


def test_paper_shows_everything_in_light(browser: Browser, shots: Path) -> None:
    browser.look(800, dark=True, media="print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return document.getElementById('pickers').checkVisibility()") is False
    assert browser.run("return [...document.querySelectorAll('.of-model, .passage')].every(e => e.checkVisibility())")
    assert browser.run(WIDER) == 0
    browser.shoot(shots / "report-print.png")


def test_without_scripts(page: Path, shots: Path) -> None:
    with chromium(scripts=False) as browser:
        browser.look(1280)
        browser.open(page)
        browser.shoot(shots / "report-no-script.png")
        assert browser.complaints() == []
