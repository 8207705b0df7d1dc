"""Names of a network's outputs, in whatever form they lie around."""

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..paths import expanded

FORMS = "`classes` is a list of names, a dictionary by index, or a text file with one a line or a JSON file of either"


def class_names(classes: Iterable[Any] | Mapping[Any, Any] | str | Path) -> tuple[str, ...]:
    """Names in the order of the outputs; empty for nothing.

    Parameters
    ----------
    classes
        Names in order; a dictionary of names by index, also of ``[id, name]`` as ImageNet's, or of indices by name; a
        text file with one name a line (UTF-8, UTF-16 or Latin-1), or a JSON file with either of the others.

    Raises
    ------
    ValueError, FileNotFoundError
        One line: no file there, or not of this form.
    """
    if isinstance(classes, str | Path):
        if not str(classes):
            return ()
        path = expanded(classes)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {FORMS}")
        text = _text(path)
        if path.suffix.lower() != ".json":
            return tuple(line.strip() for line in text.split("\n") if line.strip())
        try:
            classes = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not readable JSON ({error}): {FORMS}") from None
    if isinstance(classes, Mapping):
        pairs = classes.items()
        by_name = all(isinstance(value, int) for value in classes.values())
        try:
            names = {int(value if by_name else key): key if by_name else value for key, value in pairs}
        except (TypeError, ValueError):
            names = {}
        if len(names) < len(classes) or sorted(names) != list(range(len(names))):
            raise ValueError(f"the indices of `classes` must be 0, 1 … {len(classes) - 1}, each once: {FORMS}")
        classes = [names[j] for j in range(len(names))]
    if not isinstance(classes, Iterable):
        raise ValueError(f"got {type(classes).__name__}: {FORMS}")
    return tuple(str(name[-1]) if isinstance(name, list | tuple) and name else str(name) for name in classes)


def _text(path: Path) -> str:
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise ValueError(f"{path} is not a text file: {FORMS}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
