"""Notebook 12 in a real JupyterLab in a real Chromium: run all, move every control, click a segment, compare."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import papermill
import pytest
import torch
from conftest import NOTEBOOKS
from PIL import Image
from safetensors.torch import save_file

import kmex_utils as kmex
from kmex_utils import paths

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
def explorer(material):
    """The same in this process: what the functions return."""
    torch.set_num_threads(1)
    weights, classes = material / "weights.safetensors", material / "classes.txt"
    network = kmex.network("resnet18", weights, classes=classes, image_size=96)
    explained = kmex.explain(network, material / "photos", prototypes_per_class=3, restarts=1, device="cpu")
    return explained.explorer()


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
def page(lab, notebook):
    """The notebook, run all, scrolled to the explorer."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            page = browser.new_page(viewport={"width": 1500, "height": 1300})
            page.set_default_timeout(30_000)
            page.goto(lab + notebook)
            page.get_by_text("| Idle").wait_for(timeout=120_000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            scroll_to_explorer(page)
            yield page
        finally:
            browser.close()


def scroll_to_explorer(page, seconds=240):
    """JupyterLab keeps cells out of sight out of the page, so turn the wheel until the explorer is there."""
    page.mouse.move(850, 500)
    end, step = time.time() + seconds, 500
    while time.time() < end:
        page.mouse.wheel(0, step)
        page.wait_for_timeout(300)
        seen = page.evaluate(
            """() => { const box = document.querySelector('.kmex-explorer')?.getBoundingClientRect();
            const outer = document.querySelector('.jp-WindowedPanel-outer');
            const below = outer.scrollHeight - outer.clientHeight - outer.scrollTop;
            return [box ? box.height : 0, below < 2, outer.scrollTop <= 0]; }"""
        )
        if seen[0] > 100:
            page.evaluate("document.querySelector('.kmex-explorer').scrollIntoView({block: 'center'})")
            page.wait_for_timeout(1500)
            return
        step = -abs(step) if seen[1] else abs(step) if seen[2] else step
    errors = page.locator(".jp-OutputArea-output[data-mime-type*=error]").all_inner_texts()
    raise AssertionError(f"no explorer on the page; errors: {errors}")


def shown(page, rows=1):
    """What stands on the page: colours at the centres of the cells of both canvases, and the words."""
    return page.evaluate(
        """(rows) => {
        const root = document.querySelector('.kmex-explorer');
        const image = (name) => {
          const canvas = root.querySelector('.kmex-' + name);
          const context = canvas.getContext('2d');
          const centre = (i) => Math.floor(((i + 0.5) * canvas.width) / rows);
          return [...Array(rows).keys()].map((y) => [...Array(rows).keys()].map(
            (x) => [...context.getImageData(centre(x), centre(y), 1, 1).data].slice(0, 3)));
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
        rows,
    )


def agrees(page, view):
    """Wait for the page to show a view, then compare everything."""
    page.mouse.move(2, 2)
    page.locator(f'.kmex-explorer[data-name="{view["name"]}"][data-explainer="{view["explainer"]}"]').wait_for()
    page.wait_for_timeout(300)
    seen = shown(page, len(view["map"]))
    colours = np.array([p["colour"] for p in view["prototypes"]])
    assert np.array_equal(np.array(seen["map"]), colours[np.array(view["map"])])
    np.testing.assert_allclose(seen["attribution"], view["attribution_colours"], atol=2)
    assert seen["strip"] == [p["patch"] for p in view["prototypes"]]
    assert [b.split(" · ")[0] for b in seen["buttons"]] == [p["class"] for p in view["prototypes"]]
    assert seen["target"] == view["target"] and view["predicted"] in seen["heading"]
    return seen


def test_it_runs_and_shows_what_the_functions_return(page, explorer):
    view = explorer.view(0, 2)
    agrees(page, view)
    assert page.locator("[id^=kmex-still]").count() == 0, "the still view stays beside the running widget"


def test_every_control(page, explorer):
    name = explorer.explained.names[5]
    page.locator(".kmex-explorer").page.get_by_label("image").select_option(label=name)
    agrees(page, explorer.view(name, 2))
    for b in (4, 3, 2):
        page.get_by_role("button", name=explorer.explained.name(b), exact=True).click()
        agrees(page, explorer.view(name, b))
    for target in explorer.explained.network.classes:
        page.get_by_label("attribution to").select_option(label=target)
        page.locator(f'.kmex-explorer[data-target="{target}"]').wait_for()
        agrees(page, explorer.view(name, 2, target))
    page.get_by_label("attribution to").select_option(label="predicted")
    view = explorer.view(name, 2)
    page.locator(f'.kmex-explorer[data-target="{view["target"]}"]').wait_for()
    agrees(page, view)


@pytest.mark.parametrize("panel", ["image", "map", "attribution"])
def test_hover_and_click_a_segment(page, explorer, panel):
    explained = explorer.explained
    name = explained.names[5]
    view = explorer.view(name, 2)
    canvas = page.locator(f".kmex-{panel}")
    box = canvas.bounding_box()
    rows = len(view["map"])
    row, column = rows // 2, rows // 3
    at = {"x": (column + 0.5) * box["width"] / rows, "y": (row + 0.5) * box["height"] / rows}
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
    nearest = explorer.patches(2, expected["prototype"])
    page.wait_for_function(f"document.querySelectorAll('.kmex-detail img').length == {len(nearest)}")
    page.mouse.move(2, 2)
    page.wait_for_timeout(100)
    assert shown(page)["patches"] == nearest, "a click keeps the segment after the mouse has gone"
    canvas.click(position=at)
    page.mouse.move(2, 2)
    page.locator(".kmex-hint").wait_for()


def test_no_cell_failed(page):
    assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0


def test_a_change_of_explainer_reaches_the_page(page, explorer):
    """From the click on a start block to its map; the time is printed, not judged."""
    for b in (4, 2):
        start = time.perf_counter()
        page.get_by_role("button", name=explorer.explained.name(b), exact=True).click()
        page.locator(f'.kmex-explorer[data-explainer="{explorer.explained.name(b)}"]').wait_for()
        print(f"change to {explorer.explained.name(b)}: {time.perf_counter() - start:.3f} s")
