"""Eq. 3, 5, 9, 10, 11, Theorem 1 and the attribution recursion, each against loops."""

import pytest
import torch
import torch.nn.functional as F
from conftest import blocks_of

from kmex_utils import networks
from kmex_utils.data import own_input
from kmex_utils.method import products
from kmex_utils.method.attribution import attribution, carried, chance, contributions, segment_mean, upsample
from kmex_utils.method.composite import GRIDS, PRINTED, Normalisation, composite
from kmex_utils.method.explainers import CNNAsSEM, EncoderKMeans, KMEx, avg_pool, block_name, block_names
from kmex_utils.method.prototypes import Prototypes


def prototypes(vectors, labels):
    zeros = torch.zeros(len(vectors), dtype=torch.int64)
    return Prototypes(vectors, torch.tensor(labels), zeros, zeros, zeros, torch.zeros(1))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_theorem_1(arch):
    network = networks.for_training(arch, tuple("abcdefg"), "scratch", own_input("mnist"), seed=1).eval()
    for size in ((64, 64), (75, 50)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            activations, y = network.outputs(x)
            sem = CNNAsSEM(network.c)(activations)
        torch.testing.assert_close(sem, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
        assert y.std() > 0


def test_cnn_as_sem_by_position():
    h = torch.randn(2, 5, 3, 4)
    c = torch.randn(6, 5)
    y = CNNAsSEM(c)([h])
    for n in range(2):
        for j in range(6):
            scores = [h[n, :, i, k] @ c[j] for i in range(3) for k in range(4)]
            assert y[n, j].item() == pytest.approx(torch.stack(scores).mean().item(), abs=1e-5)


def test_kmex_is_the_nearest_prototype():
    generator = torch.Generator().manual_seed(0)
    p = prototypes(torch.randn(6, 5, generator=generator), [0, 0, 1, 1, 2, 2])
    h = torch.randn(9, 5, 2, 2, generator=generator)
    kmex = KMEx(p, 3)
    z = avg_pool(h)
    similarity = kmex.sim(kmex.h([h]))
    for n in range(9):
        distance = torch.stack([(z[n] - vector).square().sum().sqrt() for vector in p.vectors])
        torch.testing.assert_close(similarity[n].float(), torch.exp(-distance))
        expected = torch.zeros(3)
        expected[p.labels[distance.argmin()]] = 1
        assert kmex([h])[n].tolist() == expected.tolist()


def test_kmex_far_from_its_prototypes():
    """Where exp(-d) underflows, in float32 at 104 and in float64 at 745, the closest prototype still wins."""
    for far in (200.0, 2000.0):
        kmex = KMEx(prototypes(torch.tensor([[3 * far, 0], [far, 0], [2 * far, 0]]), [0, 1, 2]), 3)
        z = torch.tensor([[0.0, 0.0], [3.5 * far, 0.0]])
        assert kmex.nearest(z).tolist() == [1, 0] and kmex.predict(z).tolist() == [1, 0]
        assert kmex([z[:, :, None, None]]).argmax(1).tolist() == [1, 0]
        if far < 745:
            assert kmex.proj(kmex.sim(z)).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("start_block", [1, 2, 3])
def test_encoder_is_eq_9_and_10(start_block):
    blocks = blocks_of(n=4, seed=3)
    used = blocks[start_block - 1 :]
    normalisation = Normalisation(scale="1/sqrt(D)")
    q = composite(used, normalisation)
    p = prototypes(q.flatten(0, 1)[torch.tensor([0, 2, 1, 0])] + 0.01, [0, 0, 1, 1])
    explainer = EncoderKMeans(p, 2, start_block, normalisation)
    q_s = explainer.sim(explainer.h(blocks))
    y = explainer.proj(q_s)
    height, width = used[0].shape[2:]
    assert q_s.shape == (4, height, width)
    for n in range(4):
        one_hot = torch.zeros(height * width, 4)
        for r in range(height * width):
            distance = torch.stack([(q[n, r] - vector).norm() for vector in p.vectors])
            k = q_s[n].flatten()[r]
            assert distance[k] <= distance.min() + 1e-5
            one_hot[r, k] = 1
        counts = one_hot.sum(0)
        expected = torch.nn.functional.avg_pool1d(counts[None, None], 2)[0, 0]
        torch.testing.assert_close(y[n], expected)


@pytest.mark.parametrize("at_a_time", [1, 7, 16, 40])
def test_prototypes_compared_in_parts(at_a_time, generator, monkeypatch):
    monkeypatch.setattr(products, "MAP_PROTOTYPES", at_a_time)
    blocks = blocks_of(n=4, seed=3)
    q = composite(blocks, Normalisation()).flatten(0, 1)
    p = prototypes(q[torch.randperm(len(q), generator=generator)[:40]] + 0.001, [0] * 20 + [1] * 20)
    explainer = EncoderKMeans(p, 2, 1, Normalisation())
    distance = torch.cdist(q.double(), p.vectors.double())
    chosen = distance.gather(1, explainer.sim(explainer.h(blocks)).flatten()[:, None])
    torch.testing.assert_close(chosen[:, 0], distance.amin(1), rtol=1e-5, atol=1e-8)


def test_ties_go_to_the_lowest_index():
    blocks = blocks_of(n=1)[:1]
    p = prototypes(torch.ones(4, 4), [0, 0, 1, 1])
    explainer = EncoderKMeans(p, 2, 1, Normalisation())
    assert explainer.sim(explainer.h(blocks)).unique().tolist() == [0]


def test_two_readings_of_the_prediction_can_differ():
    p = prototypes(torch.eye(4), [0, 0, 1, 1])
    explainer = EncoderKMeans(p, 2, 1, Normalisation())
    q_s = torch.tensor([[[0, 0, 0, 0, 2, 2, 2, 3, 3]]])  # prototype 0 leads, class 1 has more positions
    assert explainer.proj(q_s).argmax(1).tolist() == [1]
    assert explainer.most_frequent(q_s).tolist() == [0]


def test_eq_11():
    h, c = torch.randn(2, 5, 3, 4), torch.randn(2, 5)
    att = attribution(h, c)
    for n in range(2):
        for i in range(3):
            for j in range(4):
                expected = (h[n, :, i, j] @ c[n] / (c[n] @ c[n])).item()
                assert att[n, i, j].item() == pytest.approx(expected, abs=1e-5)
    of_itself = attribution(c[:, :, None, None].expand(-1, -1, 2, 2), c)
    torch.testing.assert_close(of_itself, torch.ones(2, 2, 2))


def test_segment_mean_by_definition():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, 5, generator=generator)
    segments = torch.randint(4, (3, 4, 5), generator=generator) * 7
    mean = segment_mean(values, segments)
    for n in range(3):
        for i in range(4):
            for j in range(5):
                expected = values[n][segments[n] == segments[n, i, j]].mean()
                torch.testing.assert_close(mean[n, i, j], expected)


def explainers_for(blocks, normalisation=PRINTED):
    generator = torch.Generator().manual_seed(1)
    explainers = {}
    for b in (1, 2, 3):
        q = composite(blocks[b - 1 :], normalisation).flatten(0, 1)
        vectors = q[torch.randint(len(q), (6,), generator=generator)]
        explainers[b] = EncoderKMeans(prototypes(vectors, [0, 0, 1, 1, 2, 2]), 3, b, normalisation)
    return explainers


def maps_of(blocks, explainers):
    return {b: explainer.sim(explainer.h(blocks)) for b, explainer in explainers.items()}


@pytest.mark.parametrize("start", ["segments", "raw"])
def test_attribution_recursion(start):
    blocks = blocks_of(n=2, sizes=((8, 8), (4, 4), (2, 2)))
    explainers = explainers_for(blocks)
    c = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([2, 0])
    segments = maps_of(blocks, explainers)
    att = attribution(blocks[-1], c[target])
    maps = carried(att, segments, start=start)
    expected = {3: att if start == "raw" else segment_mean(att, segments[3])}
    for b in (2, 1):
        size = blocks[b - 1].shape[2:]
        up = torch.nn.functional.interpolate(expected[b + 1][:, None], size, mode="bilinear")[:, 0]
        expected[b] = segment_mean(up, segments[b])
    assert maps.keys() == expected.keys()
    for b, att in maps.items():
        torch.testing.assert_close(att, expected[b])
        assert len(att[0].unique()) <= len(segments[b][0].unique()) or start == "raw"


@pytest.mark.parametrize("grid", GRIDS)
def test_attribution_has_the_grid_of_the_map(grid):
    blocks = blocks_of(n=2, sizes=((8, 8), (4, 4), (2, 2)))
    explainers = explainers_for(blocks, Normalisation(grid=grid))
    maps = maps_of(blocks, explainers)
    by_block = carried(attribution(blocks[-1], torch.randn(2, 8)), maps)
    assert {b: att.shape for b, att in by_block.items()} == {b: q_s.shape for b, q_s in maps.items()}


def test_segment_means_keep_the_image_mean():
    """Averaging over segments moves attribution around but creates none."""
    values, segments = torch.randn(2, 6, 6), torch.randint(5, (2, 6, 6))
    torch.testing.assert_close(segment_mean(values, segments).mean((1, 2)), values.mean((1, 2)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 7), (5, 13)])
