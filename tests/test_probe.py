"""The linear probe against scikit-learn's logistic regression."""

import pytest
import torch
from torch import nn

from kmex_utils.data import Input
from kmex_utils.networks import Network
from kmex_utils.training.probe import fit_probe


def network(bias):
    body = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = nn.Sequential(*body, nn.Linear(12, 4, bias=bias))
    return Network(module, input=Input(16, (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("penalty", [1.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_optimum_of_logistic_regression(bias, penalty):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is an optional extra")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    z = torch.randn(200, 12, generator=generator) + 0.7 * torch.eye(12)[labels]
    made = network(bias)
    encoder = {name: value.clone() for name, value in made.module.state_dict().items() if not name.startswith("4.")}
    (record,) = fit_probe(made, z, labels, penalty)
    theirs = linear_model.LogisticRegression(C=1 / penalty, fit_intercept=bias, tol=1e-10, max_iter=10_000)
    theirs.fit(z.double().numpy(), labels.numpy())
    assert torch.allclose(made.c.double(), torch.from_numpy(theirs.coef_), atol=2e-4)
    if bias:
        # the intercepts are known up to what they have in common
        ours, expected = made.b.double(), torch.from_numpy(theirs.intercept_)
        assert torch.allclose(ours - ours.mean(), expected - expected.mean(), atol=2e-4)
    assert record["accuracy"] == pytest.approx(100 * theirs.score(z.numpy(), labels.numpy()))
    assert all(torch.equal(made.module.state_dict()[name], value) for name, value in encoder.items())
