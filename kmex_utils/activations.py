"""What a frozen backbone makes of a data set: block outputs x(b), embeddings z, logits y."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from .backbones import Backbone, avg_pool
from .composite import CompositeRows, Normalisation
from .datasets import Dataset


@torch.no_grad()
def activations(
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    blocks: range | list[int] = (),
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> Iterator[list[torch.Tensor]]:
    """Per batch, in order: x(b) of the blocks asked for (1 … B; default all), each [n, D_b, H_b, W_b], float32."""
    from tqdm.auto import tqdm

    backbone.eval().to(device)
    wanted = list(blocks) or range(1, len(backbone.blocks) + 1)
    total = -(-len(dataset.split(split)) // batch_size)
    batches = dataset.batches(split, batch_size, device)
    for x, _ in tqdm(batches, f"activations of {split}", total, leave=False):
        outputs = backbone.activations(x)
        yield [outputs[b - 1] for b in wanted]


class Activations:
    """x(b) of a split for the blocks from ``first`` on, read by image, wherever they are kept.

    Use :func:`keep` to make one.
    """

    def __init__(self, read: Callable[[torch.Tensor, int], list[torch.Tensor]], images: int, first: int) -> None:
        self._read = read
        self.images = images
        self.first = first

    def __len__(self) -> int:
        return self.images

    def read(self, index: torch.Tensor, start_block: int) -> list[torch.Tensor]:
        """x(b) of some images for b from ``start_block`` to the last, each [n, D_b, H_b, W_b], float32."""
        return self._read(index, start_block - self.first)

    def rows(
        self, index: torch.Tensor, start_block: int, normalisation: Normalisation, *, device="cpu", **options
    ) -> CompositeRows:
        """Rows of q(b:) of some images, in the order of ``index``; ``options`` of :class:`CompositeRows`."""

        def read(start: int, stop: int) -> list[torch.Tensor]:
            return [x.to(device) for x in self.read(index[start:stop], start_block)]

        return CompositeRows(read, normalisation, images=len(index), **options)


WHERE = ("memory", "disk", "disk-half", "nowhere")


def keep(
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    first: int,
    where: str = "memory",
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> Activations:
    """Pass a split through the backbone once and keep x(first) … x(B).

    Parameters
    ----------
    where
        ``memory``; ``disk`` (float32, memory-mapped files in ``folder``); ``disk-half`` (float16, each image and block
        scaled by a power of two, so that nothing overflows and little underflows); ``nowhere`` (computed anew
        whenever it is read).
    """
    if where not in WHERE:
        raise ValueError(f"where must be one of {', '.join(WHERE)}, got {where!r}")
    blocks = range(first, len(backbone.blocks) + 1)
    n = len(dataset.split(split))
    backbone.eval().to(device)
    if where == "nowhere":
        return Activations(_recompute(backbone, dataset, split, first, device), n, first)
    if where == "memory":
        kept, start = [], 0
        for batch in activations(backbone, dataset, split, blocks, device=device, batch_size=batch_size):
            if not kept:
                kept = [torch.empty((n, *x.shape[1:]), memory_format=torch.channels_last) for x in batch]
            for whole, x in zip(kept, batch, strict=True):
                whole[start : start + len(x)] = x
            start += len(batch[0])
        return Activations(lambda index, skip: [x[index] for x in kept[skip:]], n, first)
    if folder is None:
        raise ValueError(f"where={where!r} needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.float16 if where == "disk-half" else np.float32
    files, scales, start = [], [], 0
    for batch in activations(backbone, dataset, split, blocks, device=device, batch_size=batch_size):
        stop = start + len(batch[0])
        for i, x in enumerate(batch):
            if start == 0:
                path = folder / f"{split}-B{blocks[i]}.npy"
                files.append(np.lib.format.open_memmap(path, "w+", dtype, (n, *x.shape[1:])))
                scales.append(torch.ones(n))
            if where == "disk-half":
                largest = x.abs().amax((1, 2, 3)).clamp_min(1e-30)
                scales[i][start:stop] = torch.exp2(14 - largest.log2().floor()).cpu()
            files[i][start:stop] = (x.cpu() * scales[i][start:stop, None, None, None]).numpy().astype(dtype)
        start = stop

    def read(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        pairs = zip(files[skip:], scales[skip:], strict=True)
        return [torch.from_numpy(x[index.numpy()]).float() / scale[index, None, None, None] for x, scale in pairs]

    return Activations(read, n, first)


def _recompute(backbone, dataset, split, first, device) -> Callable[[torch.Tensor, int], list[torch.Tensor]]:
    @torch.no_grad()
    def read(index: torch.Tensor, skip: int) -> list[torch.Tensor]:
        parts = []
        for some in index.split(128):
            x = dataset.normalise(dataset.split(split).pixels[some.numpy()], device)
            parts.append(backbone.activations(x)[first - 1 + skip :])
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    return read


def embed(
    backbone: Backbone, dataset: Dataset, split: str, *, device: torch.device | str = "cpu", **options
) -> torch.Tensor:
    """Embeddings z of a split, [N, D], on the CPU."""
    last = [len(backbone.blocks)]
    return torch.cat(
        [avg_pool(h).cpu() for (h,) in activations(backbone, dataset, split, last, device=device, **options)]
    )