def test_contributions_add_up_to_the_score(size, align_corners):
    """By position with a dense A, w = Aᵀ 1_segment / Aᵀ 1, on whole ratios and others; an identity, to rounding."""
    generator = torch.Generator().manual_seed(0)
    h, c = torch.randn(2, 6, 4, 4, generator=generator).double(), torch.randn(2, 6, generator=generator).double()
    q_s = torch.randint(5, (2, *size), generator=generator)
    dots = torch.einsum("ndhw,nd->nhw", h, c)
    ours = contributions(dots, q_s, 7, align_corners)
    one_hot = torch.eye(16).double().view(16, 1, 4, 4)
    a = F.interpolate(one_hot, size, mode="bilinear", align_corners=align_corners).view(16, -1).T
    for n in range(2):
        for k in range(7):
            w = a.T @ (q_s[n] == k).flatten().double() / a.T.sum(1)
            expected = sum(w[r] * (h[n].flatten(1)[:, r] @ c[n]) for r in range(16)) / 16
            assert ours[n, k].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
        assert ours[n].sum().item() == pytest.approx((avg_pool(h)[n] @ c[n]).item(), rel=1e-6)
    assert (ours[:, 5:] == 0).all(), "prototypes that are not in the map"


def test_a_random_column_reaches_the_floor_of_the_scale():
    """10,000 columns of one length, drawn in all directions."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 32, 3, 3, generator=generator).relu() * 5
    c = F.normalize(torch.randn(10_000, 32, generator=generator)) * 0.7
    drawn = attribution(h.expand(10_000, -1, -1, -1), c).square().mean().sqrt()
    assert chance(h, c[:1]).item() == pytest.approx(drawn.item(), rel=0.02)


def test_attribution_without_the_deeper_prototypes_is_refused():
    blocks = blocks_of()
    maps, att = maps_of(blocks, explainers_for(blocks)), attribution(blocks[-1], torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"also needs the prototypes from block\(s\) \[2\]"):
        carried(att, {1: maps[1], 3: maps[3]})
    with pytest.raises(ValueError, match="segments"):
        carried(att, maps, start="cam")


def test_upsample_keeps_a_constant():
    assert torch.equal(upsample(torch.full((1, 2, 3), 4.0), (6, 7)), torch.full((1, 6, 7), 4.0))


def test_names():
    assert [block_name(b) for b in (4, 3, 2, 1)] == ["B4", "B34", "B234", "B1234"]
    with pytest.raises(ValueError, match="start blocks run from 1 to 4"):
        block_name(5)
    assert list(block_names([2, 5], 5, last=True).items()) == [(5, "B5"), (2, "B2345")]
    with pytest.raises(ValueError, match="start blocks run from 1 to 4"):
        block_names([4, 5])
    with pytest.raises(ValueError, match="must differ"):
        block_names([4, 4])
    with pytest.raises(ValueError, match="must hold 4"):
        block_names([3, 2], last=True)
