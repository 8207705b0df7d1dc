"""A whole folder explained to files that other tools read: Parquet for tables, NPZ or PNG for maps."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import hardware
from .attribution import attribution, carried
from .images import Reading, listed, read_many
from .store import load_json, replacing, save_json

MAPS = ("npz", "png", "none")
TABLES = ("images", "segments")


def require_pyarrow() -> None:
    """An ImportError of one line where there is no pyarrow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ImportError("Parquet tables need pyarrow, which is not installed: pip install pyarrow") from None


@torch.no_grad()
def export(
    explained,
    folder: str | Path,
    images: str | Path,
    *,
    maps: str = "npz",
    batch_size: int = 32,
    resume: bool = False,
    device: str = "auto",
    report: Callable[[str], None] = print,
) -> Path:
    """Explain every image below a folder, batch by batch; a killed export continues with ``resume``.

    Leaves in ``folder``:

    ``images.parquet``
        a row for each image: file, the network's class and score, each explainer's class, the ``error`` of one that
        cannot be read;
    ``segments.parquet``
        a row for each image, explainer and prototype in its map: class, share of the positions, attribution to the
        network's predicted class (empty where eq. 11 does not hold);
    ``maps/<file>.npz``
        by explainer the prototype indices (``B4`` …, int32) and attributions (``attribution_B4`` …, float32), each
        [H_b, W_b]; or, with ``maps="png"``, ``maps/<file>.B4.png`` with the indices as 16-bit grey and
        ``maps/<file>.B4.attribution.png`` with attribution = (value / 65535 - 0.5) * 2 * ``attribution_limit``, a
        column of ``images.parquet``;
    ``settings.json``
        everything that made them.

    Parameters
    ----------
    explained
        A :class:`~kmex_utils.explained.Explained`.
    images
        Any folder with images; class folders or not.
    maps
        ``npz``, ``png`` or ``none``.
    resume
        Continue in a folder that exists; a finished one is left as it is.

    Raises
    ------
    ValueError, FileExistsError, FileNotFoundError, ImportError
        One line: the folder exists; it is of other images or settings; pyarrow is missing.
    """
    require_pyarrow()
    from tqdm.auto import tqdm

    if maps not in MAPS:
        raise ValueError(f"maps must be one of {', '.join(MAPS)}, got {maps!r}")
    if maps == "png" and max(len(e.prototypes) for e in explained.explainers.values()) > 65536:
        raise ValueError("more than 65,536 prototypes do not fit a 16-bit PNG: use maps='npz'")
    folder, root = Path(folder).expanduser(), Path(images).expanduser()
    if folder.exists() and not resume:
        raise FileExistsError(f"{folder} exists: choose another folder, or give resume=True to continue in it")
    files = listed(root, report)
    made_by = {**explained.settings, "images": str(root.resolve()), "maps": maps, "batch_size": batch_size}
    made_by |= {"prototypes": _fingerprint(explained), "files": _listing(root, files)}
    kept = folder / "settings.json"
    if kept.exists() and load_json(kept) != json.loads(json.dumps(made_by)):
        raise ValueError(f"{folder} holds an export of other images or settings: choose another folder")
    save_json(kept, made_by)
    parts = folder / "parts"
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    if not all((folder / f"{table}.parquet").exists() for table in TABLES):
        chosen = hardware.pick_device(device)
        explained.network.to(chosen)
        bar = tqdm(total=len(files), desc="export", unit="image")
        try:
            for number, batch in enumerate(batches):
                done = [parts / f"{table}-{number:06d}.parquet" for table in TABLES]
                if not all(path.exists() for path in done):
                    found = _batch(explained, batch, root, folder, maps, chosen)
                    for path, rows in zip(done, found, strict=True):
                        _write(path, rows)
                bar.update(len(batch))
        finally:
            bar.close()
            explained.network.to("cpu")
        for table in TABLES:
            _join(
                [parts / f"{table}-{number:06d}.parquet" for number in range(len(batches))], folder / f"{table}.parquet"
            )
        shutil.rmtree(parts)
    _say_unreadable(folder / "images.parquet", report)
    return folder


