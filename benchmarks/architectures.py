"""Which networks fit: a sweep over torchvision and timm, with an independent check beside ours.

    python benchmarks/architectures.py [NAME ...] [--csv runs/architectures.csv] [--jobs 2]
    python benchmarks/architectures.py --families --csv runs/architectures.csv

Random weights, with the batch statistics of noise. ``heads.py`` decides by value from every operation what the head is
and computes both sides of Theorem 1; ``kmex_utils`` takes the same module in. A network is one row of the CSV, written
as soon as it is done; those in it are not run again. Needs the ``timm`` and ``notebooks`` extras; not for Windows.
"""

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from heads import Head, disturb, head_of, images, settle
from torch import nn

from kmex_utils.networks import network, theorem1_residual
from kmex_utils.store import replacing

LARGEST = 100e6  # parameters
OF_A_KIND = 4  # timm's networks of one module file and one class of head: the smallest, the largest, one between
SECONDS, BYTES = 600, 9 * 2**30  # for one network: efficientnet_b7 took 172 s on a shared core, and 2.9 GiB
SAME = 1e-4  # of scores or h, relative to the largest: rounding stays two powers of ten below
COLUMNS = (
    *("library", "network", "family", "million parameters", "image size"),
    *("head kind", "pooled-linear", "form", "residual (independent)", "residual", "y differs by", "h"),
    *("blocks end at", "channels and positions", "head", "why not", "seconds to take in"),
)


def chosen() -> list[str]:
    """Every network of torchvision, and of timm some of each kind, of at most 100 M parameters; the smallest first.

    Of a family that has only larger ones, the smallest. Nothing is drawn by chance.
    """
    import timm
    from torchvision import models

    kinds: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)  # by family and head
    for name in models.list_models(module=models):
        size = models.get_model_weights(name).DEFAULT.meta["num_params"]
        kinds[models.get_model_builder(name).__module__, name].append((size, name))
    for name in timm.list_models():
        with torch.device("meta"):
            module = timm.create_model(name)
        if module.num_classes:
            last = module.pretrained_cfg["classifier"]
            parents = [head.rpartition(".")[0] for head in ([last] if isinstance(last, str) else last)]
            heads = [type(module.get_submodule(parent)).__name__ for parent in parents]
            kinds[type(module).__module__, f"{heads} {getattr(module, 'global_pool', '')}"].append(
                (sum(p.numel() for p in module.parameters()), f"timm/{name}")
            )
    smallest = {of: min(min(sizes) for (other, _), sizes in kinds.items() if other == of) for of, _ in kinds}
    sizes_and_names = []
    for (of, _), sizes in kinds.items():
        fit = sorted(size for size in sizes if size[0] <= LARGEST or size == smallest[of])
        spread = {round(i * (len(fit) - 1) / (OF_A_KIND - 1)) for i in range(OF_A_KIND)} if fit else set()
        sizes_and_names += [fit[i] for i in spread]
    return [name for _, name in sorted(sizes_and_names)]


def is_timm(name: str) -> bool:
    """Whether a name is of timm."""
    return name.startswith("timm/")


def is_known(name: str) -> bool:
    """Whether a library has a network of this name."""
    import timm
    from torchvision import models

    return timm.is_model(name.removeprefix("timm/")) if is_timm(name) else name in models.list_models(module=models)


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights in eval mode, and its library's input: channels, height, width."""
    if is_timm(name):
        import timm

        module = timm.create_model(name.removeprefix("timm/"))
        return module.eval(), timm.data.resolve_model_data_config(module)["input_size"]
    from torchvision import models

    size = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    with warnings.catch_warnings():  # of googlenet's and inception's initialisation
        warnings.simplefilter("ignore")
        return models.get_model(name, weights=None).eval(), (3, size, size)


