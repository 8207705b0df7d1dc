"""The wheel alone, beside what it asks for and nothing else of this environment; nothing is installed."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kmex_utils import paths

BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"

STRANGER = """
import sys
from pathlib import Path

import numpy as np
from PIL import Image

generator = np.random.default_rng(0)
for name, colour in (("temple", (200, 120, 30)), ("flower", (120, 30, 200))):
    Path("photos", name).mkdir(parents=True)
    for i in range(5):
        pixels = generator.normal(colour, 40, (70, 80, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(f"photos/{name}/{i}.png")

import kmex_utils as kmex

assert Path(kmex.__file__).is_relative_to(sys.path[0]), kmex.__file__
network = kmex.network("resnet18", weights="random", image_size=64)
explained = kmex.explain(network, "photos", prototypes_per_class=2, restarts=1, device="cpu")
explained.panel("photos/temple/0.png").savefig("panel.png")
explained.report("report.html", ["temple/0.png"])
explained.export("export", device="cpu")
explained.save("saved")
again = kmex.load("saved")
Image.fromarray(generator.integers(0, 255, (50, 60, 3), np.uint8)).save("new.png")
again.panel("new.png").savefig("new-panel.png")

from kmex_utils.cli import main

assert main(["show", "saved", "new.png"]) == 0
assert main(["batch", "config/quick.yaml"]) == 2
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the sdist, built from the sources alone."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(paths.ROOT / "kmex_utils", folder / "sources" / "kmex_utils", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.ROOT / name, folder / "sources")

    def build(kind, sources):
        command = [sys.executable, "-c", BUILD.format(kind, str(folder))]
        done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.split()[-1]

    archive = build("sdist", folder / "sources")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    return build("wheel", archive.with_name(archive.name.removesuffix(".tar.gz")))


def needed(names):
    """What distributions need in turn, as they are installed here."""
    names = {canonicalize_name(name) for name in names}
    requires = {canonicalize_name(need.name) for name in names for need in requirements(metadata.requires(name))}
    return names if requires <= names else needed(names | requires)


def requirements(lines):
    """Those of this machine without any extra."""
    parsed = [Requirement(line) for line in lines or ()]
    return [need for need in parsed if not need.marker or need.marker.evaluate({"extra": ""})]


@pytest.mark.slow
def test_the_wheel_explains_a_folder_with_its_own_dependencies_alone(built, tmp_path):
    site, dependencies = tmp_path / "site", tmp_path / "dependencies"
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(site)
        files = wheel.namelist()
    for data in ("kmex.mplstyle", "explanation/report.html", "explanation/explorer.js", "paper/report.md.j2"):
        assert f"kmex_utils/{data}" in files
    assert not [file for file in files if not file.startswith("kmex_utils")]
    (own,) = metadata.distributions(path=[str(site)])
    names = needed(need.name for need in requirements(own.requires))
    assert not names & {"scikit-learn", "snakemake", "ipywidgets", "captum", "timm", "tabulate"}
    dependencies.mkdir()
    for distribution in map(metadata.distribution, names):
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (dependencies / name).exists():
                (dependencies / name).symlink_to(distribution.locate_file(name))
    start = f"import sys; sys.path[:1] = {[str(site), str(dependencies)]!r}\n"
    command = [sys.executable, "-S", "-c", start + STRANGER]  # -S: nothing of the environment but these
    environment = {"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the notebooks, their workflow and the digits belong to")
    for product in ("panel.png", "report.html", "export/images.parquet", "new-panel.png", "saved/panel-new.png"):
        assert (tmp_path / product).stat().st_size > 1000, product
