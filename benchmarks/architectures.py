"""Which networks fit: blocks, head and Theorem 1 residual by name, as in figures/architectures.csv.

    python benchmarks/architectures.py [NAME ...] [--weights imagenet] [--csv figures/architectures.csv]

Needs the ``notebooks`` extra (tabulate), and ``timm`` for its names.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kmex_utils.networks import network, theorem1_residual
from kmex_utils.store import replacing

ARCHITECTURES = (
    *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet"),
    *("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf"),
    *("shufflenet_v2_x1_0", "mnasnet1_0", "inception_v3"),
    *("convnext_tiny", "mobilenet_v3_small", "vgg11", "alexnet"),
)


def summary(name: str, weights: str = "random", seed: int = 0) -> dict[str, str]:
    """Blocks and Theorem 1 residual of a network by name.

    With random weights the batch statistics are those of noise, so that activations neither vanish nor grow.
    """
    watched = network(name, weights, seed=seed)
    size = watched.input.image_size
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))
    if weights == "random":
        settle(watched.module, x)
    activations, _ = watched.outputs(x)
    grids = [f"{u.shape[1]} at {u.shape[2]} x {u.shape[3]}" for u in activations]
    holds = watched.pooled_linear
    return {
        "network": name,
        "blocks end at": ", ".join(watched.blocks),
        "channels and positions": ", ".join(grids),
        "head": watched.head + (" (bias)" if watched.b is not None else ""),
        "Theorem 1 residual": f"{theorem1_residual(watched, x):.0e}" if holds else f"does not hold: {watched.between}",
    }


@torch.no_grad()
def settle(module: nn.Module, x: torch.Tensor) -> None:
    """Batch statistics of x, in place."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
            part.momentum = 1.0
    module(x)
    module.eval()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Networks: their blocks, head and Theorem 1 residual.")
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, help="torchvision's, or timm/<name>")
    parser.add_argument("--weights", default="random", help="random (default) or imagenet")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    try:
        table = pd.DataFrame([summary(name, options.weights) for name in options.names])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.csv:
        with replacing(options.csv) as temporary:
            table.to_csv(temporary, index=False)
    print(table.to_markdown(index=False, disable_numparse=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
