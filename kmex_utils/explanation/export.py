"""A whole folder explained to files that other tools read: Parquet for tables, NPZ or PNG for maps."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.folders import apart, listed
from ..data.reading import Reading, read_many, readable
from ..hardware import pick_device
from ..parameters import whole
from ..paths import expanded
from ..store import alone, clean, load_json, replacing, save_json, short

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError("Parquet tables need pyarrow, which is not installed: pip install pyarrow") from None

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import Explained

MAPS = ("npz", "png", "none")
WHITE = 65535  # of a 16-bit PNG
Rows = list[dict[str, Any]]


def export(
    explained: "Explained",
    folder: str | Path,
    images: str | Path,
    *,
    target: "Target" = "",
    maps: str = "npz",
    batch_size: int = 32,
    resume: bool = False,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> Path:
    """Explain every image below a folder, batch by batch; a killed export continues with ``resume``.

    Leaves in ``folder``:

    ``images.parquet``
        a row for each image: file (what UTF-8 cannot hold and control characters are escaped), the network's class and
        score, the ``target`` of the attribution, each explainer's class, the ``error`` of one that cannot be read; of
        names of more than 200 bytes ``maps`` have the first 150 and a hash (:func:`kmex_utils.store.short`);
    ``segments.parquet``
        a row for each image, explainer and prototype in its map: class, share of the positions, attribution to the
        target, the segment's contribution to its score (both empty where eq. 11 does not hold), which over the segments
        sum to the score without its bias;
    ``maps/<file>.npz``
        by explainer the prototype indices (``B4`` …, int32) and attributions (``attribution_B4`` …, float32), each
        [H_b, W_b]; or, with ``maps="png"``, ``maps/<file>.B4.png`` with the indices as 16-bit grey and
        ``maps/<file>.B4.attribution.png`` with attribution = (value / 65535 - 0.5) * 2 * ``attribution_limit``, a
        column of ``images.parquet``;
    ``settings.json``
        everything that made them.

    Parameters
    ----------
    images
        Any folder with images; class folders or not.
    target
        As in :meth:`~kmex_utils.explanation.explained.Explained.panel`; empty: each image's predicted class.
    maps
        ``npz``, ``png`` or ``none``.
    resume
        Continue in a folder that exists; a finished one is left as it is.
    log
        Gets a line for each image that cannot be read.

    Raises
    ------
    ValueError, FileExistsError, FileNotFoundError
        One line: the folder exists; it is of other images or settings.
    """
    if maps not in MAPS:
        raise ValueError(f"maps must be one of {', '.join(MAPS)}, got {maps!r}")
    largest = max(len(explained.explainers[b].prototypes) for b in explained.start_blocks)
    if maps == "png" and largest > WHITE + 1:
        raise ValueError("more than 65,536 prototypes do not fit a 16-bit PNG: use maps='npz'")
    whole(1, batch_size=batch_size)
    chosen = pick_device(device)
    folder, root = expanded(folder), expanded(images)
    if folder.exists() and not resume:
        raise FileExistsError(f"{folder} exists: choose another folder, or give resume=True to continue in it")
    files = listed(root, log)
    if maps == "png":
        apart(folder, root)
    made_by = {**explained.settings, "images": str(root.resolve()), "maps": maps, "batch_size": batch_size}
    made_by["target"] = explained.network.targets(target)
    made_by |= {"weights": explained.network.fingerprint, "files": _digest(_states(root, files))}
    made_by["prototypes"] = _digest(e.prototypes.vectors.numpy().tobytes() for e in explained.explainers.values())
    made_by |= {"edits": explained.edits.done} if explained.edits.done else {}
    settings = folder / "settings.json"
    with alone(folder):
        if settings.exists() and load_json(settings) != json.loads(json.dumps(made_by)):
            raise ValueError(f"{folder} holds an export of other images or settings: choose another folder")
        clean(folder)
        save_json(settings, made_by)
        _write(explained, folder, root, files, target, maps, batch_size, chosen)
    errors = pq.read_table(folder / "images.parquet", columns=["file", "error"]).to_pylist()
    for line in Reading(len(files), [(row["file"], row["error"]) for row in errors if row["error"]]).lines():
        log(line)
    return folder


def _write(
    explained: "Explained",
    folder: Path,
    root: Path,
    files: Sequence[Path],
    target: "Target",
    maps: str,
    batch_size: int,
    chosen: torch.device,
) -> None:
    """The maps and both tables, unless they are there."""
    schemas, parts = _schemas(explained), folder / "parts"
    if not all((folder / f"{table}.parquet").exists() for table in schemas):
        explained.network.to(chosen)
        try:
            for i in tqdm(range(0, len(files), batch_size), desc="export", unit="batch"):
                done = {table: parts / f"{table}-{i:09d}.parquet" for table in schemas}
                if not all(path.exists() for path in done.values()):
                    tables = _batch(explained, files[i : i + batch_size], root, folder / "maps", target, maps, chosen)
                    for (table, path), rows in zip(done.items(), tables, strict=True):
                        with replacing(path) as temporary:
                            pq.write_table(pa.Table.from_pylist(rows, schemas[table]), temporary)
        finally:
            explained.network.to("cpu")
        for table, schema in schemas.items():
            with replacing(folder / f"{table}.parquet") as temporary, pq.ParquetWriter(temporary, schema) as writer:
                for path in sorted(parts.glob(f"{table}-*.parquet")):  # one by one: never all rows in memory
                    writer.write_table(pq.read_table(path))
        shutil.rmtree(parts)


def _schemas(explained: "Explained") -> dict[str, pa.Schema]:
    """Columns of both tables and their types."""
    text, number, index = pa.string(), pa.float64(), pa.int64()
    classes = [f"KMEx-{k}" for k in explained.kmex] + [explained.name(b) for b in explained.explainers]
    images = {"file": text, "predicted": text, "predicted_index": index, "target": text}
    images |= dict.fromkeys(("score", "probability", "attribution_limit"), number)
    images |= dict.fromkeys((*classes, "error"), text)
    segments = {"file": text, "explainer": text, "prototype": index, "class": text}
    segments |= dict.fromkeys(("share", "attribution", "contribution"), number)
    return {"images": pa.schema(images), "segments": pa.schema(segments)}


def _batch(
    explained: "Explained",
    files: Sequence[Path],
    root: Path,
    folder: Path,
    target: "Target",
    maps: str,
    device: torch.device,
) -> tuple[Rows, Rows]:
    """Rows of both tables; writes the maps on the way."""
    network, names = explained.network, [readable(file.relative_to(root).as_posix()) for file in files]
    reading = Reading()
    read = list(read_many(files, network.input, reading, names=names))
    reasons = dict(reading.unreadable)
    images: Rows = [{"file": name, "error": reasons.get(name)} for name in names]
    segments: Rows = []
    if not read:
        return images, segments
    index, pixels = zip(*read, strict=True)
    seen = explained.see(np.stack(pixels), device)
    attributed, probabilities = explained.attributed(seen, target), network.probabilities(seen.y)
    classes = {explained.name(b): explained.explainers[b].proj(q_s).argmax(1) for b, q_s in seen.maps.items()}
    classes |= {f"KMEx-{k}": explainer.predict(explainer.h([seen.h])) for k, explainer in explained.kmex.items()}
    for n, i in enumerate(index):
        image, y = images[i], seen.y[n]
        j = int(y.argmax())
        image |= {"predicted": network.classes[j], "predicted_index": j}
        image |= {"score": float(y[j]), "probability": float(probabilities[n, j])}
        image |= {name: explained.classes[int(predicted[n])] for name, predicted in classes.items()}
        if attributed:
            image["target"] = " − ".join(network.classes[j] for j in attributed.target[:, n])
            image["attribution_limit"] = max(float(a[n].abs().max()) for a in attributed.maps.values())
        arrays = {explained.name(b): q_s[n].numpy().astype(np.int32) for b, q_s in seen.maps.items()}
        for b in seen.maps:
            name = explained.name(b)
            labels, q_s = explained.explainers[b].prototypes.labels, arrays[name]
            used, first, counts = np.unique(q_s, return_index=True, return_counts=True)
            segment = {"file": names[i], "explainer": name}
            for k, position, count in zip(used.tolist(), first, counts, strict=True):
                segment |= {"prototype": k, "class": explained.classes[labels[k]], "share": count / q_s.size}
                if attributed:  # all positions of a segment have one attribution
                    segment["attribution"] = float(attributed.maps[b][n].flatten()[position])
                    segment["contribution"] = float(attributed.contributions[b][n, k])
                segments.append(dict(segment))
            if attributed:
                arrays[f"attribution_{name}"] = attributed.maps[b][n].numpy()
        _save_maps(folder / "/".join(map(short, names[i].split("/"))), arrays, maps, image)
    return images, segments


def _save_maps(stem: Path, arrays: dict[str, Any], maps: str, image: dict[str, Any]) -> None:
    if maps == "npz":
        with replacing(stem.with_name(stem.name + ".npz")) as temporary:
            np.savez_compressed(temporary, **arrays)
    for name, values in arrays.items() if maps == "png" else ():
        ending = f"{name}.png"
        if name.startswith("attribution_"):
            ending = f"{name.removeprefix('attribution_')}.attribution.png"
            values = (WHITE * (0.5 + values / (2 * (image["attribution_limit"] or 1.0)))).round().clip(0, WHITE)
        with replacing(stem.with_name(f"{stem.name}.{ending}")) as temporary:
            Image.fromarray(values.astype(np.uint16)).save(temporary)


def _states(root: Path, files: Sequence[Path]) -> Iterator[bytes]:
    """Name, size and time of change of each file: other files make another export."""
    for file in files:
        state = file.stat()
        yield os.fsencode(f"{file.relative_to(root)} {state.st_size} {state.st_mtime_ns}\n")


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
