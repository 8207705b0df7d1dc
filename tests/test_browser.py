"""Notebook 12 in a real JupyterLab in a real Chromium: run all, move every control, click a segment, compare.

The same explorer as a page of its own, opened from disk.
"""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import numpy as np
import papermill
import pytest
import torch
from conftest import NOTEBOOKS
from PIL import Image
from safetensors.torch import save_file

import kmex_utils as kmex
from kmex_utils import paths
from kmex_utils.drawing import diverging
from kmex_utils.explanation.explorer import patches
from kmex_utils.explanation.explorer import view as view_of

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GIVEN = {"model": "resnet18", "image_size": 96, "prototypes_per_class": 3, "restarts": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Real photographs, cut into pieces of two classes, and a seeded network for them."""
    from sklearn.datasets import load_sample_images

    where = tmp_path_factory.mktemp("lab")
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (where / "photos" / name).mkdir(parents=True)
        for i, corner in enumerate(np.ndindex(3, 4)):
            top, left = 140 * corner[0], 160 * corner[1]
            Image.fromarray(photo[top : top + 140, left : left + 160]).save(where / "photos" / name / f"{i:02d}.png")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    save_file(resnet18(num_classes=2).state_dict(), where / "weights.safetensors")
    (where / "classes.txt").write_text("flower\ntemple\n")
    return where


@pytest.fixture(scope="module")
def notebook(material):
    """Notebook 12 with its parameters set, not yet run."""
    given = GIVEN | {name: str(material / file) for name, file in PATHS.items()}
    source = NOTEBOOKS / "12_your_own_model.ipynb"
    papermill.execute_notebook(str(source), str(material / "own.ipynb"), given, prepare_only=True, progress_bar=False)
    return "own.ipynb"


PATHS = {"weights": "weights.safetensors", "classes": "classes.txt", "folder": "photos", "out": "out"}


@pytest.fixture(scope="module")
def explained(material):
    """The same in this process: what the functions return."""
    torch.set_num_threads(1)
    weights, classes = material / "weights.safetensors", material / "classes.txt"
    network = kmex.network("resnet18", weights, classes=classes, image_size=96)
    return kmex.explain(network, material / "photos", prototypes_per_class=3, restarts=1, device="cpu")


@pytest.fixture(scope="module")
def lab(material):
    """Address of a JupyterLab serving the notebook's folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(material / "c")}
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=", "--no-browser", "--allow-root"]
    options += [f"--ServerApp.root_dir={material}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class="]
    with open(material / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options[:-1]], env=environment, stdout=log, stderr=log, cwd=material
        )
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                    break
                except OSError:
                    assert server.poll() is None, (material / "lab.log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree/"
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="module")
def page(lab, notebook, browser):
    """The notebook, run all, scrolled to the explorer."""
    page = browser.new_page(viewport={"width": 1500, "height": 1300})
    page.set_default_timeout(120_000)
    page.goto(lab + notebook)
    page.get_by_text("| Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    scroll_to(page, ".kmex-explorer")
    return page


def scroll_to(page, selector, seconds=240):
    """JupyterLab keeps cells out of sight out of the page, so turn the wheel until the thing is there."""
    page.mouse.move(850, 500)
    end, step = time.time() + seconds, 500
    while time.time() < end:
        page.mouse.wheel(0, step)
        page.wait_for_timeout(300)
        seen = page.evaluate(
            """(selector) => { const box = document.querySelector(selector)?.getBoundingClientRect();
            const outer = document.querySelector('.jp-WindowedPanel-outer');
            const below = outer.scrollHeight - outer.clientHeight - outer.scrollTop;
            return [box ? box.height : 0, below < 2, outer.scrollTop <= 0]; }""",
            selector,
        )
        if seen[0] > 100:
            page.evaluate("(selector) => document.querySelector(selector).scrollIntoView({block: 'center'})", selector)
            page.wait_for_timeout(1500)
            return
        step = -abs(step) if seen[1] else abs(step) if seen[2] else step
    errors = page.locator(".jp-OutputArea-output[data-mime-type*=error]").all_inner_texts()
    raise AssertionError(f"no {selector} on the page; errors: {errors}")


def opaque(page, percent=100):
    """How much of the image the map covers."""
    page.locator(".kmex-bar input[type=range]").fill(str(percent))


def shown(page, rows=1, box=(0, 0, 1, 1)):
    """What stands on the page: colours at the centres of the cells of both canvases, and the words."""
    return page.evaluate(
        """([rows, box]) => {
        const root = document.querySelector('.kmex-explorer');
        const image = (name) => {
          const canvas = root.querySelector('.kmex-' + name);
          const context = canvas.getContext('2d');
          const centre = (i, size, from, to) => Math.floor(size * (from + ((i + 0.5) / rows) * (to - from)));
          const at = (x, y) => context.getImageData(
            centre(x, canvas.width, box[0], box[2]), centre(y, canvas.height, box[1], box[3]), 1, 1).data;
          return [...Array(rows).keys()].map((y) => [...Array(rows).keys()].map((x) => [...at(x, y)].slice(0, 3)));
        };
        return {
          ...root.dataset,
          heading: root.querySelector('.kmex-heading').textContent,
          map: image('map'),
          attribution: image('attribution'),
          buttons: [...root.querySelectorAll('.kmex-button')].map((b) => b.textContent),
          strip: [...root.querySelectorAll('.kmex-button img')].map((i) => i.src),
          detail: root.querySelector('.kmex-detail').textContent,
          prototype: root.querySelector('.kmex-detail').dataset.prototype,
          patches: [...root.querySelectorAll('.kmex-detail img')].map((i) => i.src),
        };
      }""",
        [rows, box],
    )


def agrees(page, view):
    """Wait for the page to show a view, then compare everything."""
    page.mouse.move(2, 2)
    page.locator(f'.kmex-explorer[data-name="{view["name"]}"][data-explainer="{view["explainer"]}"]').wait_for()
    opaque(page)
    page.wait_for_timeout(300)
    seen = shown(page, len(view["map"]), view["box"])
    colours = np.array([p["colour"] for p in view["prototypes"]])
    assert np.array_equal(np.array(seen["map"]), colours[np.array(view["map"])])
    centre, half = (view["high"] + view["low"]) / 2, (view["high"] - view["low"]) / 2
    expected = 255 * diverging(np.array(view["attribution"]), centre, half)
    np.testing.assert_allclose(seen["attribution"], expected, atol=6)  # the neighbour in a ramp of 256
    assert seen["strip"] == [p["patch"] for p in view["prototypes"]]
    words = [f"{i}: {p['class']} · " for i, p in enumerate(view["prototypes"], 1)]
    assert all(said.startswith(expected) for said, expected in zip(seen["buttons"], words, strict=True))
    assert seen["target"] == view["target"] and view["predicted"] in seen["heading"]
    return seen


def cell_of(page, panel, view, row, column):
    """Where a cell lies on a panel, in its pixels."""
    frame = page.locator(f".kmex-{panel}").bounding_box()
    left, top, right, bottom = view["box"]
    x = left + (column + 0.5) / len(view["map"][0]) * (right - left)
    y = top + (row + 0.5) / len(view["map"]) * (bottom - top)
    return {"x": x * frame["width"], "y": y * frame["height"]}


def test_it_runs_and_shows_what_the_functions_return(page, explained):
    agrees(page, view_of(explained, 0, 2))
    assert page.locator("[id^=kmex-still]").count() == 0, "the still view stays beside the running widget"


def test_every_control(page, explained):
    name = explained.names[5]
    page.locator(".kmex-images").select_option(label=name)
    agrees(page, view_of(explained, name, 2))
    for b in (4, 3, 2):
        page.get_by_role("button", name=f"explainer {explained.name(b)}", exact=True).click()
        agrees(page, view_of(explained, name, b))
    for target in explained.network.classes:
        page.get_by_label("attribution to", exact=True).select_option(label=target)
        page.locator(f'.kmex-explorer[data-target="{target}"]').wait_for()
        agrees(page, view_of(explained, name, 2, target))
    page.get_by_label("attribution to", exact=True).select_option(label="flower")
    page.get_by_label("minus that to", exact=True).select_option(label="temple")
    page.locator('.kmex-explorer[data-target="flower − temple"]').wait_for()
    agrees(page, view_of(explained, name, 2, ("flower", "temple")))
    page.get_by_label("minus that to", exact=True).select_option(label="nothing")
    page.get_by_label("attribution to", exact=True).select_option(label="predicted")
    view = view_of(explained, name, 2)
    page.locator(f'.kmex-explorer[data-target="{view["target"]}"]').wait_for()
    agrees(page, view)


@pytest.mark.parametrize("panel", ["image", "map", "attribution"])
def test_hover_and_click_a_segment(page, explained, panel):
    name = explained.names[5]
    view = view_of(explained, name, 2)
    canvas, rows = page.locator(f".kmex-{panel}"), len(view["map"])
    row, column = rows // 2, rows // 3
    at = cell_of(page, panel, view, row, column)
    expected = view["prototypes"][view["map"][row][column]]

    detail = page.locator(f'.kmex-detail[data-prototype="{expected["prototype"]}"]')
    for _ in range(5):  # a view that arrives late takes a hover back
        canvas.hover(position=at)
        page.wait_for_timeout(1000)
        if detail.count():
            break
        page.mouse.move(2, 2)
    seen = shown(page)
    assert f"prototype {expected['prototype']} of {expected['class']}" in seen["detail"]
    assert f"in {expected['shared']} of the class's {expected['images']} images" in seen["detail"]
    assert seen["patches"] == [expected["patch"]]
    maps = explained.maps[2, "train"]
    of_class = explained.dataset.train.labels == explained.classes.index(expected["class"])
    assert expected["shared"] == int((maps[of_class] == expected["prototype"]).any(2).any(1).sum())

    canvas.click(position=at)
    urls = [patch["url"] for patch in patches(explained, 2, expected["prototype"])]
    page.wait_for_function(f"document.querySelectorAll('.kmex-detail img').length == {len(urls)}")
    page.mouse.move(2, 2)
    page.wait_for_timeout(100)
    assert shown(page)["patches"] == urls, "a click keeps the segment after the mouse has gone"
    canvas.click(position=at)
    page.mouse.move(2, 2)
    page.locator(".kmex-hint").wait_for()


def test_arrow_keys_and_thumbnails(page, explained):
    page.locator(".kmex-explorer").focus()
    page.keyboard.press("ArrowRight")
    agrees(page, view_of(explained, explained.names[6], 2))
    page.locator(".kmex-explorer").focus()
    page.keyboard.press("ArrowLeft")
    agrees(page, view_of(explained, explained.names[5], 2))
    page.locator('.kmex-thumbnail[data-image="2"]').click()
    agrees(page, view_of(explained, explained.names[2], 2))
    page.wait_for_function("document.querySelectorAll('.kmex-thumbnail img').length > 20")


def test_no_cell_failed(page):
    assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0


def test_a_change_of_explainer_reaches_the_page(page, explained):
    """From the click on a start block to its map; the time is printed, not judged."""
    for b in (4, 2):
        start = time.perf_counter()
        page.get_by_role("button", name=f"explainer {explained.name(b)}", exact=True).click()
        page.locator(f'.kmex-explorer[data-explainer="{explained.name(b)}"]').wait_for()
        print(f"change to {explained.name(b)}: {time.perf_counter() - start:.3f} s")


def test_a_saved_notebook_shows_the_still_view(page, lab, notebook, browser, material):
    """Opened again where no kernel holds the widget: the still view, and no error beside it."""
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.locator('.lm-Menu-item[data-command="docmanager:save"]').click()
    for _ in range(60):
        saved = (material / notebook).read_text()
        if "kmex-still-" in saved and "widget-view" in saved:
            break
        page.wait_for_timeout(500)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator('.lm-Menu-item[data-command="kernelmenu:shutdown"]').click()
    for _ in range(60):
        if not json.load(urllib.request.urlopen(lab.replace("/lab/tree/", "/api/kernels"))):
            break
        page.wait_for_timeout(500)
    page.close()
    again = browser.new_page(viewport={"width": 1500, "height": 1300})
    again.goto(lab + notebook)
    again.get_by_text("| Idle").wait_for(timeout=120_000)
    scroll_to(again, "[id^=kmex-still] img")
    again.wait_for_timeout(3000)
    visible = again.evaluate("document.querySelector('[id^=kmex-still]').closest('.jp-Cell').innerText")
    again.screenshot(path=material / "again.png")
    assert "still view: the explorer runs where" in visible
    assert "Error displaying widget" not in visible and "Loading widget" not in visible
    again.close()


# --- the page -------------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=document.body.dataset.evil=1></script>"


@pytest.fixture(scope="module")
def evil(explained):
    """The explanation with a class and a prototype whose names are markup."""
    of = copy.copy(explained)
    of.classes = (EVIL, "temple")
    of.dataset = replace(explained.dataset, classes=of.classes)
    explained.edits.rename(2, 5, EVIL)
    yield of
    explained.edits.undo()


@pytest.fixture(scope="module")
def alone(browser, evil, material):
    """The explorer of all 24 images as a page, opened from disk, with what it asked for and its errors."""
    path = evil.page(material / "page.html", range(24), title=EVIL)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".kmex-button img").first.wait_for()
    yield page
    page.close()


