"""Make a ResNet's ImageNet weights from a NuGet package: `python data/make_resnet_weights.py PACKAGE [FILE]`.

PACKAGE is Microsoft.ML.DnnImageFeaturizer.ResNet18 0.23.1: the .nupkg, or a folder that holds its ResNet18.onnx and
ResNetPreprocess.onnx. FILE (default: resnet-2-2-2-3-imagenet/weights.safetensors beside this script) has torchvision's
and timm's names and takes RGB as ImageNet's mean and std normalise it. Prints FILE's SHA-256. Needs the package onnx.
"""

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
import torch
from safetensors.torch import save

from kmex_utils import paths
from kmex_utils.data import IMAGENET_MEAN, IMAGENET_STD
from kmex_utils.store import replacing

try:
    from onnx import GraphProto, load_model_from_string
    from onnx.numpy_helper import to_array
except ImportError:
    sys.exit("the package is read by onnx, which is not installed: pip install onnx")

PACKAGE = "Microsoft.ML.DnnImageFeaturizer.ResNet18 0.23.1"
FILES = {
    "ResNet18.onnx": "e2552f19db2dfdb01b3669537b6a0f1b44da38d18279535492ed5dfc2ef1ff8f",
    "ResNetPreprocess.onnx": "84bf8def78d0befaa3f6e73745d57d7016c6a192ead76f79686bd438c1047004",
}
SHA256 = "c69d8cd09dc433ada8cd9d2ccb8d50c9c6951efd05909d86cbae5e5b675b0356"  # of the weights
METADATA = {
    "network": "torchvision.models.resnet.ResNet(BasicBlock, [2, 2, 2, 3]) without fc",
    "input": "RGB, ImageNet mean and std",
    "source": f"{PACKAGE} (MIT)",
}
BLOCKS = [f"layer{i}.{j}" for i, count in enumerate((2, 2, 2, 3), 1) for j in range(count)]
CHAIN = [("conv1", "bn1"), *((f"{block}.conv{k}", f"{block}.bn{k}") for block in BLOCKS for k in (1, 2))]
SHORTCUTS = [(f"layer{i}.0.downsample.0", f"layer{i}.0.downsample.1") for i in (2, 3, 4)]


def contents(package: Path) -> list[bytes]:
    """The two files of the package, checked."""
    if package.is_dir():
        read = {file.name: file.read_bytes for file in package.rglob("*.onnx")}
    elif zipfile.is_zipfile(package):
        root = zipfile.Path(package)
        read = {PurePath(name).name: (root / name).read_bytes for name in root.root.namelist()}
    else:
        raise FileNotFoundError(f"{package} is neither a .nupkg nor a folder: give the package {PACKAGE}")
    for name, sha256 in FILES.items():
        if name not in read or hashlib.sha256(read[name]()).hexdigest() != sha256:
            raise ValueError(f"{package} has no {name} of SHA-256 {sha256}: give the package {PACKAGE}")
    return [read[name]() for name in FILES]


def layers(graph: GraphProto) -> Iterator[list[torch.Tensor]]:
    """Convolution's weight, scale, bias, mean and variance of each batch normalisation, in the graph's order."""
    arrays = {tensor.name: torch.tensor(to_array(tensor)) for tensor in graph.initializer}
    made_by = {}
    for node in graph.node:
        made_by[node.output[0]] = node
        if node.op_type == "BatchNormalization":
            before = made_by[node.input[0]]
            while before.op_type != "Conv":
                before = made_by[before.input[0]]
            yield [arrays[before.input[1]], *(arrays[name].flatten() for name in node.input[1:5])]


def state(network: bytes, preprocessing: bytes, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights by torchvision's names from the two ONNX graphs, the first layer computed in ``precision``.

    The original takes BGR in 0 … 255 less a mean image. With W and m, its mean over positions, for RGB, and pixels
    255 (std x + mean): W (255 (std x + mean) - m) = (W 255 std) x + W (255 mean - m). The last term is constant; the
    mean of bn1 takes it up.
    """
    weights = list(layers(load_model_from_string(network).graph))
    # Shortcuts alone are 1 x 1. All others are one chain, each computed from the one before: nodes keep its order.
    chain, shortcuts = ([layer for layer in weights if (layer[0].shape[-1] == 1) is flag] for flag in (False, True))
    if (len(chain), len(shortcuts)) != (len(CHAIN), len(SHORTCUTS)):
        raise ValueError(f"a ResNet [2, 2, 2, 3] has 19 + 3 (1 x 1) convolutions, not {len(chain)} + {len(shortcuts)}")
    tensors = {}
    for (conv, bn), (weight, scale, bias, mean, variance) in zip(CHAIN + SHORTCUTS, chain + shortcuts, strict=True):
        tensors |= {f"{conv}.weight": weight, f"{bn}.weight": scale, f"{bn}.bias": bias}
        tensors |= {f"{bn}.running_mean": mean, f"{bn}.running_var": variance}
        tensors |= {f"{bn}.num_batches_tracked": torch.tensor(0)}

    image = max(map(to_array, load_model_from_string(preprocessing).graph.initializer), key=np.size)
    m = torch.tensor(image).to(precision).reshape(3, -1).mean(1)[[2, 1, 0], None, None]
    mean, std = (torch.tensor(values, dtype=precision).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    conv1 = tensors["conv1.weight"].to(precision)[:, [2, 1, 0]] * (255 * std)
    constant = (conv1 * (255 * mean - m) / (255 * std)).sum((1, 2, 3))
    tensors |= {"conv1.weight": conv1, "bn1.running_mean": tensors["bn1.running_mean"] - constant}
    dtype = {4: torch.float16, 1: torch.float32, 0: torch.int64}  # by dimensions: convolutions, normalisation, counts
    return {name: tensor.to(dtype[tensor.ndim]) for name, tensor in tensors.items()}


def serialised(tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file with its metadata in the order given, which `save` leaves to chance."""
    content = save(tensors, METADATA)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": METADATA}
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + content[end:]


def main(package: str, file: str = str(paths.DATA / "resnet-2-2-2-3-imagenet" / "weights.safetensors")) -> None:
    """Convert ``package`` into ``file``."""
    graphs = contents(Path(package))
    for precision in (torch.float32, torch.float64):  # what rounded the known formula is not known: the hash tells
        content = serialised(state(*graphs, precision))
        made = hashlib.sha256(content).hexdigest()
        if made == SHA256:
            break
    with replacing(Path(file)) as temporary:
        temporary.write_bytes(content)
    print(made)
    if made != SHA256:
        print(f"the file differs from the weights used here, whose SHA-256 is {SHA256}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
