"""The site, built with warnings as errors and opened in Chromium without a network."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from kmex_utils import paths
from kmex_utils.paper.batch import to_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(out / "doctrees")]
    built = subprocess.run([*command, str(paths.ROOT / "docs"), str(out / "html")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out / "html"


class Page(HTMLParser):
    """The addresses a page names, and the places in it that an address can name."""

    def __init__(self, text):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.places.add(attributes.get("id"))


@pytest.mark.slow
def test_no_link_is_dead_and_nothing_comes_from_elsewhere(site):
    pages = {file: Page(file.read_text()) for file in site.rglob("*.html") if "_static" not in file.parts}
    assert len(pages) > 80  # pages, notebooks, and the package's files
    dead, linked = [], 0
    for file, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or link.startswith("//"):
                assert to.scheme in ("https", "http", "mailto", "data"), link
                continue
            target = (file.parent / unquote(to.path)).resolve() if to.path else file
            known = target in pages and unquote(to.fragment) in pages[target].places
            if not (known or (target.exists() and target not in pages)):
                dead.append(f"{file.relative_to(site)}: {link}")
            linked += 1
    assert not dead
    assert linked > 1000


@pytest.mark.slow
def test_every_notebook_and_page_is_there(site):
    for notebook in (paths.ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{notebook.stem}.html").exists()
    start = (site / "index.html").read_text()
    for page in (paths.ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        if not page.stem.startswith("report"):
            assert f"{page.stem}.html" in start or page.stem == "index"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_it_reads_without_a_network(site):
    """In the light on a desk, and in the dark on a telephone."""
    from playwright.sync_api import sync_playwright

    pages = [*sorted(site.glob("*.html")), *sorted((site / "notebooks").glob("*.html"))]
    pages = [page for page in pages if page.stem not in ("genindex", "search", "py-modindex")]
    formulas = images = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for file in pages:
            page, asked = browser.new_page(), []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            page.wait_for_function("!window.MathJax || (MathJax.startup && MathJax.startup.document)")
            page.evaluate("window.MathJax && MathJax.startup.promise")
            for width, scheme in ((1280, "light"), (390, "dark")):
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": width, "height": 900})
                written, drawn, wrong = page.evaluate(
                    "['.math', '.math mjx-container', 'mjx-merror'].map(s => document.querySelectorAll(s).length)"
                )
                assert drawn >= written and not wrong, file.name
                broken = (
                    "[...document.images].filter(i => !i.loading.includes('lazy') && !i.naturalWidth).map(i => i.src)"
                )
                assert page.evaluate(broken) == [], file.name
                assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name
            assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), file.name
            formulas, images = formulas + drawn, images + page.evaluate("document.images.length")
            page.close()
        browser.close()
    assert formulas > 100 and images > 15


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_notebook_as_a_page_of_its_own_needs_no_network(tmp_path):
    from playwright.sync_api import sync_playwright

    source = paths.ROOT / "notebooks" / "04_encoder.ipynb"
    subprocess.run([*to_html(), str(source), "--output-dir", str(tmp_path)], check=True, capture_output=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "04_encoder.html").as_uri())
        page.wait_for_selector("mjx-container")
        assert page.locator("mjx-container").count() >= source.read_text().count("$$") // 2 > 0
        assert page.locator("mjx-merror").count() == 0
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_search_finds_a_page(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((site / "search.html").as_uri() + "?q=composite")
        page.wait_for_selector("#search-results li a")
        found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.getAttribute('href'))")
        assert any("method.html" in link for link in found)
        browser.close()