def start(page, image=0, explainer="B234"):
    """The page at an image, nothing kept, nothing filtered."""
    page.get_by_label("show", exact=True).select_option("all")
    page.get_by_label("class", exact=True).select_option("")
    page.get_by_role("button", name=f"explainer {explainer}", exact=True).click()
    page.locator(f'.kmex-thumbnail[data-image="{image}"]').click()
    page.mouse.move(2, 2)
    page.locator(".kmex-hint").wait_for()


def test_the_page_shows_the_views(alone, evil):
    """Words and maps; patches are encoded more finely than in the notebook."""
    for image, b in ((0, 2), (4, 4), (5, 3)):
        start(alone, image, evil.name(b))
        opaque(alone)
        view = view_of(evil, image, b)
        seen = shown(alone, len(view["map"]), view["box"])
        colours = np.array([p["colour"] for p in view["prototypes"]])
        assert np.array_equal(np.array(seen["map"]), colours[np.array(view["map"])])
        centre, half = (view["high"] + view["low"]) / 2, (view["high"] - view["low"]) / 2
        expected = 255 * diverging(np.array(view["attribution"]), centre, half)
        np.testing.assert_allclose(seen["attribution"], expected, atol=6)
        assert f"network: {view['predicted']} · {view['explainer']}: {view['explainer_predicted']}" in seen["heading"]


