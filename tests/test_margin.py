"""Why this prototype and not that one: an identity, a naive choice of the rival, and known answers."""

import numpy as np
import pytest
import torch

from kmex_utils.method.composite import Normalisation, composite

pytest_plugins = ("tests.fixtures_explained",)
EQUAL = Normalisation(scale="1")  # the default of explain()


def rows(explained, b, index):
    x = explained.network.activations(explained.network.input(explained.picture(index).pixels[None]))
    return composite(x[b - 1 :], EQUAL)[0].double()


@pytest.mark.parametrize("b", [4, 3, 2])
@pytest.mark.parametrize("index", [0, 9])
def test_contributions_sum_to_the_margin(explained, b, index):
    """Completeness, for every segment: over blocks, over all channels, and position by position."""
    q, p = rows(explained, b, index), explained.explainers[b].prototypes.vectors.double()
    q_s = torch.from_numpy(explained.interpretations(index, [b])[0].map).flatten()
    for k in q_s.unique().tolist():
        margin = explained.margin(index, b, k)
        ours, theirs = ((q[q_s == k] - p[of.prototype]).square().sum(1) for of in (margin.a, margin.b))
        assert margin.a.prototype == k
        np.testing.assert_allclose(margin.terms.sum(1), theirs - ours, rtol=1e-3, atol=1e-4 * margin.apart)
        assert (margin.terms.sum(1) > -1e-4 * margin.apart).all(), "each position is nearer to its own"
        assert margin.total == pytest.approx((theirs - ours).mean().item(), rel=1e-3)
        assert margin.apart == pytest.approx((p[k] - p[margin.b.prototype]).square().sum().item())
        blocks, channels = margin.table(), margin.table(channels=10_000)
        assert list(blocks.index) == [f"x({i})" for i in range(b, 5)]
        assert blocks.contribution.sum() == pytest.approx(margin.total)
        np.testing.assert_allclose(channels.groupby("block").contribution.sum().sort_index(), blocks.contribution)
        np.testing.assert_allclose(blocks.relative * margin.apart, blocks.contribution)
        assert channels.contribution.abs().is_monotonic_decreasing and len(channels) == p.shape[1]


def test_a_block_is_the_difference_of_its_own_distances(explained):
    """B234 at 64 pixels: 128, 256 and 512 channels."""
    margin, q, p = explained.margin(1), rows(explained, 2, 1), explained.explainers[2].prototypes.vectors.double()
    q = q[torch.from_numpy(explained.interpretations(1, [2])[0].map).flatten() == margin.a.prototype]
    table = margin.table()
    for name, channels in zip(table.index, (slice(128), slice(128, 384), slice(384, 896)), strict=True):
        to_a, to_b = ((q - p[of.prototype])[:, channels].square().sum(1) for of in (margin.a, margin.b))
        difference = to_b - to_a
        assert table.contribution[name] == pytest.approx(difference.mean().item(), rel=1e-3, abs=1e-6 * margin.apart)
        assert table.spread[name] == pytest.approx(difference.std(correction=0).item(), rel=1e-2)
    (block, channel), first = margin.table(channels=1).index[0], margin.table(channels=1).contribution.iloc[0]
    start = {"x(2)": 0, "x(3)": 128, "x(4)": 384}[block]
    assert margin.terms.mean(0)[start + channel] == pytest.approx(first)
    assert abs(first) == pytest.approx(np.abs(margin.terms.mean(0)).max())


def test_the_rival_is_the_nearest_of_the_runner_up(explained):
    """Of the other class, as there are two; asked for by name; after an edit what is left of it."""
    q, p = rows(explained, 2, 0), explained.explainers[2].prototypes.vectors.double()
    q_s = torch.from_numpy(explained.interpretations(0, [2])[0].map).flatten()
    for k in q_s.unique().tolist():
        distance = torch.cdist(q[q_s == k], p).square().mean(0)
        others = [j for j in range(6) if j // 3 != k // 3]
        nearest = min(others, key=lambda j, distance=distance: distance[j].item())
        assert explained.margin(0, 2, k).b.prototype == nearest
        own = [j for j in range(6) if j // 3 == k // 3 and j != k]
        same = explained.margin(0, 2, k, against=explained.classes[k // 3])
        assert same.b.prototype == min(own, key=lambda j, distance=distance: distance[j].item())
    k = int(q_s.mode().values)
    assert explained.margin(0).a.prototype == k
    rival = explained.margin(0).b.prototype
    explained.edits.disable(2, rival)
    try:
        assert explained.margin(0, 2).b.prototype not in (rival, k)
    finally:
        explained.edits.undo()


def test_of_merged_prototypes_the_nearest_counts(explained):
    k = explained.margin(0).a.prototype
    first = 3 * (k // 3)
    explained.edits.merge(2, first, first + 1, first + 2)
    try:
        margin, q = explained.margin(0, 2, first), rows(explained, 2, 0)
        p = explained.explainers[2].prototypes.vectors.double()
        q = q[torch.from_numpy(explained.interpretations(0, [2])[0].map).flatten() == first]
        nearest = torch.cdist(q, p[first : first + 3]).min(1).values.square()
        expected = (q - p[margin.b.prototype]).square().sum(1) - nearest
        np.testing.assert_allclose(margin.terms.sum(1), expected, rtol=1e-3, atol=1e-4 * margin.apart)
    finally:
        explained.edits.undo()


def test_what_there_is_none_of_is_one_line(explained):
    with pytest.raises(ValueError, match="prototype 99 is not in this map; those that are: "):
        explained.margin(0, 2, 99)
    with pytest.raises(ValueError, match="against must be a class of the prototypes, got 'dog': flower, temple"):
        explained.margin(0, against="dog")
    with pytest.raises(ValueError, match=r"start_block must be one of \[4, 3, 2\], got 1"):
        explained.margin(0, 1)


def test_the_figure_shows_the_contributions(explained):
    margin = explained.margin(0)
    bars = margin.figure().axes[2]
    lengths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(lengths, margin.table().relative)
    assert [text.get_text() for text in bars.get_yticklabels()] == ["x(2)", "x(3)", "x(4)"]


def test_it_is_shown_in_a_line(explained):
    found = explained.margin(0, 2)
    a, b = found.a.prototype, found.b.prototype
    assert (
        repr(found).startswith(f"Margin(B234: {a} ({found.a.class_name}) rather than {b} (") and len(repr(found)) < 120
    )
