"""The composite and its operator against eq. 7 and 8 written with loops."""

import math

import pytest
import torch
from conftest import blocks_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kmex_utils.method.composite import GRIDS, NORMS, SCALES, Normalisation, composite
from kmex_utils.method.kmeans import kmeans
from kmex_utils.method.operator import CompositeRows


def naive_composite(blocks, norm, scale, align_corners, grid="shallowest"):
    """Eq. 7 and 8 position by position: q[n][r] as a list of numbers."""
    images, (height, width) = len(blocks[0]), blocks[-1 if grid == "deepest" else 0].shape[2:]
    if grid == "double":
        height, width = 2 * height, 2 * width
    rows = torch.zeros(images, height * width, sum(x.shape[1] for x in blocks), dtype=torch.float64)
    offset = 0
    for x in blocks:
        x = x.double()
        channels, h, w = x.shape[1:]
        u = torch.zeros(images, channels, height, width, dtype=torch.float64)
        for i in range(height):
            for j in range(width):
                top, low, a = _between(i, height, h, align_corners)
                left, right, b = _between(j, width, w, align_corners)
                u[:, :, i, j] = (1 - a) * ((1 - b) * x[:, :, top, left] + b * x[:, :, top, right])
                u[:, :, i, j] += a * ((1 - b) * x[:, :, low, left] + b * x[:, :, low, right])
        factor = {"1/D": 1 / channels, "1/sqrt(D)": 1 / math.sqrt(channels), "1": 1.0}[scale]
        for n in range(images):
            for i in range(height):
                for j in range(width):
                    for c in range(channels):
                        length = {
                            "position": u[n, :, i, j].norm(),
                            "channel": u[n, c].norm(),
                            "image": u[n].norm(),
                        }[norm]
                        value = u[n, c, i, j] / length if length > 0 else 0.0
                        rows[n, i * width + j, offset + c] = value * factor
        offset += channels
    return rows


def _between(i, out, size, align_corners):
    """The two source positions around target position i, and the weight of the second."""
    if align_corners:
        at = i * (size - 1) / (out - 1) if out > 1 else 0.0
    else:
        at = max(0.0, (i + 0.5) * size / out - 0.5)
    low = min(int(at), size - 1)
    return low, min(low + 1, size - 1), at - low


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm", NORMS)
def test_composite_is_eq_8(norm, scale, align_corners):
    blocks = blocks_of()
    blocks[0][0, :, 2, 3] = 0  # a dead position
    blocks[1][1] = 0  # a dead block
    expected = naive_composite(blocks, norm, scale, align_corners)
    q = composite(blocks, Normalisation(norm, scale, align_corners))
    torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-7)


def test_weights_by_block():
    """The last ones are those of the deepest; equal ones are the scale 1, whatever their size."""
    blocks = blocks_of()
    unit = composite(blocks, Normalisation(scale="1")).split([x.shape[1] for x in blocks], 2)
    expected = torch.cat([weight * part for weight, part in zip((4, 2, 0.5), unit, strict=True)], 2)
    q = composite(blocks, Normalisation(scale="4, 2, 0.5"))
    torch.testing.assert_close(q, expected)
    last = composite(blocks[-1:], Normalisation(scale="4,2,0.5"))
    torch.testing.assert_close(last, composite(blocks[-1:], Normalisation(scale="1")) / 2)
    check_operator([x.double() for x in blocks], Normalisation(scale="4,2,0.5"))
    with pytest.raises(ValueError, match="'2,1' has 2 weights for 3 blocks"):
        composite(blocks, Normalisation(scale="2,1"))


@pytest.mark.parametrize("scale", ["2", "1,-1", "1,0", "1,x", "inf,1", "1/D,1"])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match="or weights such as 4,2,1, got") as error:
        Normalisation(scale=scale)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grid", GRIDS)
