"""The files a stranger starts from agree with each other."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kmex_utils import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
PINS = {}
for line in (paths.ROOT / "requirements.txt").read_text().splitlines():
    pin = Requirement(line)
    PINS.setdefault(canonicalize_name(pin.name), []).append(pin)


WANTED = {text for extra in PROJECT["optional-dependencies"].values() for text in extra} | {*PROJECT["dependencies"]}


@pytest.mark.parametrize("text", sorted(text for text in WANTED if not text.startswith(PROJECT["name"])))
def test_every_dependency_is_pinned_within_its_range(text):
    wanted = Requirement(text)
    for pin in PINS[canonicalize_name(wanted.name)]:
        (exact,) = pin.specifier
        assert exact.operator == "==" and wanted.specifier.contains(exact.version, prereleases=True)


def test_environment_yml_installs_the_same():
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    python = next(entry.removeprefix("python=") for entry in conda if entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    assert {entry.split("=")[0] for entry in conda} == {"python", "pip", "make"}


def test_pins_name_no_registry():
    text = (paths.ROOT / "requirements.txt").read_text()
    assert "://" not in text and "--" not in text


def test_citation_and_licence():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert citation["version"] == PROJECT["version"]
    assert "2603.28466" in str(citation["references"])


def test_readme_names_what_exists():
    readme = (paths.ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", readme):
        assert (paths.ROOT / path).exists(), path
    for command in ("make reproduce", "make test"):
        assert command in readme
    makefile = (paths.ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", readme):
        assert f"\n{target}:" in makefile, target