def test_names_stay_text(alone, evil):
    assert alone.evaluate("document.body.dataset.evil") is None and alone.locator("img[src=x]").count() == 0
    assert alone.locator("h1").inner_text() == EVIL
    assert alone.get_by_label("class", exact=True).locator("option").all_inner_texts() == ["all", EVIL, "temple"]
    start(alone)
    of_class = [p for p in view_of(evil, 0, 2)["prototypes"] if p["class"] == EVIL or p["name"]]
    assert of_class
    for p in of_class:
        alone.locator(f'.kmex-button[title^="prototype {p["prototype"]} of"]').hover()
        said = alone.locator(".kmex-title").inner_text()
        assert said.endswith(f"prototype {p['prototype']} of {p['class']}{', ' if p['name'] else ''}{p['name']}")
    assert alone.evaluate("document.body.dataset.evil") is None and alone.locator("img[src=x]").count() == 0


def test_hover_and_click_on_the_page(alone, evil):
    start(alone, 3)
    view = view_of(evil, 3, 2)
    row, column = 1, len(view["map"]) - 2
    expected = view["prototypes"][view["map"][row][column]]
    at = cell_of(alone, "map", view, row, column)
    alone.locator(".kmex-map").hover(position=at)
    detail = alone.locator(".kmex-detail").inner_text()
    assert f"in {expected['shared']} of the class's {expected['images']} images" in detail
    assert f"{round(100 * expected['share'])}\u00a0% of this image" in detail
    assert f"attribution {view['attribution'][row][column]:g} to {view['target']}" in detail
    points = [f"{abs(n):#.3g}".rstrip(".") for n in (expected["contribution"], view["total"])]
    assert all(number in detail for number in points)
    alone.locator(".kmex-map").click(position=at)
    words = alone.locator(".kmex-detail figcaption").all_inner_texts()
    assert words == ["nearest", "2", "3", "4", "5", "typical", "weakest"]
    alone.mouse.move(2, 2)
    assert alone.locator(f'.kmex-detail[data-prototype="{expected["prototype"]}"] img').count() == 7, "kept"
    alone.keyboard.press("Escape")
    alone.locator(".kmex-hint").wait_for()


