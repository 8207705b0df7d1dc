"""What a frozen network makes of a data set: block outputs x(b), embeddings z."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import Dataset
from ..hardware import exact
from ..method.composite import Normalisation
from ..method.explainers import avg_pool
from ..method.operator import CompositeRows
from ..networks import Network

STORES = ("memory", "disk", "disk-half", "nowhere")

Read = Callable[[torch.Tensor, int], list[torch.Tensor]]


@torch.no_grad()
def activations(
    network: Network,
    dataset: Dataset,
    split: str,
    blocks: Sequence[int] = (),
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    scores: list[torch.Tensor] | None = None,
) -> Iterator[list[torch.Tensor]]:
    """Per batch, in order: x(b) of the blocks asked for (1 … B; default all), each [n, D_b, H_b, W_b], float32.

    ``scores`` gets the network's y of each batch, [n, C], on the CPU.
    """
    from tqdm.auto import tqdm

    network.eval().to(device)
    wanted = list(blocks) or range(1, len(network.blocks) + 1)
    total = -(-len(dataset.split(split)) // batch_size)
    batches = dataset.batches(split, batch_size, device)
    for x, _ in tqdm(batches, f"activations of {split}", total, leave=False):
        with exact():
            outputs, y = network.outputs(x)
        if scores is not None:
            scores.append(y.cpu())
        yield [outputs[b - 1] for b in wanted]


class Activations:
    """x(b) of a split for the blocks from ``first`` on, read by image, wherever they are stored.

    Use :func:`keep` to make one.
    """

    def __init__(self, read: Read, images: int, first: int) -> None:
        self._read = read
        self.images = images
        self.first = first

    def __len__(self) -> int:
        return self.images

    def read(self, index: torch.Tensor, start_block: int) -> list[torch.Tensor]:
        """x(b) of some images for b from ``start_block`` to the last, each [n, D_b, H_b, W_b], float32."""
        return self._read(index, start_block - self.first)

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
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    scores: list[torch.Tensor] | None = None,
) -> Activations:
    """Pass a split through the network once and keep x(first) … x(B).

    Parameters
    ----------
    store
        ``memory``; ``disk`` (float32, memory-mapped files in ``folder``); ``disk-half`` (float16, each image and block
        scaled by a power of two, so that nothing overflows and little underflows); ``nowhere`` (computed anew
        whenever it is read).
    scores
        As in :func:`activations`; "nowhere" makes no pass and gives none.
    """
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
    images = len(dataset.split(split))
    if store == "nowhere":
        network.eval().to(device)
        return Activations(_recompute(network, dataset, split, first, device), images, first)
    blocks = range(first, len(network.blocks) + 1)
    batches = activations(network, dataset, split, blocks, device=device, batch_size=batch_size, scores=scores)
    if store == "memory":
        return Activations(_in_memory(batches, images), images, first)
    if folder is None:
        raise ValueError(f"store={store!r} needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-B{b}.npy" for b in blocks]
    return Activations(_on_disk(batches, images, paths, half=store == "disk-half"), images, first)


def _in_memory(batches: Iterator[list[torch.Tensor]], images: int) -> Read:
    kept: list[torch.Tensor] = []
    start = 0
    for batch in batches:
        if not kept:
            kept = [torch.empty((images, *x.shape[1:]), memory_format=torch.channels_last) for x in batch]
        for whole, x in zip(kept, batch, strict=True):
            whole[start : start + len(x)] = x
        start += len(batch[0])
    return lambda index, skip: [x[index] for x in kept[skip:]]


def _on_disk(batches: Iterator[list[torch.Tensor]], images: int, paths: list[Path], half: bool) -> Read:
    files: list[np.ndarray] = []
    scales = [torch.ones(images) for _ in paths]
    start = 0
    for batch in batches:
        stop = start + len(batch[0])
        for i, x in enumerate(batch):
            if start == 0:
                dtype = np.float16 if half else np.float32
                files.append(np.lib.format.open_memmap(paths[i], "w+", dtype, (images, *x.shape[1:])))
            if half:  # the largest value to 2^14: a factor four below float16's end
                largest = x.abs().amax((1, 2, 3)).clamp_min(1e-30)
                scales[i][start:stop] = torch.exp2(14 - largest.log2().floor()).cpu()
            files[i][start:stop] = (x.cpu() * scales[i][start:stop, None, None, None]).numpy()
        start = stop

    def read(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        pairs = zip(files[skip:], scales[skip:], strict=True)
        return [torch.from_numpy(x[index.numpy()]).float() / scale[index, None, None, None] for x, scale in pairs]

    return read


def _recompute(network: Network, dataset: Dataset, split: str, first: int, device: torch.device | str) -> Read:
    @torch.no_grad()
    def read(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        parts = []
        for some in index.split(128):
            x = dataset.input(dataset.split(split).pixels[some.numpy()], device)
            with exact():
                parts.append(network.activations(x)[first - 1 + skip :])
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    return read


def embed(
    network: Network, dataset: Dataset, split: str, *, batch_size: int = 128, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Embeddings z of a split, [N, D], on the CPU."""
    last = [len(network.blocks)]
    batches = activations(network, dataset, split, last, batch_size=batch_size, device=device)
    return torch.cat([avg_pool(h).cpu() for (h,) in batches])
