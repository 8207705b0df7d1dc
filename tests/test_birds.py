"""The prototypes that come with the repository."""

import pytest
import torch
from safetensors.torch import save_file

import kmex_utils as kmex
from kmex_utils import paths

BIRDS = paths.ROOT / "data" / "birds"
WEIGHTS = paths.ROOT / "data" / "resnet-2-2-2-3-imagenet" / "weights.safetensors"


def test_other_weights_are_refused_in_one_line(tmp_path):
    import timm

    torch.manual_seed(0)
    module = timm.create_model("resnet18", layers=[2, 2, 2, 3], num_classes=0)
    save_file(module.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights") as refused:
        kmex.load(BIRDS, weights=tmp_path / "other.safetensors")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="weights"):
        kmex.load(BIRDS)


def test_no_path_of_a_machine_is_in_it():
    for file in BIRDS.glob("*.json"):
        assert not any(f'"{place}' in file.read_text() for place in ("/home", "/tmp", "/root", "/work", "/Users"))
    assert sum(file.stat().st_size for file in BIRDS.iterdir()) < 3e6


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the network's weights are not here: data/make_resnet_weights.py")
def test_with_its_weights_it_explains(tmp_path):
    explained = kmex.load(BIRDS, weights=WEIGHTS)
    grey = torch.full((3, 224, 224), 0.5)
    parts = explained.interpretations(grey, [4, 3, 2])
    assert [part.map.shape for part in parts] == [(7, 7), (14, 14), (28, 28)]
    assert len(explained.explainers[2].prototypes) == 230
    y = explained.network.outputs(explained.network.input(explained.picture(grey).pixels[None]))[1]
    assert parts[0].total == pytest.approx(y.max().item(), rel=1e-4), "the probe has no bias"
