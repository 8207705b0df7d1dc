"""``kmex``: a network explained on a folder of images, and the paper's notebooks run, from the shell.

What a command needs is imported when it runs, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import paths

if TYPE_CHECKING:
    import pandas as pd

    from .explanation.explained import Explained, Picture
    from .networks import Network

NETWORK = ("weights", "arch_args", "classes", "blocks", "head", "image_size", "mean", "std", "fit", "window")
OF_EQ_8 = ("norm", "scale", "align_corners", "grid")
EXPLAIN = (
    "start_block",
    "prototypes_per_class",
    "held_out",
    "fit_on",
    *OF_EQ_8,
    "restarts",
    "seed",
    "device",
    "scratch",
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. What is wrong is one line on stderr, and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a terminal that lacks a character
    parser = _parser()
    options, options_left = parser.parse_known_args(arguments)
    if options.command is batch:
        options.snakemake = options_left
    elif options_left:
        parser.error(f"unknown: {' '.join(options_left)}")
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images: what cannot be read is said
    try:
        for name, value in vars(options).items():
            if isinstance(value, Path):
                setattr(options, name, paths.expanded(value))
        status: int = options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kmex", description="Post-hoc self-explanation of CNNs.")
    parser.add_argument("--version", action="version", version=f"kmex {version('kmex-utils')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> Callable[..., argparse.Action]:
        """A command that is described by its docstring; returns what adds its arguments."""
        text = run.__doc__ or ""
        added = commands.add_parser(run.__name__, help=text.partition(".")[0], description=text)
        added.set_defaults(command=run)
        return added.add_argument

    device = "auto (default), cpu, cuda or mps"
    to = "class of attribution (default: the predicted one), or two: that to the first minus that to the second"
    target: dict[str, Any] = {"nargs": "+", "default": [""], "metavar": "CLASS", "help": to}
    add = command(explain)
    add("folder", help="<class>/*, or train/<class>/* and test/<class>/* (or val/), or images without labels")
    add("--model", default="resnet50", help="a name of torchvision, timm/<name>, or a folder with a network saved")
    add("--arch-args", type=json.loads, metavar="JSON", help="arguments of the model, as '{\"layers\": [2, 2, 2, 3]}'")
    add("--weights", default="", help="imagenet (default), random, or a file with a state dict")
    add("--classes", default="", help="names of the network's classes: a text file, one a line, or JSON")
    add("--blocks", nargs="*", default=[], help="names of the modules that end the blocks (default: by resolution)")
    add("--head", default="", help="the module that gives the scores (default: what the network returns)")
    add(
        "--image-size",
        nargs="+",
        type=int,
        default=0,
        metavar="PIXELS",
        help="one number, or H W (default: the weights' own)",
    )
    values: dict[str, Any] = {"nargs": "+", "type": float, "default": [], "metavar": "VALUE"}
    add("--mean", **values, help="of R, G and B, or one, in [0, 1] (default: the weights' own, else ImageNet's)")
    add("--std", **values, help="the same")
    window: dict[str, Any] = {"nargs": 2, "type": float, "default": [], "metavar": ("LOW", "HIGH")}
    add("--window", **window, help="values of black and white in images of more than 8 bits (default: 0 and 65535)")
    add("--fit", default="", help="crop (default: the centre square) or stretch")
    add("--start-block", type=int, default=0, help="shallowest block to explain from (default: the last three blocks)")
    add("--prototypes-per-class", type=int, default=5, help="K/C (default: 5)")
    add("--held-out", type=float, default=0.2, help="share of each class to measure accuracy on (default: 0.2)")
    add("--fit-on", type=int, default=0, help="images of each class that prototypes come from (default: all)")
    add("--norm", default="position", help="of eq. 8: position (default), channel or image")
    add(
        "--scale",
        default="1",
        help="of eq. 8: 1 (default: blocks weigh the same), 1/sqrt(D) or 1/D, as the paper prints",
    )
    add("--align-corners", action="store_true", help="in the interpolation of eq. 7")
    add("--grid", default="shallowest", help="of eq. 7: the shallowest (default) or deepest block's, or double")
    add("--restarts", type=int, default=3, help="of k-means (default: 3)")
    add("--seed", type=int, default=0, help="of k-means and of the held-out images (default: 0)")
    add("--device", default="auto", help=device)
    add("--scratch", default="", help="folder for temporary files (default: the system's)")
    add("--out", type=Path, default="explained", help="new folder for the results (default: explained)")
    add("--panel", nargs="*", default=[], metavar="IMAGE", help="images to draw Figure 1 of")
    add("--target", **target)
    add("--small", action="store_true", help="save a few MB: without the encoder's weights, prototypes in float16")
    add("--report", action="store_true", help="write report.html, one file to send")
    add("--page", type=int, default=0, metavar="N", help="write page.html, the explorer of N images, one file to send")
    add("--export", action="store_true", help="write maps and tables of every image of the folder to <out>/export")
    add("--resume", action="store_true", help="go on in an --out folder that exists (an interrupted export continues)")

    saved = "folder of an explanation saved before"
    of_small = {"default": "", "help": "of an explanation saved --small: the network's file, or imagenet"}
    add = command(show)
    add("saved", type=Path, help=saved)
    add("--weights", **of_small)
    add("images", nargs="+", metavar="image", help="images to draw Figure 1 of, new ones too")
    add("--target", **target)
    add("--overlay", action="store_true", help="also lay map and attribution over each image, at its own resolution")
    add("--out", type=Path, help="folder for the panels (default: SAVED)")

    add = command(export)
    add("saved", type=Path, help=saved)
    add("images", help="folder with images, in class folders or not")
    add("--weights", **of_small)
    add("--out", required=True, help="new folder for maps and tables")
    add("--target", **target)
    add("--maps", default="npz", help="npz (default), png or none")
    add("--device", default="auto", help=device)
    add("--resume", action="store_true", help="continue an interrupted export")

    add = command(measure)
    add("saved", type=Path, help=saved)
    add("images", help="the folder it was made from")
    add("--weights", **of_small)
    add("--annotations", default="", help="of the images: keypoints or boxes as CSV, or a folder of masks")
    add("--count", type=int, default=20, help="held-out images to measure faithfulness on (default: 20)")
    add("--steps", type=int, default=10, help="of a curve of deletion or insertion (default: 10)")
    add("--refits", type=int, default=3, help="of k-means, from other seeds (default: 3)")
    add("--out", type=Path, help="folder for the tables (default: SAVED)")
    add("--device", default="auto", help=device)

    for run in (batch, estimate):
        add = command(run)
        add("config", type=Path, help="config/quick.yaml, config/paper.yaml or your own")
        add("--runs", type=Path, default=paths.RUNS, help="folder of results (default: runs)")
        if run is batch:
            add("--figures", type=Path, default=paths.FIGURES, help="folder of figures (default: figures)")
        else:
            add("--jobs", type=int, default=1, help="notebooks and shards at a time, on a cluster (default: 1)")
    return parser


def explain(options: argparse.Namespace) -> int:
    """Explain a network on a folder of images: prototypes, a table of cosines and accuracy, panels, a report."""
    if options.out.exists() and not options.resume:
        raise FileExistsError(f"{options.out} exists: choose another --out, or give --resume to go on in it")
    folder = paths.expanded(options.folder)
    if not folder.is_dir():  # before the network's weights are downloaded
        raise FileNotFoundError(f"{folder} does not exist or is not a folder: give a folder of images")
    from .store import alone

    with alone(options.out):
        return _explain(options)


def _explain(options: argparse.Namespace) -> int:
    from .explanation import fit
    from .networks.network import network

    model = network(options.model, **{name: getattr(options, name) for name in NETWORK})
    _check(options, model)
    how = {name: getattr(options, name) for name in EXPLAIN}
    explained = fit.explain(model, options.folder, **how, check=partial(_same_settings, options.out))
    explained.save(options.out, small=options.small)
    assert explained.table is not None
    print(explained.table.to_string(float_format="{:.2f}".format, na_rep="–", index_names=False))
    pictures = _panels(explained, options.panel, options.out, options.target)
    if options.report:
        print(explained.report(options.out / "report.html", pictures, target=options.target, overwrite=True))
    if options.page:
        print(explained.page(options.out / "page.html", options.page, options.target, overwrite=True))
    if options.export:
        print(explained.export(options.out / "export", target=options.target, resume=options.resume))
    return 0


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on in the folder of a whole explanation of other settings."""
    from .store import load_json

    saved = load_json(out / "explained.json") if (out / "explained.json").is_file() else {}
    if isinstance(saved, dict) and "network" in saved:  # to its end
        asked = json.loads(json.dumps(settings))
        if other := [name for name in asked if asked[name] != saved.get(name)]:
            raise ValueError(f"{out} holds an explanation of other settings ({', '.join(other)}): choose another --out")


