import numpy as np
import pytest
import torch
from conftest import blocks_of
from sklearn.cluster import KMeans

from kmex_utils.hardware import pick_device
from kmex_utils.method import products
from kmex_utils.method.composite import Normalisation, composite
from kmex_utils.method.kmeans import DenseRows, kmeans
from kmex_utils.method.operator import CompositeRows
from kmex_utils.method.prototypes import classwise


def clouds(k=4, n=50, dim=6, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(k, dim, generator=generator)
    return (centres[:, None] + spread * torch.randn(k, n, dim, generator=generator)).flatten(0, 1)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_one_restart_is_scikit_learns(k):
    x = torch.rand(400, 8, generator=torch.Generator().manual_seed(k))
    start = x[:k]
    theirs = KMeans(k, init=start.numpy().copy(), n_init=1, tol=1e-4, algorithm="lloyd").fit(x.numpy())
    ours = kmeans(DenseRows(x), k, start=start)
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_), rtol=1e-4, atol=1e-5)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.sizes.tolist() == np.bincount(theirs.labels_, minlength=k).tolist()


def test_restarts_reach_scikit_learns_inertia():
    x = torch.rand(500, 5, generator=torch.Generator().manual_seed(3))
    theirs = min(KMeans(8, n_init=10, random_state=s).fit(x.numpy()).inertia_ for s in range(3))
    ours = min(kmeans(DenseRows(x), 8, seed=s).inertia for s in range(3))
    assert ours <= 1.01 * theirs


def test_separated_clouds_are_found():
    x = clouds()
    clusters = kmeans(DenseRows(x), 4)
    assert clusters.sizes.tolist() == [50] * 4
    means = x.view(4, 50, -1).mean(1)
    assert torch.cdist(clusters.centroids, means).min(1).values.max() < 1e-4


@pytest.mark.parametrize("norm", ["position", "channel", "image"])
def test_composite_without_the_matrix_is_scikit_learn_on_it(norm):
    normalisation = Normalisation(norm, "1/sqrt(D)")
    blocks = blocks_of(n=12, seed=5)
    q = composite(blocks, normalisation).flatten(0, 1)
    start = q[::60][:5]
    theirs = KMeans(5, init=start.numpy().copy(), n_init=1, tol=1e-4).fit(q.numpy())
    ours = kmeans(CompositeRows(blocks, normalisation), 5, start=start)
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_), rtol=1e-3, atol=1e-4)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)


def test_nearest_row_and_inertia_by_definition():
    x = clouds()
    clusters = kmeans(DenseRows(x), 4)
    distance = torch.cdist(x, clusters.centroids, compute_mode="donot_use_mm_for_euclid_dist").double()
    assert clusters.nearest.tolist() == distance.argmin(0).tolist()
    assert clusters.inertia == pytest.approx(distance.min(1).values.square().sum().item(), rel=1e-5)


def test_same_seed_same_result_other_seed_other_draws():
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    first, again = (kmeans(DenseRows(x), 9, restarts=1, seed=4) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, kmeans(DenseRows(x), 9, restarts=1, seed=5).centroids)


def test_chunks_and_streaming_do_not_change_the_result():
    blocks = blocks_of(n=9, seed=2)
    read = lambda start, stop: [x[start:stop] for x in blocks]  # noqa: E731
    start = composite(blocks).flatten(0, 1)[::60][:4]
    whole = kmeans(CompositeRows(blocks), 4, start=start)
    for keep in (True, False):
        parts = kmeans(CompositeRows(read, images=9, keep=keep, rows_per_chunk=60), 4, start=start)
        torch.testing.assert_close(parts.centroids, whole.centroids, rtol=1e-4, atol=1e-6)
        assert parts.sizes.tolist() == whole.sizes.tolist() and parts.iterations == whole.iterations


def test_scale_of_the_data_does_not_matter():
    """Rows of length 1/512 must not stop early: the tolerance follows the data."""
    x = torch.rand(400, 6, generator=torch.Generator().manual_seed(1))
    large, small = kmeans(DenseRows(x), 6), kmeans(DenseRows(x * 2**-12), 6)
    assert large.iterations == small.iterations
    torch.testing.assert_close(small.centroids * 2**12, large.centroids)


def test_an_empty_cluster_moves_to_the_farthest_row():
    x = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    clusters = kmeans(DenseRows(x), 2, start=torch.tensor([[0.1], [100.0]]))
    assert sorted(clusters.centroids.flatten().tolist()) == pytest.approx([0.1, 5.0])


def test_k_equal_to_the_rows_and_duplicates():
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    clusters = kmeans(DenseRows(x), 6)
    assert clusters.inertia == pytest.approx(0, abs=1e-9)
    assert sorted(clusters.nearest.tolist()) == list(range(6))
    same = kmeans(DenseRows(torch.ones(5, 2)), 3)
    assert torch.equal(same.centroids, torch.ones(3, 2)) and same.sizes.sum() == 5


@pytest.mark.parametrize("k", [0, 7])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and the 6 rows"):
        kmeans(DenseRows(torch.rand(6, 3)), k)


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        DenseRows(torch.tensor([[0.0], [torch.nan]]))


