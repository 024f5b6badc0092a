"""The report opened from the disk in a real browser, on a desk and on a telephone, in the light and in the dark."""

from pathlib import Path

import pytest

from raydistill.report import write_report
from tests.browser import Browser, chromium

# Elements that a reader would have to scroll the whole page for; a box of its own may scroll.
_TOO_WIDE = """
[...document.querySelectorAll("body *")].filter(each =>
    each.getBoundingClientRect().right > innerWidth + 0.5 && !each.closest(".wide"))
.map(each => each.outerHTML.slice(0, 200))
"""
_UNLOADED = "[...document.images].filter(each => !(each.complete && each.naturalWidth > 0)).length"
_SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("svg.chart text")].map(each =>
    parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getBoundingClientRect().width
    / each.ownerSVGElement.viewBox.baseVal.width))
"""
_LUMINANCES = """
(() => {
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(value => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const style = getComputedStyle(document.body);
  return [luminance(style.color), luminance(style.backgroundColor)];
})()
"""


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    chromium()  # before the runs are made for nothing
    return write_report(folders, tmp_path_factory.mktemp("page") / "report.html", "four runs")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_missing_complained_of_or_cut_off(page: Path, width: int, dark: bool) -> None:
    with Browser() as browser:
        browser.open(page, width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
        assert browser.evaluate("document.images.length") == 6 + 4 * 4
        assert browser.evaluate(_UNLOADED) == 0
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate(_TOO_WIDE) == []
        assert browser.evaluate("document.querySelectorAll('svg.chart').length") >= 6 + 1 + 3
        assert browser.evaluate(_SMALLEST_TEXT) >= 10
        ink, back = browser.evaluate(_LUMINANCES)
        assert (ink / back if dark else back / ink) > 7


def test_a_page_that_is_too_wide_or_lacks_a_picture_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<!DOCTYPE html><body style="margin:0"><div style="width:900px">wide</div><img src="none.png">'
        '<script>console.error("no")</script>'
    )
    with Browser() as browser:
        browser.open(broken, 640)
        assert browser.evaluate(_UNLOADED) == 1
        assert browser.evaluate("document.documentElement.scrollWidth") == 900
        assert len(browser.evaluate(_TOO_WIDE)) == 1
        assert any("console.error" in complaint for complaint in browser.complaints)
