"""Checks a notebook's ``parameters`` cell: papermill itself accepts any name and any type.

The typed, defaulted assignments of the cell are the specification:

    seed: int = 0  # of initialisation and shuffling

:func:`check` is called in the cell after it and returns the values in force.
"""

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_INJECTED = "# Parameters"  # the first line of the cell papermill adds


def check(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the running notebook, each of its declared type.

    Parameters
    ----------
    namespace
        The notebook's ``globals()``.

    Raises
    ------
    ValueError
        A parameter that the notebook does not declare (a typo), or a value of another type.
    """
    if "In" in namespace:
        sources = [source for source in namespace["In"] if source.strip()]
    else:  # run as a script
        sources = [Path(namespace["__file__"]).read_text()]
    return checked(sources, namespace)


def checked(sources: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`check`, of the cells run so far and the values they left."""
    types = {name: kind for source in sources for name, kind in _declared(source).items()}
    unknown = [
        name for source in sources if source.startswith(_INJECTED) for name in _assigned(source) if name not in types
    ]
    for name in unknown:
        close = get_close_matches(name, types, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown parameter {name!r}: {hint}This notebook takes {', '.join(types)}")
    return {name: _typed(name, kind, values[name]) for name, kind in types.items()}


def _tree(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with magics declares no parameters
        return []


def _declared(source: str) -> dict[str, str]:
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in _tree(source)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _assigned(source: str) -> list[str]:
    return [
        target.id
        for node in _tree(source)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def _typed(name: str, kind: str, value: Any) -> Any:
    if kind.startswith("list["):
        if not isinstance(value, list | tuple):
            hint = f"; from the shell: papermill -y '{name}: [1, 2]'" if isinstance(value, str) else ""
            raise ValueError(f"parameter {name} must be a {kind}, got {value!r} ({type(value).__name__}){hint}")
        return [_typed(name, kind.removeprefix("list[").removesuffix("]"), item) for item in value]
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        hint = f"; from the shell: papermill -r {name} {value}" if kind == "str" else ""
        raise ValueError(f"parameter {name} must be of type {kind}, got {value!r} ({type(value).__name__}){hint}")
    return value