def test_zoomed_the_cell_under_the_pointer_is_the_one_told(alone, evil):
    start(alone, 3)
    alone.locator(".kmex-explorer").focus()
    alone.keyboard.press("+")
    alone.keyboard.press("+")
    assert alone.get_by_label("zoom", exact=True).input_value() == "4"
    view, frame = view_of(evil, 3, 2), alone.locator(".kmex-frame").nth(1).bounding_box()
    for row, column in ((0, 0), (9, 3), (2, 11)):
        at = cell_of(alone, "map", view, row, column)  # in pixels of the zoomed canvas
        x, y = at["x"] / 4 / frame["width"], at["y"] / 4 / frame["height"]
        alone.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
        scaled = alone.locator(".kmex-map").bounding_box()
        seen = (frame["x"] + x * frame["width"] - scaled["x"]) / scaled["width"]
        assert scaled["width"] == pytest.approx(4 * frame["width"]) and seen == pytest.approx(x, abs=0.01)
        of = view["prototypes"][view["map"][row][column]]["prototype"]
        assert alone.locator(".kmex-detail").get_attribute("data-prototype") == str(of)
    alone.get_by_label("zoom", exact=True).select_option("1")


def test_keys_and_filters_on_the_page(alone, evil):
    start(alone)
    for key, name in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        alone.keyboard.press(key)
        assert alone.locator(f'.kmex-explorer[data-name="{evil.names[name]}"]').count() == 1
    views = {b: [view_of(evil, i, b) for i in range(24)] for b in (4, 3, 2)}
    said = [{views[b][i]["explainer_predicted"] for b in views} for i in range(24)]
    disagree = [i for i in range(24) if len(said[i]) > 1]
    wrong = [i for i in range(24) if views[4][i]["explainer_predicted"] != views[4][i]["label"]]
    assert 0 < len(disagree) < 24 and 0 < len(wrong) < 24, "else this shows nothing"
    alone.get_by_role("button", name="explainer B4", exact=True).click()
    for choice, expected in (("disagree", disagree), ("explainer", wrong)):
        alone.get_by_label("show", exact=True).select_option(choice)
        there = alone.locator(".kmex-thumbnail").evaluate_all("all => all.map(t => Number(t.dataset.image))")
        assert there == expected
        assert alone.locator(".kmex-explorer").get_attribute("data-name") in [evil.names[i] for i in expected]
        for _ in range(24):
            alone.keyboard.press("ArrowRight")
        assert alone.locator(".kmex-explorer").get_attribute("data-name") == evil.names[expected[-1]]
    alone.get_by_label("show", exact=True).select_option("all")
    alone.get_by_label("class", exact=True).select_option("temple")
    assert alone.locator(".kmex-count").inner_text().endswith("of 12")
    alone.evaluate(
        "document.querySelector('[aria-label=class], select:has(option[value=temple])').add(new Option('x', 'no'))"
    )
    alone.get_by_label("class", exact=True).select_option("no")
    assert alone.locator(".kmex-count").inner_text() == "no image is so"
    assert not alone.locator(".kmex-body").is_visible(), "not the image before, as if it were so"


