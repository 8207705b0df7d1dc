"""The trainable ProtoPNet and its passes over a data set."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...data import Dataset
from ...hardware import exact
from ...method.explainers import ProtoPNet
from ...networks import Network, for_training
from .options import Options


class TrainableProtoPNet(nn.Module):
    """Features (a network's encoder; its head is not used), add-on, prototypes, last layer.

    ``labels`` [K] are the prototypes' classes; after a push, ``image`` (index into the training split) and ``position``
    (row-major among the patches of its grid) [K] say which patch each prototype is, before it they are -1.
    """

    labels: Tensor
    image: Tensor
    position: Tensor

    def __init__(self, network: Network, prototypes_per_class: int, options: Options, seed: int = 0) -> None:
        super().__init__()
        if prototypes_per_class < 1:
            raise ValueError(f"prototypes per class (K/C) must be at least 1, got {prototypes_per_class}")
        classes = len(network.classes)
        count = classes * prototypes_per_class
        self.network = network
        self.epsilon = options.epsilon
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = nn.Conv2d(network.classifier.weight.shape[1], options.depth, 1)
            second = nn.Conv2d(options.depth, options.depth, 1)
            for layer in (first, second):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.get_parameter("bias"))
            self.add_on = nn.Sequential(first, nn.ReLU(), second, nn.Sigmoid())
            self.prototypes = nn.Parameter(torch.rand(count, options.depth, options.size, options.size))
            self.last = nn.Linear(count, classes, bias=False)
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(prototypes_per_class))
        self.register_buffer("image", torch.full((count,), -1))
        self.register_buffer("position", torch.full((count,), -1))
        with torch.no_grad():
            self.last.weight.copy_(torch.where(self.of_class, 1.0, options.wrong_class))

    @property
    def of_class(self) -> Tensor:
        """Whether prototype k is of class j, [C, K]."""
        return torch.arange(self.last.out_features, device=self.labels.device)[:, None] == self.labels

    @property
    def explainer(self) -> ProtoPNet:
        """h, sim and proj with the present weights."""
        return ProtoPNet(self.add_on, self.prototypes, self.last.weight, self.epsilon)

    def features(self, x: Tensor) -> Tensor:
        """x(B) of images, [N, D, H, W]."""
        return self.network.encode(x)

    def smallest(self, latent: Tensor) -> Tensor:
        """The squared distance from each prototype to its nearest patch, [N, K]; ``latent`` [N, D', H, W]."""
        explainer = self.explainer
        return explainer.squared_distances(explainer.patches(latent)).min(1).values

    def scores(self, smallest: Tensor) -> Tensor:
        """Class scores y [N, C]: the similarity falls with the distance, so its maximum is at the smallest."""
        return self.last(self.explainer.log_similarity(smallest))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images, [N, C]."""
        return self.scores(self.smallest(self.add_on(self.features(x))))


@torch.no_grad()
def features(network: TrainableProtoPNet, dataset: Dataset, split: str) -> Iterator[Tensor]:
    """x(B) of a split in order, in batches [n, D, H, W], in evaluation mode and float32."""
    network.eval()
    batches, images = dataset.batches(split, 128, network.prototypes.device), len(dataset.split(split))
    for x, _ in tqdm(batches, f"features of {split}", -(-images // 128), leave=False):
        yield network.features(x)


@torch.no_grad()
def latents(network: TrainableProtoPNet, dataset: Dataset, split: str) -> Iterator[Tensor]:
    """The add-on's output for the same, [n, D', H, W]."""
    for x in features(network, dataset, split):
        yield network.add_on(x)


@exact()
@torch.no_grad()
def evaluate(network: TrainableProtoPNet, dataset: Dataset, split: str) -> tuple[Tensor, Tensor]:
    """Predictions [N], and patches h of every image, [N, R, D' s s], on the CPU."""
    predicted, h = [], []
    for latent in latents(network, dataset, split):
        predicted.append(network.scores(network.smallest(latent)).argmax(1).cpu())
        h.append(network.explainer.patches(latent).cpu())
    return torch.cat(predicted), torch.cat(h)


def start(
    trained: Network, features_from: str, prototypes_per_class: int, options: Options, seed: int
) -> TrainableProtoPNet:
    """A fresh one; its features start from ``imagenet`` weights (the authors), a file's or the ``trained`` ``network``.

    A ValueError or FileNotFoundError where there are no such weights.
    """
    if features_from in ("", "scratch", "random"):
        raise ValueError(f"features_from must be 'imagenet', 'network' or a file with weights, got {features_from!r}")
    if features_from != "network":
        if trained.reference is None:
            raise ValueError(f"{trained.name} is of no library that makes it again: give features_from 'network'")
        arch, arguments = trained.reference["arch"], trained.reference["arch_args"]
        trained = for_training(arch, trained.classes, features_from, trained.input, arch_args=arguments)
    return TrainableProtoPNet(trained, prototypes_per_class, options, seed)


def load(network: Network, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> TrainableProtoPNet:
    """A trained one, frozen, on the CPU: ``network`` gives the form, ``weights`` all of its state.

    ``settings`` have the ``prototypes_per_class`` and ``options`` (as plain data) it was trained with.
    """
    learned = TrainableProtoPNet(network, settings["prototypes_per_class"], Options(**settings["options"]))
    learned.load_state_dict(weights)
    return learned.eval().requires_grad_(False)