def test_shared_grid(grid):
    blocks = blocks_of()
    expected = naive_composite(blocks, "position", "1/D", False, grid)
    q = composite(blocks, Normalisation(grid=grid))
    torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_operator_is_the_matrix(norm, align_corners):
    blocks = blocks_of()
    blocks[0][0, :, 2, 3] = 0
    blocks[1][1] = 0
    blocks[2][:, 3] = 0  # a dead channel
    check_operator(blocks, Normalisation(norm, "1", align_corners))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    channels=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    norm=st.sampled_from(NORMS),
    scale=st.sampled_from(SCALES),
    align_corners=st.booleans(),
    grid=st.sampled_from(GRIDS),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_operator_is_the_matrix_for_any_shape(n, sizes, channels, norm, scale, align_corners, grid, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(n, d, *size, generator=generator) for size, d in zip(sizes, channels, strict=False)]
    blocks = blocks if signed else [x.relu() for x in blocks]
    check_operator([x.double() for x in blocks], Normalisation(norm, scale, align_corners, grid))


def check_operator(blocks, normalisation, **options):
    dtype = blocks[0].dtype
    rows = CompositeRows(blocks, normalisation, **options)
    q = composite(blocks, normalisation).flatten(0, 1)  # image by image, row-major
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(5, q.shape[1], generator=generator, dtype=dtype)
    half = torch.randn(5, generator=generator, dtype=dtype)
    weights = torch.rand(len(q), 4, generator=generator, dtype=dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert (len(rows), rows.dim) == tuple(q.shape)
    sums, seen = 0, []
    for span, chunk in rows.chunks():
        torch.testing.assert_close(chunk.closeness(p, half), q[span] @ p.T - half, **tolerance)
        torch.testing.assert_close(chunk.squared, q[span].square().sum(1), **tolerance)
        sums = sums + chunk.sums(weights[span])
        seen += range(span.start, span.stop)
    assert seen == list(range(len(rows)))
    torch.testing.assert_close(sums, weights.T @ q, **tolerance)
    index = torch.randint(len(q), (7,), generator=generator)
    torch.testing.assert_close(rows.rows(index), q[index], **tolerance)


@pytest.mark.parametrize("count", [127, 144, 150, 600])
def test_many_prototypes_are_the_same_product(count, generator, monkeypatch):
    """From 128 on another kernel computes them on a chip with AVX-512; it runs on others, too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    blocks = blocks_of(n=3)
    q = composite(blocks).flatten(0, 1)
    p = torch.randn(count, q.shape[1], generator=generator)
    rows = CompositeRows(blocks)
    ((_, chunk),) = rows.chunks()
    half = torch.zeros(count)
    torch.testing.assert_close(chunk.closeness(p, half), q @ p.T, rtol=1e-4, atol=1e-6)
    assert torch.equal(chunk.closeness(rows.columns(p), half), chunk.closeness(p, half))


@pytest.mark.parametrize("rows_per_chunk", [1, 70, 10**6])
def test_every_image_and_position_is_a_row_once(rows_per_chunk):
    blocks = blocks_of(n=7)
    rows = CompositeRows(blocks, rows_per_chunk=rows_per_chunk)
    assert len(rows) == 7 * 30 and rows.rows_per_image == 30
    check_operator(blocks, Normalisation(), rows_per_chunk=rows_per_chunk)


def test_streamed_rows_are_the_rows_in_memory():
    """Read anew at every pass, in chunks, never more than one held."""
    blocks = blocks_of(n=7)
    passes = []

    def read(start, stop):
        passes.append((start, stop))
        return [x[start:stop] for x in blocks]

    streamed = CompositeRows(read, images=7, keep=False, images_per_reading=1, rows_per_chunk=60)
    kept = CompositeRows(blocks, rows_per_chunk=60)
    p, half = torch.randn(3, kept.dim), torch.randn(3)
    for (_, ours), (_, expected) in zip(streamed.chunks(), kept.chunks(), strict=True):
        assert torch.equal(ours.closeness(p, half), expected.closeness(p, half))
    index = torch.tensor([0, 200, 17, 209])
    assert torch.equal(streamed.rows(index), kept.rows(index))
    assert all(stop - start <= 2 for start, stop in passes)


@pytest.mark.parametrize("options", [{"norm": "row"}, {"scale": "2"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        Normalisation(**options)


def test_not_a_number_is_refused():
    blocks = blocks_of()
    blocks[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        kmeans(CompositeRows(blocks), 2)


def test_a_very_short_row_is_no_zero_row():
    blocks = blocks_of(n=2)
    blocks[0][0, :, 0, 0] = 1e-20
    q = composite(blocks).flatten(0, 1)
    rows = CompositeRows(blocks).rows(torch.arange(len(q)))
    torch.testing.assert_close(rows, q, rtol=1e-4, atol=1e-6)
