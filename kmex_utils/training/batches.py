"""Training batches: shuffled and augmented by (seed, epoch) alone, so that a resumed run sees the same ones."""

import numpy as np
import torch
import torch.nn.functional as F

from ..data.dataset import Batches, Dataset

Device = torch.device | str


def training_batches(
    dataset: Dataset, batch_size: int, seed: int, epoch: int, flip: float = 0, padding: int = 0, device: Device = "cpu"
) -> Batches:
    """One epoch, without a last incomplete batch."""
    generator = epoch_generator(seed, epoch)
    for index in shuffled(len(dataset.train), batch_size, generator):
        pixels = torch.from_numpy(np.array(dataset.train.pixels[index.numpy()])).to(device)
        x = dataset.input(augment(pixels, flip, padding, generator), device)
        yield x, dataset.train.labels[index].to(device)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The source of an epoch's order and augmentation."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # seeds share no epoch below a million


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Indices 0 … count - 1 in random order, in batches; a last incomplete one is dropped."""
    batches = torch.randperm(count, generator=generator).split(batch_size)
    return [index for index in batches if len(index) == batch_size]


def augment(pixels: torch.Tensor, flip: float, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Horizontal flips and random crops (zero border of ``padding`` pixels), drawn image by image, [N, D, H, W]."""
    (n, channels, height, width), device = pixels.shape, pixels.device
    if flip:
        flipped = (torch.rand(n, generator=generator) < flip).to(device)
        pixels = torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    if padding:
        top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).to(device)
        rows = (top + torch.arange(height, device=device)).view(n, 1, height, 1)
        columns = (left + torch.arange(width, device=device)).view(n, 1, 1, width)
        image = torch.arange(n, device=device).view(n, 1, 1, 1)
        channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
        pixels = F.pad(pixels, (padding,) * 4)[image, channel, rows, columns]
    return pixels


def affine(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every image rotated by up to 15° or sheared by up to 10°, a coin tossed for which, [N, 3, S, S]."""
    angle, shear = torch.rand(2, len(x), generator=generator).mul(2).sub(1) * torch.tensor([[15.0], [10.0]])
    rotated = torch.rand(len(x), generator=generator) < 0.5
    angle, shear = torch.deg2rad(angle * rotated), torch.tan(torch.deg2rad(shear * ~rotated))
    zero = torch.zeros(len(x))
    rows = [torch.stack([angle.cos(), shear - angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