def _batch(explained, files, root: Path, folder: Path, maps: str, device) -> tuple[list[dict], list[dict]]:
    network, dataset = explained.network, explained.dataset
    reading = Reading()
    found = list(read_many(files, network.image_size, network.fit, reading, root))
    reasons = dict(reading.unreadable)
    names = [str(file.relative_to(root)) for file in files]
    rows = {name: {"file": name, "error": reasons.get(name)} for name in names}
    segments: list[dict] = []
    if not found:
        return _complete(explained, rows), segments
    index, pixels = zip(*found, strict=True)
    x, y = network.outputs(dataset.normalise(np.stack(pixels), device))
    q_s = {
        b: e.sim(e.h([u.to(hardware.float64_device(device)) for u in x])).cpu() for b, e in explained.explainers.items()
    }
    y, h = y.cpu(), x[-1].cpu()
    att = None
    if network.pooled_linear:
        align_corners = explained.settings["align_corners"]
        att = carried(attribution(h, network.c.cpu()[y.argmax(1)]), q_s, align_corners)
    kmex = {k: e.predict(e.h([h])) for k, e in explained.kmex.items()}
    for n, i in enumerate(index):
        row = rows[names[i]]
        row["predicted"] = network.classes[int(y[n].argmax())]
        row["predicted_index"] = int(y[n].argmax())
        row["score"] = float(y[n].max())
        row["probability"] = float(y[n].softmax(0).max())
        for k, predicted in kmex.items():
            row[f"KMEx-{k}"] = dataset.classes[int(predicted[n])]
        limit = max(float(a[n].abs().max()) for a in att.values()) if att else None
        row["attribution_limit"] = limit
        arrays = {}
        for b, explainer in explained.explainers.items():
            name, q = explained.name(b), q_s[b][n]
            row[name] = dataset.classes[int(explainer.proj(q_s[b][n : n + 1])[0].argmax())]
            arrays[name] = q.numpy().astype(np.int32)
            if att:
                arrays[f"attribution_{name}"] = att[b][n].numpy()
            used, first, counts = np.unique(q.numpy(), return_index=True, return_counts=True)
            for k, at, count in zip(used.tolist(), first.tolist(), counts.tolist(), strict=True):
                segments.append(
                    {
                        "file": names[i],
                        "explainer": name,
                        "prototype": k,
                        "class": dataset.classes[int(explainer.prototypes.labels[k])],
                        "share": count / q.numel(),
                        "attribution": float(att[b][n].flatten()[at]) if att else None,
                    }
                )
        _save_maps(folder / "maps" / names[i], arrays, maps, limit)
    return _complete(explained, rows), segments


def _complete(explained, rows: dict[str, dict]) -> list[dict]:
    """The same columns in every batch."""
    columns = ["file", "predicted", "predicted_index", "score", "probability", "attribution_limit"]
    columns += [f"KMEx-{k}" for k in explained.kmex] + [explained.name(b) for b in explained.explainers] + ["error"]
    return [{column: row.get(column) for column in columns} for row in rows.values()]


def _save_maps(stem: Path, arrays: dict[str, np.ndarray], maps: str, limit: float | None) -> None:
    if maps == "npz":
        with replacing(stem.with_name(stem.name + ".npz")) as temporary:
            np.savez_compressed(temporary, **arrays)
    elif maps == "png":
        from PIL import Image

        for name, values in arrays.items():
            part = name.removeprefix("attribution_")
            ending = f".{part}.attribution.png" if part != name else f".{name}.png"
            if part != name:
                values = (65535 * (0.5 + values / (2 * (limit or 1)))).round().clip(0, 65535)
            with replacing(stem.with_name(stem.name + ending)) as temporary:
                Image.fromarray(values.astype(np.uint16)).save(temporary)


_TEXT, _INTEGER, _NUMBER = "string", "int64", "float64"
_KINDS = {
    "predicted_index": _INTEGER,
    "prototype": _INTEGER,
    **dict.fromkeys(("score", "probability", "attribution_limit", "share", "attribution"), _NUMBER),
}
_SEGMENTS = ("file", "explainer", "prototype", "class", "share", "attribution")


def _write(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(rows[0]) if rows else list(_SEGMENTS)
    schema = pa.schema([(name, getattr(pa, _KINDS.get(name, _TEXT))()) for name in names])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)


def _join(parts: list[Path], path: Path) -> None:
    """Part by part into one file: never all rows in memory."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary, pq.ParquetWriter(temporary, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


def _say_unreadable(path: Path, report) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["file", "error"]).to_pylist()
    reading = Reading(len(table), [(row["file"], row["error"]) for row in table if row["error"]])
    for line in reading.lines():
        report(line)


def _fingerprint(explained) -> str:
    digest = hashlib.sha256()
    for b, explainer in explained.explainers.items():
        digest.update(f"{b}".encode() + explainer.prototypes.vectors.numpy().tobytes())
    return digest.hexdigest()[:16]


def _listing(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{len(files)} files, {digest.hexdigest()[:16]}"
