"""What a frozen backbone makes of a data set: block outputs x(b), embeddings z, logits y."""

from collections.abc import Iterator

import torch

from .backbones import Backbone, avg_pool
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


def collect(
    backbone: Backbone, dataset: Dataset, split: str, blocks: range | list[int], **options
) -> list[torch.Tensor]:
    """x(b) of a whole split in memory, on the CPU, each [N, D_b, H_b, W_b] (channels last)."""
    parts = [[x.cpu() for x in batch] for batch in activations(backbone, dataset, split, blocks, **options)]
    return [torch.cat(x).contiguous(memory_format=torch.channels_last) for x in zip(*parts, strict=True)]


def embed(
    backbone: Backbone, dataset: Dataset, split: str, *, device: torch.device | str = "cpu", **options
) -> torch.Tensor:
    """Embeddings z of a split, [N, D], on the CPU."""
    last = [len(backbone.blocks)]
    return torch.cat(
        [avg_pool(h).cpu() for (h,) in activations(backbone, dataset, split, last, device=device, **options)]
    )
