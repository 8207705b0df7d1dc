"""A small network explained on real photographs: what several test modules look at.

A test module takes them in with ``pytest_plugins = ("tests.fixtures_explained",)``.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import kmex_utils as kmex

SIZE = 64


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Real photographs cut into pieces: two classes."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for i, (row, column) in enumerate(np.ndindex(3, 4)):
            part = photo[140 * row : 140 * row + 140, 160 * column : 160 * column + 160]
            Image.fromarray(part).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def resnet():
    """A module of one's own."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return kmex.network(resnet18(num_classes=2), classes=["flower", "temple"], image_size=SIZE)


@pytest.fixture(scope="session")
def said():
    """What :func:`kmex.explain` said while it made ``explained``."""
    return []


@pytest.fixture(scope="session")
def explained(resnet, photos, said):
    options = {"prototypes_per_class": 3, "held_out": 0.25, "restarts": 2, "device": "cpu", "log": said.append}
    return kmex.explain(resnet, photos, **options)
