"""Prototypes from a part of the images: those of an explanation of that part alone."""

from dataclasses import replace

import pytest
import torch

import kmex_utils as kmex
from kmex_utils.data.dataset import Images
from kmex_utils.evaluation.measured import measured
from kmex_utils.explanation.passed import Passed

pytest_plugins = ("tests.fixtures_explained",)
HOW = {"prototypes_per_class": 2, "held_out": 0.25, "restarts": 1, "device": "cpu", "log": str, "seed": 3}


@pytest.fixture(scope="module")
def part(resnet, photos):
    return kmex.explain(resnet, photos, fit_on=4, **HOW)


def test_the_prototypes_are_those_of_the_drawn_images_alone(part, resnet):
    whole = part.dataset
    drawn = Passed.of(resnet, whole, 4).some_of_each_class(4, 3)
    assert whole.train.labels[drawn].bincount().tolist() == [4, 4] and len(drawn.unique()) == 8
    images = whole.train
    few = Images(images.pixels[drawn.numpy()], images.labels[drawn], tuple(images.names[i] for i in drawn))
    alone = kmex.explain(resnet, replace(whole, train=few), **HOW)
    for b in (4, 3, 2):
        ours, theirs = part.explainers[b].prototypes, alone.explainers[b].prototypes
        torch.testing.assert_close(ours.vectors, theirs.vectors)
        assert torch.equal(ours.image, drawn[theirs.image])
    torch.testing.assert_close(part.kmex[2].prototypes.vectors, alone.kmex[2].prototypes.vectors)


def test_each_refit_draws_its_own_images(part, resnet):
    kept = measured(part, images=2, steps=2, refits=2, device="cpu")["certainty"].set_index(["explainer", "measure"])
    passed = Passed.of(resnet, part.dataset, 4)
    explainer, same = part.explainers[4], []
    for seed in (4, 5):
        index = passed.some_of_each_class(4, seed)
        refit = passed.fit_encoder(4, explainer.normalisation, 2, index=index, seed=seed, restarts=1)
        maps = passed.map(explainer, "test"), passed.map(refit, "test")
        swaps = [torch.tensor(order) for order in ([0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2], [1, 0, 3, 2])]
        distances = [(refit.prototypes.vectors[s] - explainer.prototypes.vectors).norm(dim=1).sum() for s in swaps]
        order = swaps[int(torch.stack(distances).argmin())]
        same.append((order.argsort()[maps[1]] == maps[0]).double().mean())
    assert kept.value["B4", "prototype"] == pytest.approx(torch.stack(same).mean().item())


@pytest.mark.parametrize(
    ("fit_on", "line"),
    [
        (1, "fit_on must be 0 or at least K/C = 2, got 1"),
        (-1, "fit_on must be a whole number of at least 0, got -1"),
    ],
)
def test_fewer_than_prototypes_are_refused(resnet, photos, fit_on, line):
    with pytest.raises(ValueError, match=line):
        kmex.explain(resnet, photos, fit_on=fit_on, **HOW)