def _check(options: argparse.Namespace, network: "Network") -> None:
    """Refuse before the computation what would fail after it."""
    from .data import reading

    network.targets(options.target)
    if options.page < 0:
        raise ValueError(f"--page takes a number of images, got {options.page}")
    for image in options.panel:
        inside = paths.expanded(options.folder) / image
        file = inside if inside.is_file() else paths.expanded(image)
        if not file.is_file():
            raise ValueError(f"--panel {image} is neither a file nor in {options.folder}")
        try:
            reading.read(file, network.input)
        except ValueError as error:
            raise ValueError(f"--panel {image} cannot be read: {error}") from None


def _panels(
    explained: "Explained", images: Sequence[str], out: Path, target: Sequence[str], overlays: Sequence[str] = ()
) -> list["Picture"]:
    """Figure 1 of each image as ``panel-<name>`` below ``out``, and its ``overlays``; says where."""
    from . import drawing
    from .store import replacing, short

    pictures = [explained.picture(image) for image in images]
    names = ["-".join(Path(picture.name).with_suffix("").parts) for picture in pictures]
    for i, picture in enumerate(pictures):
        name = short(f"{names[i]}{f'-{i + 1}' if names.count(names[i]) > 1 else ''}")
        stem = out / f"panel-{name}"
        drawing.save(explained.panel(picture, target=target), stem)
        print(f"{stem}.png")
        for of in overlays:
            file = out / f"{of}-{name}.png"
            with replacing(file) as temporary:
                explained.overlay(images[i], target=target, of=of).save(temporary)
            print(file)
    return pictures


