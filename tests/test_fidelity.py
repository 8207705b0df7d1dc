"""Fidelity to parts, against scikit-learn, naive loops and maps with known answers."""

import pytest
import torch

from kmex_utils.data.annotations import Parts
from kmex_utils.evaluation import fidelity as f
from kmex_utils.method.composite import Normalisation, composite
from kmex_utils.method.explainers import EncoderKMeans
from kmex_utils.method.operator import CompositeRows
from kmex_utils.method.prototypes import Prototypes

NAMES = ("beak", "left wing", "right wing", "tail")


def some_parts(images=40, seed=0, names=NAMES):
    """Each part is visible in about two images of three, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    image, part = (torch.rand(images, len(names), generator=generator) < 0.67).nonzero().T
    y, x = torch.rand(2, len(image), generator=generator, dtype=torch.float64)
    return Parts(names, images, image, part, y, x)


def the_parts_themselves(parts, grid):
    """A map whose prototype p is part p where it lies, and another elsewhere; parts must not share a cell."""
    maps = torch.full((parts.images, grid[0] * grid[1]), len(parts.names))
    maps[parts.image, parts.cells(grid)] = parts.part
    return maps.view(parts.images, *grid)


def random_maps(images, grid, prototypes, seed):
    return torch.randint(prototypes, (images, *grid), generator=torch.Generator().manual_seed(seed))


# --- NMI, ARI and purity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_nmi_and_ari_are_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is an optional extra")
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(5, (300,), generator=generator)
    said = torch.where(torch.rand(300, generator=generator) < 0.5, true, torch.randint(6, (300,), generator=generator))
    table = torch.zeros(5, 6, dtype=torch.int64).index_put_((true, said), torch.ones(300, dtype=torch.int64), True)
    ours = f.agreement(table[None])
    assert ours["nmi"].item() == pytest.approx(metrics.normalized_mutual_info_score(true, said), abs=1e-12)
    assert ours["ari"].item() == pytest.approx(metrics.adjusted_rand_score(true, said), abs=1e-12)
    assert ours["purity"].item() == pytest.approx((true == said).double().mean().item())


def test_one_part_said_of_all_says_nothing():
    """A constant map: no information, and as pure as the most frequent part is frequent."""
    table = torch.tensor([[[50, 0, 0], [30, 0, 0]]])
    ours = f.agreement(table)
    assert ours["nmi"].item() == pytest.approx(0, abs=1e-12) and ours["ari"].item() == pytest.approx(0, abs=1e-12)
    assert ours["purity"].item() == pytest.approx(50 / 80)


def test_a_map_that_equals_the_parts_scores_all():
    grid = (64, 64)  # fine enough that no two parts share a cell
    parts = {"train": some_parts(seed=1), "test": some_parts(seed=2)}
    maps = {split: the_parts_themselves(of, grid) for split, of in parts.items()}
    scores = f.fidelity(maps, parts, len(NAMES) + 1).scores()
    assert [scores[name] for name in f.METRICS] == pytest.approx([100, 100, 100])
    assert scores["raw_nmi"] == pytest.approx(100) and scores["optimistic_purity"] == pytest.approx(100)
    # shuffled, nearly every part falls on the prototype of elsewhere
    assert scores["null_nmi"] < 5 and scores["null_purity"] < 45


def test_scores_against_a_naive_loop():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is an optional extra")
    parts = {"train": some_parts(60, 3), "test": some_parts(50, 4)}
    maps = {"train": random_maps(60, (5, 7), 12, 0), "test": random_maps(50, (5, 7), 12, 1)}

    def pairs(split):
        of = parts[split]
        for i, part, y, x in zip(of.image.tolist(), of.part.tolist(), of.y.tolist(), of.x.tolist(), strict=True):
            yield part, int(maps[split][i, int(y * 5), int(x * 7)])

    seen = {k: [part for part, prototype in pairs("train") if prototype == k] for k in range(12)}
    means = {k: max(range(4), key=lambda p, of=of: of.count(p)) if of else 4 for k, of in seen.items()}
    true, prototypes = zip(*pairs("test"), strict=True)
    said = [means[k] for k in prototypes]
    scores = f.fidelity(maps, parts, 12).scores()
    assert scores["nmi"] == pytest.approx(100 * metrics.normalized_mutual_info_score(true, said))
    assert scores["ari"] == pytest.approx(100 * metrics.adjusted_rand_score(true, said))
    assert scores["purity"] == pytest.approx(100 * sum(a == b for a, b in zip(true, said, strict=True)) / len(true))
    assert scores["raw_nmi"] == pytest.approx(100 * metrics.normalized_mutual_info_score(true, prototypes))
    assert scores["raw_ari"] == pytest.approx(100 * metrics.adjusted_rand_score(true, prototypes))


def test_a_prototype_without_a_training_part_is_wrong():
    one = torch.zeros(1, dtype=torch.int64)
    here = torch.full((1,), 0.1, dtype=torch.float64)
    parts = {split: Parts(("beak", "tail"), 1, one, one, here, here) for split in ("train", "test")}
    maps = {"train": torch.tensor([[[0]]]), "test": torch.tensor([[[1]]])}
    assert f.fidelity(maps, parts, 2).scores()["purity"] == 0
    assert f.fidelity({**maps, "test": maps["train"]}, parts, 2).scores()["purity"] == 100


def test_the_bootstrap_draws_images():
    """Against drawing the images one by one; all parts of an image come together."""
    parts = {"train": some_parts(60, 5), "test": some_parts(50, 6)}
    maps = {"train": random_maps(60, (4, 4), 6, 2), "test": random_maps(50, (4, 4), 6, 3)}
    found = f.fidelity(maps, parts, 6)
    drawn = found.bootstrap(draws=3, seed=7)
    index = torch.randint(50, (3, 50), generator=torch.Generator().manual_seed(7))
    expected = f.agreement(torch.stack([found.tables[i].sum(0) for i in index]))
    for metric in f.METRICS:
        assert torch.allclose(drawn[metric], 100 * expected[metric])
    spread = found.bootstrap(draws=2000)["purity"]
    assert spread.mean().item() == pytest.approx(found.scores()["purity"], abs=0.5)


# --- baselines -------------------------------------------------------------------------------------------------------


def test_the_position_baseline_knows_where_parts_lie():
    """Parts that always lie in the same place are found by it; those that lie anywhere are not."""
    fixed = {}
    for split, images in (("train", 30), ("test", 20)):
        image, part = torch.arange(images).repeat_interleave(4), torch.arange(4).repeat(images)
        place = torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]], dtype=torch.float64)[part]
        fixed[split] = Parts(NAMES, images, image, part, place[:, 0], place[:, 1])
    assert f.agreement(f.position_baseline(fixed).sum(0)[None])["purity"].item() == 1
    anywhere = {"train": some_parts(200, 8), "test": some_parts(200, 9)}
    assert f.agreement(f.position_baseline(anywhere).sum(0)[None])["purity"].item() == pytest.approx(0.25, abs=0.08)


def test_the_ceiling_is_what_shared_cells_leave():
    zero = torch.zeros(3, dtype=torch.int64)
    where = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)
    parts = Parts(("beak", "tail"), 1, zero, torch.tensor([0, 1, 1]), where, where)
    assert f.agreement(f.ceiling(parts, (2, 2)).sum(0)[None])["purity"].item() == pytest.approx(2 / 3)
    assert f.agreement(f.ceiling(parts, (10, 10)).sum(0)[None])["purity"].item() == 1


def test_resampled_maps_take_what_lies_at_the_centre():
    maps = torch.arange(16).view(1, 4, 4)
    assert f.resampled(maps, (2, 2)).tolist() == [[[5, 7], [13, 15]]]
    assert torch.equal(f.resampled(maps, (8, 8)), maps.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(f.resampled(f.resampled(maps, (8, 8)), (4, 4)), maps)


def test_finer_maps_are_the_argmax_of_upsampled_similarities():
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(3, 6, 4, 4, generator=generator, dtype=torch.float64)
    p = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    none = torch.zeros(5, dtype=torch.int64)
    explainer = EncoderKMeans(Prototypes(p, none, none, none, none, torch.zeros(1)), 1, 4, Normalisation(scale="1"))
    rows = CompositeRows([x], explainer.normalisation)
    unit = x / x.norm(dim=1, keepdim=True)
    distance = (unit[:, None] - p[:, :, None, None]).square().sum(2)
    expected = torch.nn.functional.interpolate(distance, (8, 12), mode="bilinear").argmin(1)
    assert (f.finer(explainer, rows, (8, 12)) == expected).double().mean() > 0.99  # but for ties' rounding
    assert torch.equal(f.finer(explainer, rows, (4, 4)), explainer.sim(rows))


def test_a_difference_is_found_where_there_is_one():
    parts = {"train": some_parts(100, 12), "test": some_parts(100, 13)}
    good = {split: the_parts_themselves(of, (64, 64)) for split, of in parts.items()}
    half = {split: torch.where(torch.arange(100)[:, None, None] % 2 == 0, q, 4) for split, q in good.items()}
    best, worse = (f.fidelity(maps, parts, 5) for maps in (good, half))
    value, low, high = f.difference(best, worse, "purity")
    assert low < value < high and low > 0
    assert f.difference(best, best, "nmi") == (0, 0, 0)


# --- the same thing in every image? ----------------------------------------------------------------------------------


def naive_holds(parts, image, y, x, half):
    """Names of the parts of an image in a window."""
    here = zip(parts.image.tolist(), parts.part.tolist(), parts.y.tolist(), parts.x.tolist(), strict=True)
    return {part for i, part, b, a in here if i == image and abs(b - y) <= half and abs(a - x) <= half}


def some_nearest(prototypes, images, grid=(7, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(grid[0] * grid[1], (prototypes, images), generator=generator)
    return f.Nearest(position, torch.rand(prototypes, images, generator=generator), grid)


def centre(nearest, k, i):
    row, column = divmod(int(nearest.position[k, i]), nearest.grid[1])
    return (row + 0.5) / nearest.grid[0], (column + 0.5) / nearest.grid[1]


def test_consistency_stability_and_purity_against_loops():
    parts, nearest, noisy = some_parts(30, 10), some_nearest(6, 30, seed=1), some_nearest(6, 30, seed=2)
    noisy.position[:, ::2] = nearest.position[:, ::2]
    of_prototype, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(30) % 2
    seen = list(zip(parts.image.tolist(), parts.part.tolist(), strict=True))
    consistent, stable = [], []
    for k in range(6):
        images = [i for i in range(30) if labels[i] == of_prototype[k]]
        near = {i: naive_holds(parts, i, *centre(nearest, k, i), 36 / 224) for i in images}
        after = {i: naive_holds(parts, i, *centre(noisy, k, i), 36 / 224) for i in images}
        shares = []
        for part in range(4):
            visible = [i for i in images if (i, part) in seen]
            shares.append(sum(part in near[i] for i in visible) / len(visible))
        consistent.append(max(shares) >= 0.8)
        stable += [near[i] == after[i] for i in images]
    assert f.consistency(nearest, parts, of_prototype, labels) == pytest.approx(100 * sum(consistent) / 6)
    expected = 100 * sum(stable) / len(stable)
    assert 50 < expected < 100
    assert f.stability(nearest, noisy, parts, of_prototype, labels) == pytest.approx(expected)
    without = parts.without_sides()
    assert without.names == ("beak", "wing", "tail")
    purities = []
    for k in range(6):
        ten = nearest.distance[k].argsort()[:10].tolist()
        held = [{NAMES[p].split()[-1] for p in naive_holds(parts, i, *centre(nearest, k, i), 16 / 224)} for i in ten]
        purities.append(max(sum(name in of for of in held) for name in without.names) / 10)
    assert sum(purities) > 0 and f.patch_purity(nearest, parts) == pytest.approx(100 * sum(purities) / 6)


def test_prototypes_that_sit_on_a_part_are_consistent_stable_and_pure():
    parts = some_parts(25, 11)
    grid = (50, 50)
    cells = torch.randint(2500, (4, 25), generator=torch.Generator().manual_seed(3))
    cells[parts.part, parts.image] = parts.cells(grid)
    visible = torch.ones(4, 25)
    visible[parts.part, parts.image] = 0
    nearest = f.Nearest(cells, visible, grid)
    one_class = torch.zeros(4, dtype=torch.int64), torch.zeros(25, dtype=torch.int64)
    assert f.consistency(nearest, parts, *one_class) == 100
    assert f.stability(nearest, nearest, parts, *one_class) == 100


def test_nearest_positions_are_those_of_the_composite():
    generator = torch.Generator().manual_seed(4)
    blocks = [torch.rand(5, 6, 8, 8, generator=generator), torch.rand(5, 9, 4, 4, generator=generator)]
    reading = Normalisation(scale="1")
    q = composite([x.double() for x in blocks], reading)
    p = q[0, :3] + 0.01
    found = f.Nearest.of(CompositeRows([x.double() for x in blocks], reading), p)
    assert found.grid == (8, 8)
    distance = torch.cdist(p[None].expand(5, -1, -1), q)
    assert torch.equal(found.position, distance.argmin(2).T)
