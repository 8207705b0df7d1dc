"""The rooms of the package: imports run one way, and the core's imports bring the core's dependencies, late."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import kmex_utils

PACKAGE = Path(kmex_utils.__file__).parent
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in sorted(PACKAGE.rglob("*.py"))}
GROUND = {"paths", "store", "hardware", "parameters", "drawing"}
CORE = GROUND | {"data", "method", "networks"}
ROOMS = {  # what each may import beside itself
    **dict.fromkeys(GROUND, GROUND),
    "data": GROUND,
    "method": GROUND,
    "networks": GROUND | {"data", "method"},
    "training": CORE,
    "explanation": CORE,
    "evaluation": CORE | {"explanation"},
    "paper": CORE | {"training", "explanation", "evaluation"},
    "cli": CORE | {"explanation", "evaluation", "paper"},
    "__init__": {"networks", "explanation"},
    "__main__": {"cli"},
}
EXTRAS = {"anywidget", "captum", "faiss", "ipywidgets", "papermill", "psutil", "scipy", "seaborn"}
EXTRAS |= {"skimage", "sklearn", "snakemake", "tabulate", "timm", "umap", "yaml"}
WHEN_USED = {"jinja2", "matplotlib", "pandas", "pyarrow"}


def of_the_package(module, nodes):
    """The names inside the package that import statements among ``nodes`` of a module name, as tuples."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if node.level or full[0] == "kmex_utils":
                yield from ((*full[not node.level :], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (tuple(alias.name.split(".")) for alias in node.names)
            yield from (name[1:] for name in names if name[0] == "kmex_utils")


def test_every_module_is_in_a_room():
    assert {module[0] for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_one_way(room):
    """Those inside functions and those for type checkers alone, too."""
    for module in (module for module in MODULES if module[0] == room):
        reached = {name[0] for name in of_the_package(module, ast.walk(ast.parse(MODULES[module].read_text()))) if name}
        assert reached & set(ROOMS) <= ROOMS[room] | {room}, ".".join(module)


def test_no_two_modules_need_each_other_to_be_imported():
    """Imports inside functions or under TYPE_CHECKING are not needed for that."""
    graph = {}
    for module, path in MODULES.items():
        graph[module] = set()
        for name in of_the_package(module, ast.parse(path.read_text()).body):
            candidates = (name, (*name, "__init__"), name[:-1], (*name[:-1], "__init__"))
            graph[module] |= {next(candidate for candidate in candidates if candidate in MODULES)} - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_what_is_imported_late_is_offered_for_completion():
    assert {"Explained", "Network", "__version__", "explain", "load", "network"} <= set(dir(kmex_utils))
    assert all(hasattr(kmex_utils, name) for name in dir(kmex_utils))


def test_importing_brings_no_extra_and_no_plotting():
    """One process imports one after the other, and says after each what is there by then."""
    names = (
        "",
        ".method.measures",
        ".method.attribution",
        ".data",
        ".networks",
        ".explanation.explained",
        ".evaluation.certainty",
    )
    code = "import sys\n" + "".join(
        f"import kmex_utils{name}; print(*{{module.partition('.')[0] for module in sys.modules}})\n" for name in names
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, imported in zip(names, done.stdout.splitlines(), strict=True):
        assert not set(imported.split()) & (EXTRAS | WHEN_USED), f"kmex_utils{name}"
