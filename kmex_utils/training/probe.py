"""A linear probe: of a frozen network only the head is fitted, to its optimum."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks import Network
from .loop import Record

PASSES = 500  # of L-BFGS at most: 2,500 embeddings of 512 dimensions and 23 classes took 60


def fit_probe(network: Network, z: Tensor, labels: Tensor, penalty: float = 1.0) -> list[Record]:
    """Fit the head on embeddings z [N, D] of the training images by multinomial logistic regression.

    The sum of the cross-entropies and half the ``penalty`` times the squared columns is least, scikit-learn's
    ``LogisticRegression(C=1 / penalty)``. Returns one record, as a training of one epoch does.
    """
    start = time.perf_counter()
    head = network.classifier
    weight = torch.zeros(head.weight.shape, dtype=torch.float64, requires_grad=True)
    bias = None if head.bias is None else torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    z, labels = z.double(), labels.long()
    parameters = [weight] if bias is None else [weight, bias]
    options = {"tolerance_grad": 1e-6 * len(z), "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(parameters, max_iter=PASSES, **options)  # type: ignore[arg-type]

    def loss() -> Tensor:
        optimizer.zero_grad()
        y = F.linear(z, weight.flatten(1), bias)
        total = F.cross_entropy(y, labels, reduction="sum") + penalty / 2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.get_parameter("bias").copy_(bias)
        y = F.linear(z, weight.flatten(1), bias)
    accuracy = 100 * (y.argmax(1) == labels).double().mean().item()
    record = {"epoch": 1, "loss": F.cross_entropy(y, labels).item(), "accuracy": accuracy, "learning_rate": 0.0}
    return [{**record, "seconds": time.perf_counter() - start}]
