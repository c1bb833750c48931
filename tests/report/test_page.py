"""The page in a real browser."""

import shutil

import pytest

from brfx.report.write import read, write_page

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
playwright = pytest.importorskip("playwright.sync_api", reason="opening the page needs playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("opening the page needs chromium, which is not on the PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(finished, measured_once, tmp_path_factory):
    """Of one run, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(finished, folder / "a run with a name that is quite long, much longer than a small screen is wide")
    write_page(read([measured_once]), folder / "one.html")
    write_page(read([finished, next(path for path in folder.iterdir() if path.is_dir())]), folder / "two.html")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_a_page_says_no_error_and_overflows_nowhere(browser, pages, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((pages / name).as_uri())
    for summary in page.query_selector_all("details"):
        summary.evaluate("details => details.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [(pages / name).as_uri()]
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (_luminance(background) < _luminance(ink)) == (scheme == "dark")
    lines = page.evaluate("[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)")
    assert lines and ink in lines  # figures follow the page
    page.close()


def test_on_paper_all_is_light_and_nothing_is_folded_away(browser, pages):
    page = browser.new_page(viewport={"width": 700, "height": 1000}, color_scheme="dark")  # A4 between its margins
    page.goto((pages / "two.html").as_uri())
    is_seen = "document.querySelector('details.run section').checkVisibility()"
    assert not page.evaluate(is_seen)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    assert _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 200
    assert page.evaluate(is_seen)
    page.close()


def _luminance(colour):
    red, green, blue = (float(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