def show(options: argparse.Namespace) -> int:
    """Draw Figure 1 of new images by an explanation saved before. Nothing is fitted."""
    from .data.folders import apart
    from .explanation.explained import Explained
    from .store import writable

    out = options.out or options.saved
    writable(out)
    explained = Explained.load(options.saved, weights=options.weights)
    if photos := explained.settings.get("folder"):
        apart(out, photos)
    layers = ["map", *(["attribution"] if explained.network.form else [])] if options.overlay else []
    _panels(explained, options.images, out, options.target, layers)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write maps and tables of a folder of images by an explanation saved before. Nothing is fitted."""
    from .explanation.explained import Explained

    how = {name: getattr(options, name) for name in ("target", "maps", "device", "resume")}
    print(Explained.load(options.saved, weights=options.weights).export(options.out, options.images, **how))
    return 0


def measure(options: argparse.Namespace) -> int:
    """Measure how far a saved explanation can be believed: faithfulness, certainty, and fidelity to annotated parts."""
    from .evaluation.measured import measured
    from .explanation.explained import Explained
    from .store import save_text, writable

    writable(options.out or options.saved)
    explained = Explained.load(options.saved, images=options.images, weights=options.weights)
    out = options.out or options.saved
    how = {"images": options.count, "steps": options.steps, "refits": options.refits}
    tables = measured(explained, options.annotations, **how, device=options.device)
    for name, table in tables.items():
        save_text(out / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
        print(f"\n{out / name}.csv")
        print(SHOWN[name](table).to_string(float_format="{:.2f}".format, na_rep="–"))
    return 0


SHOWN: dict[str, Callable[["pd.DataFrame"], "pd.DataFrame"]] = {
    "certainty": lambda table: table.pivot(index="measure", columns="explainer", values="value"),
    "fidelity": lambda table: table.set_index("explainer")[["grid", "nmi", "null_nmi", "ceiling_nmi", "ari", "purity"]],
    "faithfulness": lambda table: table.pivot(index="method", columns="measure", values="value"),
}


def _configuration(options: argparse.Namespace) -> Path:
    if not (paths.ROOT / "Snakefile").is_file():
        raise FileNotFoundError(
            "the notebooks, their workflow and the digits belong to the repository of kmex-utils, not to the installed "
            "package: clone the repository (companion to arXiv:2603.28466) and run `make reproduce` there"
        )
    if find_spec("snakemake") is None:
        raise ImportError(
            "the notebooks and their workflow need more than the package: pip install 'kmex-utils[batch]'"
        )
    if not options.config.is_file():
        raise FileNotFoundError(f"{options.config} does not exist")
    return options.config.resolve()


def batch(options: argparse.Namespace) -> int:
    """Run every notebook over data sets and seeds. Further options go to Snakemake (--cores 4, --dry-run …)."""
    config = _configuration(options)
    from .paper import batch

    return batch.run(config, options.runs.resolve(), options.figures.resolve(), options.snakemake)


def estimate(options: argparse.Namespace) -> int:
    """Estimate what a batch would take on this machine, from where its results stand. A few seconds of measuring."""
    config = _configuration(options)
    from .paper import estimate

    estimate.show(config, options.runs.resolve(), options.jobs)
    return 0
