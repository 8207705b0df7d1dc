"""What explaining a network gives: prototypes, what they say of any image, and a folder that keeps them.

:func:`kmex_utils.explanation.fit.explain` makes it from a folder of images, notebooks 3 and 4 from a run.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from .. import data, networks
from ..data import Dataset, reading
from ..hardware import exact
from ..method.attribution import attribution, carried
from ..method.composite import Normalisation
from ..method.explainers import EncoderKMeans, KMEx, block_name
from ..method.prototypes import Prototypes
from ..networks import Network
from ..store import load_json, load_tensors, replacing, save_json, save_tensors
from .interpretation import Interpretation, Patch, segment_patch
from .passed import Passed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .explorer import Explorer

NEAREST = 5  # patches of each prototype, of as many images: what one row of the explorer holds
KEPT_PATCHES = 1024  # drawn patches in memory; at 224 px about 60 MB
KEPT_SEEN = 32  # images from outside the data set whose maps stay in memory


@dataclass(frozen=True)
class Picture:
    """One image: ``pixels`` uint8 [3, S, S], a ``name``, and where it lies in the data set, if it does."""

    pixels: np.ndarray
    name: str
    split: str = ""
    index: int = -1

    @property
    def rgb(self) -> np.ndarray:
        """For display, uint8 [S, S, 3]."""
        return np.broadcast_to(self.pixels.transpose(1, 2, 0), (*self.pixels.shape[1:], 3))


class Seen(NamedTuple):
    """What network and prototypes make of one image: y [C], h [1, D, H, W], q_s by start block [1, H_b, W_b]."""

    y: torch.Tensor
    h: torch.Tensor
    maps: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Nearest:
    """Training images near the prototypes of an explainer.

    ``index`` of the image and ``position`` of its nearest row, [K, n] each (-1: the class has no more images);
    ``shared`` [K]: in how many training images of its class a prototype appears, ``images`` [K]: of how many.
    """

    index: torch.Tensor
    position: torch.Tensor
    shared: torch.Tensor
    images: torch.Tensor

    @classmethod
    def of(cls, explainer: EncoderKMeans, passed: Passed, maps: torch.Tensor) -> "Nearest":
        """By definition, from the rows of each class; ``maps`` q_s of the training images, [N, H', W']."""
        p, labels = explainer.prototypes, passed.labels["train"]
        index = torch.full((len(p), NEAREST), -1)
        position, images = index.clone(), torch.zeros(len(p), dtype=torch.int64)
        for c in p.labels.unique().tolist():
            of_class = (p.labels == c).nonzero().flatten()
            members = (labels == c).nonzero().flatten()
            rows = passed.rows(members, explainer.start_block, explainer.normalisation)
            vectors = p.vectors[of_class].to(rows.device)
            shape = (len(of_class), -1, rows.rows_per_image)  # chunks are whole images
            least = [(chunk.squared - 2 * chunk.dots(vectors)).view(shape).min(2) for _, chunk in rows.chunks()]
            distance, row = (torch.cat(part, 1).cpu() for part in zip(*least, strict=True))
            first = torch.searchsorted(members, p.image[of_class])  # the nearest row of all, as the clustering noted it
            distance.scatter_(1, first[:, None], -torch.inf)
            row.scatter_(1, first[:, None], p.position[of_class, None])
            n = min(NEAREST, len(members))
            order = distance.topk(n, 1, largest=False).indices
            index[of_class, :n], position[of_class, :n] = members[order], row.gather(1, order)
            images[of_class] = len(members)
        return cls(index, position, _appearances(maps, labels, p), images)


def _appearances(maps: torch.Tensor, labels: torch.Tensor, prototypes: Prototypes) -> torch.Tensor:
    """In how many images of its class each prototype appears, [K]."""
    counts = torch.zeros(len(prototypes), dtype=torch.int64)
    for q_s, label in zip(maps, labels.tolist(), strict=True):
        used = q_s.unique().long()
        counts[used[prototypes.labels[used] == label]] += 1
    return counts


class Explained:
    """A network and its prototypes.

    Attributes
    ----------
    network, classes
        The classes of the prototypes: the folder's, or the network's where predictions stand in for labels.
    explainers
        :class:`~kmex_utils.method.explainers.EncoderKMeans` by start block.
    kmex
        :class:`~kmex_utils.method.explainers.KMEx` by K/C.
    dataset
        ``dataset.train`` made the prototypes, ``dataset.test`` was held out; None where only the prototypes were loaded.
    maps, y, h
        By (start block, split) q_s of every image, int32 [N, H_b, W_b]; by split the network's scores [N, C] and, where
        they fit, the encoder's outputs. Filled by :func:`~kmex_utils.explanation.fit.explain` alone.
    table
        Cosines (Table 1) and accuracy (Table 2) by model, or None.
    predictions_as_labels
        Whether the network's predictions stand in for labels.
    settings
        Everything that fixes the result.
    """

    def __init__(self, network: Network, dataset: Dataset | None, settings: dict[str, Any]) -> None:
        self.network, self.dataset, self.settings = network, dataset, settings
        self.classes: tuple[str, ...] = dataset.classes if dataset else tuple(settings["classes"])
        self.explainers: dict[int, EncoderKMeans] = {}
        self.kmex: dict[int, KMEx] = {}
        self.nearest: dict[int, Nearest] = {}
        self.maps: dict[tuple[int, str], torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}
        self.h: dict[str, torch.Tensor] = {}
        self.table: pd.DataFrame | None = None
        self._made: dict[str, dict[str, Any]] = {}  # settings of each explainer
        self._drawn: dict[int, list[list[bytes]]] = {}  # patches as they were saved, by start block
        self._seen: dict[bytes, Seen] = {}
        self._patch = lru_cache(KEPT_PATCHES)(self._cut)

    def __repr__(self) -> str:
        names = ", ".join([*(f"KMEx (K/C={k})" for k in self.kmex), *(self.name(b) for b in self.explainers)])
        of = f"{len(self.dataset.train)} + {len(self.dataset.test)} images of " if self.dataset else ""
        what = names or "no prototypes yet"
        return f"Explained({self.network.name}: {what} on {of}{self.settings['dataset']}, {len(self.classes)} classes)"

    @property
    def predictions_as_labels(self) -> bool:
        """Whether the network's predictions stand in for labels."""
        return bool(self.settings.get("stand_in_classes"))

    def name(self, start_block: int) -> str:
        """``B4``, ``B234`` …"""
        return block_name(start_block, len(self.network.blocks))

    @property
    def start_blocks(self) -> list[int]:
        """From the last to the shallowest."""
        return sorted(self.explainers, reverse=True)

    # prototypes

    def add_kmex(self, kmex: KMEx, **settings: Any) -> str:
        """Take KMEx in; ``settings`` say how it was fitted. Returns its name, ``KMEx-5``."""
        count = len(kmex.prototypes) // len(self.classes)
        self.kmex[count] = kmex
        self._made[f"KMEx-{count}"] = {"prototypes_per_class": count, **settings}
        return f"KMEx-{count}"

    def add_encoder(self, explainer: EncoderKMeans, passed: Passed, maps: torch.Tensor, **settings: Any) -> str:
        """Take B4, B34 … in with what is near its prototypes; returns its name.

        ``maps`` are q_s of the training images, [N, H', W']; ``settings`` say how it was fitted.
        """
        b = explainer.start_block
        self.explainers[b], self.maps[b, "train"] = explainer, maps.int()
        self.nearest[b] = Nearest.of(explainer, passed, maps)
        count = len(explainer.prototypes) // len(self.classes)
        how = {"start_block": b, "prototypes_per_class": count, **asdict(explainer.normalisation)}
        self._made[self.name(b)] = {**how, **settings}
        return self.name(b)

    def patch(self, start_block: int, prototype: int, rank: int = 0) -> Patch:
        """The training patch nearest to a prototype, or the next ones of other images (``rank`` 1, 2 …)."""
        return self._patch(start_block, prototype, rank)

    def _cut(self, start_block: int, prototype: int, rank: int) -> Patch:
        nearest = self.nearest[start_block]
        index, position = int(nearest.index[prototype, rank]), int(nearest.position[prototype, rank])
        if start_block in self._drawn:
            with Image.open(io.BytesIO(self._drawn[start_block][prototype][rank])) as image:
                pixels = np.asarray(image)
        else:
            assert self.dataset is not None
            segments = self.maps[start_block, "train"][index].numpy()
            pixels = segment_patch(self.dataset.train.rgb(index), segments, position)
        name = self.classes[int(self.explainers[start_block].prototypes.labels[prototype])]
        return Patch(prototype, name, 0.0, pixels, index)

    def patches(self, start_block: int, prototype: int) -> list[Patch]:
        """The nearest training patches of a prototype, each of another image."""
        count = int((self.nearest[start_block].index[prototype] >= 0).sum())
        return [self.patch(start_block, prototype, rank) for rank in range(count)]

    def sharing(self, start_block: int, prototype: int) -> tuple[int, int]:
        """In how many training images of its class a prototype appears, and how many there are."""
        nearest = self.nearest[start_block]
        return int(nearest.shared[prototype]), int(nearest.images[prototype])

    # one image

    def picture(self, image: "int | str | Path | np.ndarray | Image.Image | Picture") -> Picture:
        """An image by its index or name in the data set, from a file, or as uint8 array [H, W, 3] or a Pillow image.

        An index counts held-out images first, then those that made the prototypes.

        Raises
        ------
        ValueError, IndexError
            There is no such image, or it cannot be read.
        """
        if isinstance(image, Picture):
            return image
        if isinstance(image, int | np.integer):
            return self._by_index(int(image))
        if isinstance(image, str | Path):
            return self._by_name(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
                raise ValueError(
                    f"an array must be uint8 [H, W, 3] with values 0 … 255, got {image.dtype} {list(image.shape)}"
                )
            image = Image.fromarray(image)
        return Picture(reading.fitted(image, self.network.input.image_size, self.network.input.fit)[0], "image")

    def _by_index(self, index: int) -> Picture:
        if self.dataset is None:
            raise ValueError("the images are not here, only the prototypes: give a file, or load(…, images=folder)")
        test, train = self.dataset.test, self.dataset.train
        if not 0 <= index < len(test) + len(train):
            raise IndexError(f"image must be an index of the {len(test) + len(train)} images, got {index}")
        split, part, i = ("test", test, index) if index < len(test) else ("train", train, index - len(test))
        return Picture(np.asarray(part.pixels[i]), self.names[index], split, i)

    def _by_name(self, image: str | Path) -> Picture:
        if str(image) in self.names:
            return self._by_index(self.names.index(str(image)))
        file = Path(image).expanduser()
        if not file.is_file():
            of = f"an image of {self.settings['dataset']} such as {self.names[0]}" if self.names else "an image here"
            raise ValueError(f"{image} is neither a file nor {of}")
        root = self.settings.get("folder")
        if root and file.absolute().is_relative_to(root):
            name = str(file.absolute().relative_to(root))
            if name in self.names:
                return self._by_index(self.names.index(name))
        return Picture(reading.read(file, self.network.input.image_size, self.network.input.fit)[0], file.name)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all images, held-out ones first, with their split where both splits use a name; empty without images."""
        if self.dataset is None:
            return ()
        test, train = self.dataset.test.names, self.dataset.train.names
        if set(test) & set(train):
            test, train = (tuple(f"{split}/{n}" for n in part) for split, part in (("test", test), ("train", train)))
        return (*test, *train)

    def seen(self, picture: Picture) -> Seen:
        """What the network and the prototypes make of an image; the data set's own are not computed again."""
        if picture.split in self.h:
            i = slice(picture.index, picture.index + 1)
            maps = {b: self.maps[b, picture.split][i].long() for b in self.start_blocks}
            return Seen(self.y[picture.split][picture.index], self.h[picture.split][i], maps)
        key = picture.pixels.tobytes()
        if key not in self._seen:
            with torch.no_grad(), exact():
                x, y = self.network.outputs(self.network.input(picture.pixels[None]))
                maps = {b: explainer.sim(explainer.h(x)) for b, explainer in self.explainers.items()}
            while len(self._seen) >= KEPT_SEEN:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = Seen(y[0], x[-1], maps)
        return self._seen[key]

    def target(self, target: str | int | None, seen: Seen) -> int:
        """Index of a class of the network, by name or index; empty or None: the predicted one."""
        if target in ("", None):
            return int(seen.y.argmax())
        return self.network.output(target)

    def attributions(
        self, seen: Seen, target: str | int | None = "", start: str = "segments"
    ) -> dict[int, torch.Tensor] | None:
        """att(b:) by start block, [1, H_b, W_b]; None where eq. 11 does not hold. ``start`` as in ``attributions``."""
        if not self.network.pooled_linear:
            return None
        c_j = self.network.c[[self.target(target, seen)]]
        last = self.explainers[self.start_blocks[0]]
        return carried(attribution(seen.h, c_j), seen.maps, last.normalisation.align_corners, start=start)

    def interpretations(
        self,
        image: "int | str | Path | np.ndarray | Image.Image | Picture",
        start_blocks: Sequence[int] = (),
        target: str | int | None = "",
        max_patches: int = 10,
        attribution_start: str = "segments",
    ) -> list[Interpretation]:
        """Figure 1's parts for an image, one for each start block (empty: the last and the shallowest)."""
        self._require_encoder()
        blocks = list(start_blocks) or sorted({self.start_blocks[0], self.start_blocks[-1]}, reverse=True)
        for b in blocks:
            if b not in self.explainers:
                raise ValueError(f"start blocks run from {self.start_blocks[-1]} to {self.start_blocks[0]}, got {b}")
        seen = self.seen(self.picture(image))
        att = self.attributions(seen, target, attribution_start)
        return [self._interpretation(b, seen, att, max_patches) for b in blocks]

    def _interpretation(
        self, start_block: int, seen: Seen, att: dict[int, torch.Tensor] | None, max_patches: int
    ) -> Interpretation:
        q_s = seen.maps[start_block]
        predicted = self.classes[int(self.explainers[start_block].proj(q_s)[0].argmax())]
        used, counts = q_s.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:max_patches]
        patches = tuple(
            replace(self.patch(start_block, k), share=count / q_s.numel())
            for k, count in zip(used[order].tolist(), counts[order].tolist(), strict=True)
        )
        attributed = att[start_block][0].numpy() if att else None
        return Interpretation(self.name(start_block), q_s[0].numpy(), attributed, patches, predicted)

    # to look at, send and read on

    def panel(
        self,
        image: "int | str | Path | np.ndarray | Image.Image | Picture",
        start_blocks: Sequence[int] = (),
        target: str | int | None = "",
        *,
        title: str = "",
        attribution_start: str = "segments",
    ) -> "Figure":
        """Figure 1 of an image: maps, attributions and nearest patches.

        Parameters
        ----------
        image
            As in :meth:`picture`.
        start_blocks
            From left to right; empty: the last and the shallowest.
        target
            Class of the network to attribute to; empty: the predicted one.
        title
            Empty: the image's name and the network's prediction.
        attribution_start
            Of att(B:), as in :func:`~kmex_utils.method.attribution.attributions`.
        """
        from .figure1 import figure1

        picture = self.picture(image)
        parts = self.interpretations(picture, start_blocks, target, attribution_start=attribution_start)
        predicted = self.network.classes[int(self.seen(picture).y.argmax())]
        return figure1(picture.rgb, parts, title or f"{Path(picture.name).name}: {self.network.name} says {predicted}")

    def explorer(self, image: "int | str | Path | Picture" = 0, start_block: int = 0) -> "Explorer":
        """An interactive view for the notebook (ipywidgets); a still one where widgets cannot run."""
        self._require_encoder()
        from .explorer import Explorer

        return Explorer(self, image, start_block)

    def report(self, path: str | Path, panels: Sequence[Any] = (), **options: Any) -> Path:
        """One HTML file to send; see :func:`kmex_utils.explanation.report.write`."""
        self._require_encoder()
        from . import report

        return report.write(self, Path(path), panels, **options)

    def export(self, folder: str | Path, images: str | Path = "", **options: Any) -> Path:
        """Maps, attributions, predictions for a whole folder; see :func:`kmex_utils.explanation.export.export`."""
        self._require_encoder()
        from .export import export

        images = images or self.settings.get("folder", "")
        if not images:
            raise ValueError("give the folder of images to export: the prototypes are of a data set, not of a folder")
        return export(self, Path(folder), images, **options)

    def _require_encoder(self) -> None:
        if not self.explainers:
            raise ValueError("there are no prototypes of the encoder: run notebook 04_encoder, or explain() a folder")

    # to keep

    def save(self, folder: str | Path, only: Iterable[str] = ()) -> Path:
        """Everything into a folder that :meth:`load` reads; explainers saved there before go.

        Parameters
        ----------
        only
            Names of explainers (``KMEx-5``, ``B234``) to write beside what is there, as notebooks 3 and 4 do.
        """
        folder = Path(folder)
        names = list(only) or list(self._made)
        if not only:
            if (folder / "explained.json").exists():  # what was saved here before, not another's files
                for stale in _explainer_files(folder):
                    stale.unlink()
            self.network.save(folder)
            if self.table is not None:
                with replacing(folder / "table.csv") as temporary:
                    self.table.to_csv(temporary, float_format="%.6g")
            save_json(folder / "explained.json", {**self.settings, "classes": list(self.classes)})
        for name in names:
            self._save_explainer(folder / f"{name}.safetensors", name)
        return folder

    def _save_explainer(self, path: Path, name: str) -> None:
        made = {**self._made[name], "classes": list(self.classes), "weights": self.network.fingerprint}
        b = made.get("start_block")
        prototypes = (self.kmex[made["prototypes_per_class"]] if b is None else self.explainers[b]).prototypes
        tensors = {field.name: getattr(prototypes, field.name) for field in fields(Prototypes)}
        if b is not None:
            near = {f"nearest_{field.name}": getattr(self.nearest[b], field.name) for field in fields(Nearest)}
            encoded = [_webp(patch.pixels) for k in range(len(prototypes)) for patch in self.patches(b, k)]
            tensors |= near | {"patches": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)}
            tensors["patch_sizes"] = torch.tensor([len(part) for part in encoded])
        save_tensors(path, tensors, made)

    @classmethod
    def load(
        cls, folder: str | Path, module: nn.Module | None = None, images: str | Path | Dataset | None = None
    ) -> "Explained":
        """What :meth:`save` left: explains images it has never seen, and fits nothing again.

        Parameters
        ----------
        module
            Your own network, where it is not one of torchvision or timm; refused where its weights or scores differ.
        images
            The data set, or its folder, for what needs its images: indices, names, the explorer's list.

        Raises
        ------
        FileNotFoundError, ValueError
            One line: nothing was saved there, a part is damaged or of another network.
        """
        folder = Path(folder).expanduser()
        if not (folder / "explained.json").is_file():
            raise FileNotFoundError(f"{folder} holds no saved explanation: give a folder that explained.save() wrote")
        network = networks.load(folder, module)
        settings = load_json(folder / "explained.json")
        if not isinstance(settings, dict) or not isinstance(settings.get("classes"), list):
            raise ValueError(f"{folder / 'explained.json'} is not of a saved explanation: save it again")
        if isinstance(images, str | Path):
            how = {key: settings[key] for key in ("held_out", "seed") if key in settings}
            images = data.load(Path(images), network.input, strict=False, needs_labels=False, data=None, **how)
        explained = cls(network, images, settings)
        explained.classes = tuple(settings["classes"])
        for path in _explainer_files(folder):
            explained._load_explainer(path)
        if (folder / "table.csv").is_file():
            import pandas as pd

            explained.table = pd.read_csv(folder / "table.csv", index_col="model")
        return explained

    def _load_explainer(self, path: Path) -> None:
        tensors, made = load_tensors(path)
        if made.pop("weights", None) != self.network.fingerprint:
            raise ValueError(f"{path} was made from another network: fit it again (notebook 03_kmex or 04_encoder)")
        if tuple(made.pop("classes")) != self.classes:
            raise ValueError(f"{path} is of other classes than {path.parent / 'explained.json'}: fit it again")
        try:
            prototypes = Prototypes(**{field.name: tensors[field.name] for field in fields(Prototypes)})
        except KeyError as missing:
            raise ValueError(f"{path} does not hold prototypes: it lacks {missing}") from None
        count, b = made["prototypes_per_class"], made.get("start_block")
        self._made[path.stem] = made
        if b is None:
            self.kmex[count] = KMEx(prototypes, len(self.classes))
            return
        normalisation = Normalisation(**{field.name: made[field.name] for field in fields(Normalisation)})
        self.explainers[b] = EncoderKMeans(prototypes, len(self.classes), b, normalisation)
        self.nearest[b] = Nearest(**{field.name: tensors[f"nearest_{field.name}"] for field in fields(Nearest)})
        parts = iter(tensors["patches"].split(tensors["patch_sizes"].tolist()))
        counts = (self.nearest[b].index >= 0).sum(1).tolist()
        self._drawn[b] = [[next(parts).numpy().tobytes() for _ in range(count)] for count in counts]


def _explainer_files(folder: Path) -> list[Path]:
    """KMEx by K/C, then B4, B34, B234: from the last block to the shallowest."""
    files = [*folder.glob("KMEx-[0-9]*.safetensors"), *folder.glob("B[0-9]*.safetensors")]
    return sorted(files, key=lambda path: (path.stem[0] == "B", len(path.stem), path.stem))


def _webp(pixels: np.ndarray) -> bytes:
    """Lossless, so that a saved patch is the patch; method 0 is quick and costs a few per cent of size."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()