def test_classwise_clusters_each_class_by_itself():
    x, labels = clouds(k=6, n=20), torch.arange(6).repeat_interleave(20) % 3
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    x, labels = x[order], labels[order]
    p = classwise(lambda index: DenseRows(x[index]), labels, "abc", 2)
    assert p.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert p.sizes.tolist() == [20] * 6
    for k in range(6):
        members = (labels == p.labels[k]).nonzero().flatten()
        nearest = members[(x[members] - p.vectors[k]).norm(dim=1).argmin()]
        assert p.image[k] == nearest and p.position[k] == 0


def test_classwise_positions_point_into_the_grid():
    blocks = blocks_of(n=8, seed=1)
    labels = torch.tensor([0, 1] * 4)
    p = classwise(lambda index: CompositeRows([x[index] for x in blocks]), labels, "ab", 3)
    q = composite(blocks)
    for k in range(6):
        distance = (q[labels == p.labels[k]] - p.vectors[k]).norm(dim=2)
        reached = (q[p.image[k], p.position[k]] - p.vectors[k]).norm()
        assert reached.item() == pytest.approx(distance.min().item(), rel=1e-4)
        assert labels[p.image[k]] == p.labels[k]


def test_too_many_prototypes_for_a_class_is_one_clear_line():
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"class 'owl' has 1 training rows \(1 images\), fewer than K/C = 2: lower"):
        classwise(lambda index: DenseRows(torch.rand(len(index), 2)), labels, ["wren", "owl"], 2)
    with pytest.raises(ValueError, match="class 'owl' has no training images"):
        classwise(lambda index: DenseRows(torch.rand(len(index), 2)), labels[:3], ["wren", "owl"], 2)


def test_the_given_start_is_left_alone():
    x = clouds()
    before = x.clone()
    kmeans(DenseRows(x), 4, start=x[:4])
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [DenseRows(clouds(6, spread=1.5)), CompositeRows(blocks_of(n=9, seed=2))])
def test_sums_by_single_rows_are_those_of_the_product(rows, monkeypatch):
    """The update follows changed labels row by row or in one product, whichever is faster."""
    start = rows.rows(torch.arange(5) * 7)
    clusters = []
    for few in (0, 2):
        monkeypatch.setattr(products, "FEW", few)
        clusters.append(kmeans(rows, 5, start=start, tolerance=0))
    product, single = clusters
    assert single.iterations == product.iterations > 2
    torch.testing.assert_close(single.centroids, product.centroids, rtol=1e-5, atol=1e-7)
    assert torch.equal(single.sizes, product.sizes)


@pytest.mark.parametrize("offset", [0, 10, 100])
def test_clouds_far_from_the_origin_are_told_apart(offset):
    generator = torch.Generator().manual_seed(0)
    centres = 0.02 * torch.randn(4, 16, generator=generator)
    x = offset + (centres[:, None] + 0.002 * torch.randn(4, 50, 16, generator=generator)).flatten(0, 1)
    theirs = KMeans(4, n_init=10, random_state=0).fit(x.double().numpy())
    ours = kmeans(DenseRows(x), 4)
    assert ours.sizes.tolist() == [50] * 4
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=0.02)
    start = x[::50]
    torch.testing.assert_close(kmeans(DenseRows(x), 4, start=start).centroids, x.view(4, 50, -1).mean(1))


def test_a_cluster_for_every_row_has_that_row_as_its_nearest():
    x = 1 + 1e-4 * torch.arange(6.0)[:, None]
    clusters = kmeans(DenseRows(x), 6)
    assert clusters.sizes.tolist() == [1] * 6
    assert sorted(clusters.nearest.tolist()) == list(range(6))


@pytest.mark.parametrize("k", [2, 10, 300])
def test_of_equal_centroids_the_first_takes_the_rows(k):
    x = torch.arange(-500.0, 501)[:, None].repeat(1, 3)  # whole numbers about zero: without rounding
    start = x[2::3][: k // 2].repeat(2, 1)
    sizes = kmeans(DenseRows(x), k, start=start, max_iterations=0).sizes
    assert sizes[: k // 2].sum() == len(x) and not sizes[k // 2 :].any()


def test_mps_lacks_float64():
    assert products.double_device(torch.device("mps")).type == "cpu"
    assert products.double_device(torch.device("cuda")).type == "cuda"
    torch.ones(1, dtype=torch.float64, device=products.double_device(pick_device()))


def test_random_rows_without_iterations_are_the_centroids(generator):
    """And with them Lloyd starts there."""
    x = torch.randn(300, 4, generator=generator)
    clusters = kmeans(DenseRows(x), 6, start="random", max_iterations=0, restarts=4, seed=1)
    distances = torch.cdist(clusters.centroids.double(), x.double())
    assert distances.amin(1).max() < 1e-6 and len(distances.argmin(1).unique()) == 6
    assert torch.equal(clusters.nearest, distances.argmin(1))
    assert clusters.inertia == pytest.approx(distances.amin(0).square().sum().item(), rel=1e-5)
    one = [kmeans(DenseRows(x), 6, start="random", max_iterations=0, restarts=1, seed=s) for s in range(20)]
    assert len({c.inertia for c in one}) == 20, "drawn anew by each seed"
    went_on = kmeans(DenseRows(x), 6, start="random", restarts=1, seed=3)
    assert went_on.inertia == pytest.approx(kmeans(DenseRows(x), 6, start=one[3].centroids).inertia)
    with pytest.raises(ValueError, match="start must be"):
        kmeans(DenseRows(x), 6, start="rows")
