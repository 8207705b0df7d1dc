"""Make the prototypes in data/birds: `python data/make_birds.py`.

The ResNet [2, 2, 2, 3] with ImageNet weights (make_resnet_weights.py makes the file), frozen; a linear probe on 23
species of CUB-200 as whole images (below data/, as notebook 1 finds or downloads it); B4, B34 and B234 with equal
weights, K/C = 10. Saved small: whoever has the weights explains photographs of birds without any training,

    kmex show data/birds photo.jpg --weights data/resnet-2-2-2-3-imagenet/weights.safetensors --overlay
"""

import shutil

from kmex_utils import data, networks, paths
from kmex_utils.explanation.activations import embed
from kmex_utils.explanation.fit import explain
from kmex_utils.training.probe import fit_probe

WEIGHTS = paths.ROOT / "data" / "resnet-2-2-2-3-imagenet" / "weights.safetensors"
SPECIES = (
    *(f"{name}_Warbler" for name in (
        "Bay_breasted", "Black_and_white", "Black_throated_Blue", "Blue_winged", "Canada", "Cape_May", "Cerulean",
        "Chestnut_sided", "Golden_winged", "Hooded", "Kentucky", "Magnolia", "Mourning", "Myrtle", "Nashville",
        "Orange_crowned", "Palm",
    )),
    *(f"{name}_Woodpecker" for name in (
        "American_Three_toed", "Pileated", "Red_bellied", "Red_cockaded", "Red_headed", "Downy",
    )),
)  # fmt: skip
CHANNELS = {"layers": [2, 2, 2, 3]}


def main() -> None:
    """Fit and save."""
    birds = data.load("cub200", crop=False, classes=SPECIES)
    network = networks.for_training("timm/resnet18", birds.classes, str(WEIGHTS), birds.input, arch_args=CHANNELS)
    fit_probe(network, embed(network, birds, "train"), birds.train.labels)
    explained = explain(network, birds, prototypes_per_class=10)
    folder = paths.ROOT / "data" / "birds"
    shutil.rmtree(folder, ignore_errors=True)
    explained.save(folder, small=True)
    print(explained.table)


if __name__ == "__main__":
    main()
