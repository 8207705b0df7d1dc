"""Checks a notebook's ``parameters`` cell: papermill itself accepts any name and any type.

The typed, defaulted assignments of the cell are the specification:

    seed: int = 0  # of initialisation and shuffling

:func:`check` is called in the cell after it and returns the values in force.
"""

import ast
import operator
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_INJECTED = "# Parameters"  # the first line of the cell papermill adds


def check(namespace: Mapping[str, Any], may_be_empty: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters of the running notebook, whose ``globals()`` are given, each of its declared type.

    A parameter that the notebook does not declare (a typo), or a value of another type, is a ValueError. So is an empty
    list where the default is not empty, but for those that ``may_be_empty``.
    """
    if "In" in namespace:
        sources = [source for source in namespace["In"] if source.strip()]
    else:  # run as a script
        sources = [Path(namespace["__file__"]).read_text(encoding="utf-8")]
    return checked(sources, namespace, may_be_empty)


def checked(sources: list[str], values: Mapping[str, Any], may_be_empty: Sequence[str] = ()) -> dict[str, Any]:
    """As :func:`check`, of the cells run so far and the values they left."""
    types: dict[str, str] = {}
    defaults: dict[str, str] = {}
    injected = []
    for source in sources:
        for statement in _statements(source):
            match statement:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as default):
                    types[name], defaults[name] = ast.unparse(kind), ast.unparse(default)
                case ast.Assign(targets=[ast.Name(id=name)]) if source.startswith(_INJECTED):
                    injected.append(name)
    for name in injected:
        if name not in types:
            close = get_close_matches(name, types, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown parameter {name!r}: {hint}This notebook takes {', '.join(types)}")
    found = {name: typed(name, kind, values[name]) for name, kind in types.items()}
    for name, value in found.items():
        if value == [] != ast.literal_eval(defaults[name]) and name not in may_be_empty:
            raise ValueError(f"parameter {name} must not be empty, as in {defaults[name]}")
    return found


def declared(source: str) -> dict[str, str]:
    """The types that a notebook's script declares, by parameter."""
    found = (statement for statement in _statements(source) if isinstance(statement, ast.AnnAssign))
    return {ast.unparse(statement.target): ast.unparse(statement.annotation) for statement in found}


def resolved(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook's script, but for those ``given``; each of its declared type."""
    found = (s for s in _statements(source) if isinstance(s, ast.AnnAssign))
    defaults = {ast.unparse(s.target): ast.literal_eval(s.value) for s in found if s.value}
    return {name: typed(name, kind, given.get(name, defaults[name])) for name, kind in declared(source).items()}


def whole(least: int = 0, most: int = 2**63 - 1, **values: Any) -> None:
    """A ValueError that names the first of the ``values`` that is no whole number in [least, most]."""
    for name, value in values.items():
        try:
            fits = least <= operator.index(value) <= most and not isinstance(value, bool)
        except TypeError:
            fits = False
        if not fits:
            up = f" and at most {most}" if isinstance(value, int) and value > most else ""
            raise ValueError(f"{name} must be a whole number of at least {least}{up}, got {value!r}")


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with magics declares no parameters
        return []


def typed(name: str, kind: str, value: Any) -> Any:
    """The value of a parameter of that type; a ValueError where it is of another."""
    if kind.startswith("list["):
        if not isinstance(value, list | tuple):
            hint = f"; from the shell: papermill -y '{name}: [1, 2]'"
            raise ValueError(f"parameter {name} must be a {kind}, got {value!r} ({type(value).__name__}){hint}")
        return [typed(name, kind.removeprefix("list[").removesuffix("]"), item) for item in value]
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        hint = f"; from the shell: papermill -r {name} {value}" if kind == "str" else ""
        raise ValueError(f"parameter {name} must be of type {kind}, got {value!r} ({type(value).__name__}){hint}")
    return value
