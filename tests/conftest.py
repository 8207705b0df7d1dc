import gc
import os
import urllib.request
from collections import Counter

os.environ.setdefault("TQDM_DISABLE", "1")

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kmex_utils import data, networks, paths

NOTEBOOKS = paths.ROOT / "notebooks"

torch.set_num_threads(1)
gc.set_threshold(10_000, 20, 10)  # a tenth of the time would go into looking for garbage among torch's modules


FIRST = ("test_hardening", "test_cluster", "test_batch", "test_site")  # minutes, of few tests


def pytest_collection_modifyitems(items):
    """These files first, then those with most tests: else one of two workers ends alone with what takes minutes."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem not in FIRST, -count[item.path]))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """36 training digits of three classes, 32 px."""
    return data.load("mnist-mini", small(), images_per_class=12, classes="0,1,2")


@pytest.fixture(scope="session")
def network(digits):
    """A frozen network for them, of random weights."""
    return untrained(digits)


def untrained(images, seed=0):
    """A frozen ResNet18 for the classes of some images, of random weights."""
    trainable = networks.for_training("resnet18", images.classes, "scratch", images.input, seed=seed)
    return trainable.eval().requires_grad_(False)


def small(image_size=32):
    """The input of the embedded digits, smaller than notebook 1 trains them."""
    return replace(data.own_input("mnist-mini"), image_size=image_size)


def blocks_of(n=3, sizes=((6, 5), (3, 3), (2, 1)), channels=(4, 6, 8), seed=0):
    """Block outputs like a ResNet's: non-negative, some of it zero."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, *size, generator=generator).relu() for d, size in zip(channels, sizes, strict=True)]


@pytest.fixture
def no_network(monkeypatch):
    """Downloads go to a proxy that refuses, on machines with a network too."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    urllib.request.install_opener(None)
    yield
    urllib.request.install_opener(None)


@pytest.fixture
def folder(tmp_path):
    """Own images: two classes that differ in colour, of different sizes."""
    generator = np.random.default_rng(0)
    root = tmp_path / "birds"
    for split, count in (("train", 6), ("test", 3)):
        for name, colour in (("red", (200, 30, 30)), ("blue bird", (30, 30, 200))):
            directory = root / split / name
            directory.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(colour, 20, (40 + i, 50, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(directory / f"{i}.png")
    return root
