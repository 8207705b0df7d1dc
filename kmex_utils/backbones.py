"""The network of eq. 1, 2 and 6: blocks f_1 … f_B, average pool, linear classifier."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn


class Backbone(nn.Module):
    """x -> enc -> h -> avg.pool -> z -> clf -> y.

    Parameters
    ----------
    blocks
        f_1 … f_B; block b maps x(b-1) to x(b) [N, D_b, H_b, W_b].
    classifier
        The linear layer [D_B -> C]; its weight's rows are the paper's columns c_j. Eq. 2 omits the bias "without loss
        of generality"; one may be there, see :class:`~kmex_utils.explainers.CNNAsSEM`.
    """

    def __init__(self, blocks: Sequence[nn.Module], classifier: nn.Linear) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"the head is a {type(classifier).__name__}, not one linear layer: Theorem 1 holds for "
                "average pool + linear only"
            )
        self.blocks = nn.ModuleList(blocks)
        self.classifier = classifier

    pooled_linear = True  # y is a linear function of avg.pool(h): Theorem 1 and eq. 11 hold

    @property
    def c(self) -> torch.Tensor:
        """The classifier's columns c_j, [C, D]."""
        return self.classifier.weight

    @property
    def b(self) -> torch.Tensor | None:
        """The classifier's bias, [C], or None."""
        return self.classifier.bias

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x(1) … x(B), each [N, D_b, H_b, W_b]; the last is the encoder's output h."""
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def outputs(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x(1) … x(B) and the prediction y [N, C] of one pass."""
        outputs = self.activations(x)
        return outputs, self.classifier(avg_pool(outputs[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y = clf(avg.pool(enc(x))), [N, C]."""
        return self.outputs(x)[1]


def avg_pool(h: torch.Tensor) -> torch.Tensor:
    """Z of eq. 2: the mean over positions, [N, D, H, W] -> [N, D]."""
    return h.mean((2, 3))


@cache
def resnet_names() -> tuple[str, ...]:
    """Torchvision's ResNets, wide ResNets and ResNeXts."""
    from torchvision import models

    return tuple(name for name in models.list_models(module=models) if "resne" in name)


def resnet(
    arch: str = "resnet34", classes: int = 10, weights: str = "scratch", seed: int = 0, bias: bool = False
) -> Backbone:
    """Any ResNet of torchvision as blocks B1 … B4 with a fresh classifier.

    Parameters
    ----------
    arch
        ``resnet18``, ``resnet34``, ``resnet50``, ``wide_resnet50_2``, ``resnext50_32x4d`` …
    weights
        ``imagenet`` (torchvision's IMAGENET1K_V1, downloaded on first use) or ``scratch``.
    seed
        Of the random initialisation; the caller's random state is left as it was.
    bias
        Give the classifier one; eq. 2 has none.

    Raises
    ------
    ValueError, ConnectionError
        Unknown name; or the weights cannot be had, with the file to put in place.
    """
    from torchvision.models import get_model

    if arch not in resnet_names():
        raise ValueError(f"unknown arch {arch!r}: use one of {', '.join(resnet_names())}")
    if weights not in ("imagenet", "scratch"):
        raise ValueError(f"weights must be 'imagenet' or 'scratch', got {weights!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = get_model(arch, weights=None)
        classifier = nn.Linear(network.fc.in_features, classes, bias=bias)
    if weights == "imagenet":
        network.load_state_dict(imagenet_weights(arch))
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    blocks = [nn.Sequential(*stem, network.layer1), network.layer2, network.layer3, network.layer4]
    return Backbone(blocks, classifier).to(memory_format=torch.channels_last)


def weights_entry(arch: str):
    """Torchvision's entry of a network's IMAGENET1K_V1 weights; of its default ones where there is no V1."""
    from torchvision.models import get_model_weights

    known = get_model_weights(arch)
    return known.__members__.get("IMAGENET1K_V1") or known.DEFAULT


def imagenet_weights(arch: str) -> dict[str, torch.Tensor]:
    """The state dict of :func:`weights_entry`; one line names the file to put in place without a network."""
    weights = weights_entry(arch)
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ConnectionError(
            f"ImageNet weights of {arch} cannot be downloaded ({error}); put {weights.url} at {file}, "
            "or train from scratch with weights='scratch'"
        ) from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is damaged ({reason}); delete it and run again") from None