def test_it_answers_within_a_fifth_of_a_second(alone, evil):
    """From an event to the next frame, in the page itself, on the median of 20 cells; the time is printed, too."""
    start(alone, 3)
    times = alone.evaluate(
        """async () => {
        const frame = document.querySelector('.kmex-map').parentElement, box = frame.getBoundingClientRect();
        const times = {pointermove: [], click: []};
        for (let i = 0; i < 20; i++) for (const kind of Object.keys(times)) {
          const where = {clientX: box.left + box.width * (0.12 + 0.04 * i), clientY: box.top + box.height * 0.5};
          const begin = performance.now();
          frame.dispatchEvent(new PointerEvent(kind, {bubbles: true, ...where}));
          document.querySelector('.kmex-map').getContext('2d').getImageData(0, 0, 1, 1); // what was drawn is there
          await new Promise(requestAnimationFrame);
          times[kind].push(performance.now() - begin);
        }
        return times;
        }"""
    )
    for kind, values in times.items():
        print(f"{kind}: median {np.median(values):.0f} ms, largest {max(values):.0f} ms")
        assert np.median(values) < 200


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(alone, width):
    alone.set_viewport_size({"width": width, "height": 480})
    start(alone, 2)
    assert alone.evaluate("document.documentElement.scrollWidth") <= width
    alone.mouse.wheel(0, 500)
    alone.wait_for_timeout(300)
    assert alone.locator(".kmex-bar").bounding_box()["y"] == pytest.approx(0, abs=1), "controls stay in view"
    alone.mouse.wheel(0, -1000)
    alone.set_viewport_size({"width": 1280, "height": 900})


def test_the_page_loads_nothing_and_fails_nowhere(alone):
    assert [url for url in alone.asked if not url.startswith(("data:", "file:"))] == [] and alone.errors == []
    assert len([url for url in alone.asked if url.startswith("file:")]) == 1
