"""What a frozen network makes of a data set: block outputs x(b), embeddings z, scores y."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data import Dataset
from ..hardware import exact
from ..method.composite import Normalisation
from ..method.explainers import avg_pool
from ..method.operator import CompositeRows
from ..networks import Network
from ..store import room

STORES = ("memory", "disk", "disk-half", "nowhere")


@torch.no_grad()
def activations(
    network: Network, dataset: Dataset, split: str, batches: Sequence[torch.Tensor], device: torch.device | str = "cpu"
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Of each batch of images (an index [n]) x(1) … x(B), each [n, D_b, H_b, W_b], float32, and y [n, C]."""
    from tqdm.auto import tqdm

    network.eval().to(device)
    pixels = dataset.split(split).pixels
    for index in tqdm(batches, f"activations of {split}", leave=False):
        with exact():
            outputs = network.outputs(dataset.input(pixels[index.numpy()], device))
        yield outputs


def embed(
    network: Network, dataset: Dataset, split: str, *, batch_size: int = 128, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Embeddings z of a split, [N, D], on the CPU."""
    in_order = torch.arange(len(dataset.split(split))).split(batch_size)
    passes = activations(network, dataset, split, in_order, device)
    return torch.cat([avg_pool(x[-1]).cpu() for x, _ in passes])


@dataclass(frozen=True)
class Activations:
    """x(b) of a split for the blocks from ``first`` on, read by image, wherever they are stored; :func:`keep` makes it.

    ``index`` [N] are the images that were passed, ascending, ``y`` [N, C] the network's scores of them.
    """

    index: torch.Tensor
    y: torch.Tensor
    first: int
    in_memory: bool
    _read: Callable[[torch.Tensor, int], list[torch.Tensor]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.y)

    def read(self, index: torch.Tensor, start_block: int) -> list[torch.Tensor]:
        """x(b) of some images for b from ``start_block`` to the last, each [n, D_b, H_b, W_b], float32."""
        return self._read(index, start_block - self.first)

    def bytes_of(self, start_block: int) -> int:
        """Of one image's x(b) for b from ``start_block`` on."""
        return sum(x.nbytes for x in self.read(self.index[:1], start_block))

    def rows(
        self,
        index: torch.Tensor,
        start_block: int,
        normalisation: Normalisation,
        *,
        keep: bool = True,
        device: torch.device | str = "cpu",
    ) -> CompositeRows:
        """Rows of q(b:) of some images, in the order of ``index``; ``keep`` as in :class:`CompositeRows`."""

        def read(start: int, stop: int) -> list[torch.Tensor]:
            return [x.to(device) for x in self.read(index[start:stop], start_block)]

        return CompositeRows(read, normalisation, images=len(index), keep=keep)


def keep(
    network: Network,
    dataset: Dataset,
    split: str,
    first: int,
    store: str = "memory",
    *,
    batches: Sequence[torch.Tensor] | None = None,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> Activations:
    """Pass a split, or some ``batches`` of it (an index [n] each), through the network once and keep x(first) … x(B).

    ``store``: ``memory``; ``disk`` (float32, memory-mapped files without a name in ``folder``); ``disk-half`` (float16,
    each image and block scaled by a power of two, so that nothing overflows and little underflows); ``nowhere``
    (computed anew whenever it is read).
    """
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
    if store.startswith("disk") and folder is None:
        raise ValueError(f"store={store!r} needs a folder")
    half = store == "disk-half"
    if batches is None:
        batches = torch.arange(len(dataset.split(split))).split(batch_size)
    passed = torch.cat([*batches, torch.empty(0, dtype=torch.int64)]).sort().values
    images, row = len(passed), torch.full((len(dataset.split(split)),), -1)  # of an image in what is kept
    row[passed] = torch.arange(images)
    kept: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    y: list[torch.Tensor] = []
    for index, (outputs, scores) in zip(batches, activations(network, dataset, split, batches, device), strict=True):
        if not torch.isfinite(scores).all():
            raise ValueError("the network's scores hold NaN or infinite values: check the images and the weights")
        y.append(scores.cpu())
        here = row[index]
        for i, x in enumerate(outputs[first - 1 :] if store != "nowhere" else ()):
            if len(kept) == i:
                shape = images, *x.shape[1:]
                if folder and store != "memory":
                    kept.append(torch.from_numpy(room(folder, np.float16 if half else np.float32, shape)))
                else:
                    kept.append(torch.empty(shape, memory_format=torch.channels_last))
                scales.append(torch.ones(images))
            if half:  # the largest value to 2^14: a factor four below float16's end
                largest = x.abs().amax((1, 2, 3)).clamp_min(1e-30)
                scales[i][here] = torch.exp2(14 - largest.log2().floor()).cpu()
                x = x.cpu() * scales[i][here, None, None, None]
            kept[i][here] = x.cpu().to(kept[i].dtype)

    def read(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        index = row[index]
        if (index < 0).any():
            raise IndexError("images of another shard were not passed here")
        parts = [x[index] for x in kept[skip:]]
        if half:
            pairs = zip(parts, scales[skip:], strict=True)
            parts = [x.float() / scale[index, None, None, None] for x, scale in pairs]
        return parts

    @torch.no_grad()
    def compute(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        parts = []
        for part in index.split(128):
            x = dataset.input(dataset.split(split).pixels[part.numpy()], device)
            with exact():
                parts.append(network.activations(x)[first - 1 + skip :])
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    of_all = torch.cat(y)[torch.cat(list(batches)).argsort()] if y else torch.empty(0, len(network.classes))
    return Activations(passed, of_all, first, store == "memory", compute if store == "nowhere" else read)
