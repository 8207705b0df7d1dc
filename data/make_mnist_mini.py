"""Draw the embedded digits from the official MNIST files: `python data/make_mnist_mini.py [FOLDER]`.

FOLDER (default: this one) holds, or receives by download, torchvision's MNIST/raw. Per class 250 training and
150 test digits of the official splits, drawn with a fixed seed and kept in the official order; each digit's
position in the official file is kept beside it. Prints the SHA-256 that `kmex_utils.datasets` checks.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

from kmex_utils import paths
from kmex_utils.store import replacing

PER_CLASS = {"train": 250, "test": 150}

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else paths.DATA
generator = np.random.default_rng(0)
arrays = {}
for split, count in PER_CLASS.items():
    official = MNIST(folder, train=split == "train", download=True)
    labels = official.targets.numpy()
    drawn = [generator.choice(np.flatnonzero(labels == c), count, replace=False) for c in range(10)]
    index = np.sort(np.concatenate(drawn))
    arrays[f"{split}_images"] = official.data.numpy()[index]
    arrays[f"{split}_labels"] = labels[index].astype(np.uint8)
    arrays[f"{split}_index"] = index.astype(np.int32)
with replacing(paths.MNIST_MINI) as temporary:
    np.savez_compressed(temporary, **arrays)
print(hashlib.sha256(paths.MNIST_MINI.read_bytes()).hexdigest())