def row(name: str, seed: int = 0) -> dict[str, Any]:
    """A row of the table: the independent check and ours, on the same weights and images."""
    torch.manual_seed(seed)
    module, (channels, height, width) = build(name)
    x = images(height, width, channels, seed=seed)
    disturb(module, seed)
    settle(module, x)
    head = head_of(module, x)
    try:
        taken_in = ours(module, x, head)
    except Exception as error:  # ours should refuse in words: this is a fault to be seen
        taken_in = {"form": "fails", "why not": in_words(error)}
    return {
        "library": "timm" if is_timm(name) else "torchvision",
        "network": name,
        "family": type(module).__module__.rpartition(".")[2],
        "million parameters": round(sum(p.numel() for p in module.parameters()) / 1e6, 1),
        "image size": f"{height} x {width}",
        "head kind": head.kind,
        "pooled-linear": "yes" if head.pooled_linear else "no",
        "residual (independent)": scientific(head.residual),
        "why not": head.why,
        **taken_in,
    }


def ours(module: nn.Module, x: torch.Tensor, head: Head) -> dict[str, Any]:
    """What kmex_utils makes of a module, beside what the module returned and the h found."""
    started = time.perf_counter()
    try:
        watched = network(module, image_size=x.shape[-1])
    except ValueError as error:
        return {"form": "refused", "why not": str(error), "seconds to take in": f"{time.perf_counter() - started:.2f}"}
    seconds = time.perf_counter() - started
    with torch.no_grad():
        activations, y = watched.outputs(x)
    differs = (y - head.y).abs().max() / head.y.abs().max() if y.shape == head.y.shape else float("inf")
    h = activations[-1].flatten(2)
    return {
        "form": watched.form or "none",
        "residual": scientific(theorem1_residual(watched, x)) if watched.form else "",
        "y differs by": scientific(float(differs)),
        "h": "" if head.h is None else "the same" if same(h, head.h) else "another",
        "blocks end at": ", ".join(watched.blocks),
        "channels and positions": ", ".join(f"{u.shape[1]} at {u.shape[2]} x {u.shape[3]}" for u in activations),
        "head": watched.head or "by value",
        "why not": watched.between or head.why,
        "seconds to take in": f"{seconds:.2f}",
    }


def same(h: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two maps [N, D, P] agree, in whichever order their positions are."""
    return h.shape == other.shape and bool((h.sort(2)[0] - other.sort(2)[0]).abs().max() <= SAME * other.abs().max())


def scientific(number: float | None) -> str:
    """As 3e-07; empty: there is none."""
    return "" if number is None else f"{number:.0e}"


def child(name: str, memory: int, to: Any) -> None:
    """In a process of its own: send the row of a network, or what went wrong."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    warnings.simplefilter("ignore")
    try:
        result = row(name)
    except Exception as error:  # whatever a foreign network raises
        result = failed(name, f"does not run: {in_words(error)}")
    to.send(result)


def in_words(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def failed(name: str, why: str) -> dict[str, Any]:
    """The row of a network that could not be looked at."""
    library = "timm" if is_timm(name) else "torchvision"
    return {"library": library, "network": name, "head kind": "not known", "why not": why}


def isolated(context: Any, name: str, seconds: float = SECONDS, memory: int = BYTES) -> dict[str, Any]:
    """The row of a network, from a process that may take its time and memory, hang or die."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, memory, send), daemon=True)
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else failed(name, f"timeout: more than {seconds} s")
    except EOFError:
        process.join()
        return failed(name, f"does not run: its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def sweep(names: list[str], done: pd.DataFrame, csv: Path | None, jobs: int) -> pd.DataFrame:
    """The table of these networks, also written to the CSV with what was done before; no row is made again."""
    todo = [name for name in names if name not in set(done["network"])]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kmex_utils", "timm", "torchvision"])
    with ThreadPoolExecutor(jobs) as pool:
        for i, future in enumerate(as_completed(pool.submit(isolated, context, name) for name in todo), 1):
            result = future.result()
            done.loc[len(done)] = [str(result.get(column, "")) for column in COLUMNS]
            done = done.sort_values(["library", "network"], ascending=[False, True], ignore_index=True)
            if csv:
                with replacing(csv) as temporary:
                    done.to_csv(temporary, index=False)
            words = [result.get(key, "") for key in ("network", "head kind", "form", "why not")]
            print(f"{i}/{len(todo)}", *filter(None, words), sep="  ", file=sys.stderr, flush=True)
    return done[done["network"].isin(names)]


def read(csv: Path) -> pd.DataFrame:
    """The table as it was written, words alone; a ValueError where it is another."""
    with csv.open() as file:
        if file.readline().strip() != ",".join(COLUMNS):
            raise ValueError(f"{csv} is no table of this sweep: give another --csv, or delete it")
    return pd.read_csv(csv, dtype=str, keep_default_na=False)


def disagrees(networks: pd.DataFrame) -> pd.Series:
    """Where ours and the independent check differ: form, scores or residual."""
    number = networks.apply(partial(pd.to_numeric, errors="coerce"))
    linear, holds = networks["form"] == "linear", networks["pooled-linear"] == "yes"
    formed = networks["form"].isin(["linear", "scaled", "gated"])
    other_y = (formed | (networks["form"] == "none")) & ~(number["y differs by"] <= SAME)
    other_sides = formed & ~(number["residual"] <= SAME)
    return (linear != holds) | other_y | other_sides | (networks["form"] == "fails")


def families(networks: pd.DataFrame) -> pd.DataFrame:
    """One row a family: how many networks, what fits, the largest residual, an example of what does not."""
    rows = []
    for (library, family), part in networks.assign(wrong=disagrees(networks)).groupby(["library", "family"]):
        formed = part[part["form"].isin(["linear", "scaled", "gated"])]
        forms = ", ".join(f"{n} {form}" for form, n in formed["form"].value_counts().items())
        residuals = pd.to_numeric(part["residual"]).dropna()
        rows.append(
            {
                "family": f"{library} {family or '?'}",
                "networks": len(part),
                "pooled-linear": (part["pooled-linear"] == "yes").sum(),
                "accepted": forms or "0",
                "disagree": part["wrong"].sum(),
                "largest residual": scientific(residuals.max()) if len(residuals) else "",
                "why not, for example": next(iter(part.loc[part["form"] != "linear", "why not"]), ""),
            }
        )
    return pd.DataFrame(rows)


def main() -> int:
    """Run the sweep, or read its file, and print a table of it."""
    parser = argparse.ArgumentParser(description="Networks: an independent check of what fits, and ours.")
    parser.add_argument("names", nargs="*", help="torchvision's, or timm/<name>; none: some of every kind")
    parser.add_argument("--csv", type=Path, help="write the rows to this file; those in it are not run again")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time, a core each")
    parser.add_argument("--families", action="store_true", help="run nothing: print a row a family from the CSV")
    options = parser.parse_args()
    if options.families and not (options.csv and options.csv.is_file()):
        parser.error("--families reads the file that a sweep wrote: give --csv FILE")
    if unknown := [name for name in options.names if not is_known(name)]:
        parser.error(f"neither torchvision nor timm has {unknown[0]!r}: give torchvision's name, or timm/<name>")
    try:
        done = read(options.csv) if options.csv and options.csv.is_file() else pd.DataFrame(columns=COLUMNS)
    except ValueError as error:
        parser.error(str(error))
    if options.families:
        networks = done
        table = families(networks)
    else:
        networks = sweep(options.names or chosen(), done, options.csv, options.jobs)
        table = networks[["network", "blocks end at", "head kind", "form", "residual", "why not"]]
    print(table.to_markdown(index=False, disable_numparse=True))
    wrong = networks.loc[disagrees(networks), "network"]
    print(f"\n{len(networks)} networks, ours and the independent check disagree on {len(wrong)}: {', '.join(wrong)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
