"""One style: the same bytes every time, on the page as in the file, and none of it left in the user's settings."""

import io
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from kmex_utils import drawing
from kmex_utils.explanation.figure1 import figure1
from kmex_utils.explanation.interpretation import Interpretation, Patch
from kmex_utils.paper import figures
from kmex_utils.training.protopnet.views import Activated


@pytest.fixture
def parts():
    """A digit by two explainers, with more prototypes than colours and with long names."""
    generator = np.random.default_rng(0)

    def part(name, positions, prototypes, predicted):
        q_s = generator.integers(0, prototypes, (positions, positions))
        pixels = generator.integers(0, 256, (prototypes, 20, 20, 3), dtype=np.uint8)
        used, counts = np.unique(q_s, return_counts=True)
        patches = [
            Patch(int(k), predicted, count / q_s.size, pixels[k], 0) for k, count in zip(used, counts, strict=True)
        ]
        return Interpretation(name, q_s, generator.normal(size=q_s.shape), tuple(patches[:10]), predicted)

    return [part("B4", 2, 4, "8"), part("B234", 14, 40, "Blue_footed_booby_or_gannet")]


@pytest.fixture
def image():
    return np.random.default_rng(1).integers(0, 256, (56, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("centre", "half", "ticks", "arrow"),
    [
        (0.0, 2.0, {"0", "-2.00", "2.00"}, ""),
        (1.9, 2.0, {"0", "1.90", "3.90"}, ""),  # that at -0.1 would touch zero's
        (30.0, 2.0, {"28.00", "30.00", "32.00"}, "0 ↓"),
        (-0.5, 0.05, {"-0.5500", "-0.5000", "-0.4500"}, "0 ↑"),
    ],
)
def test_the_scale_says_where_zero_lies(image, parts, centre, half, ticks, arrow):
    """Ends at centre ± half; what differs by a tenth of the half-width is nearly white: noise is not stretched."""
    values = np.array([[centre, centre + half], [centre + half / 10, centre - half]])
    part = replace(parts[0], attribution=values, target=("a", "b"), centre=centre, half=half)
    figure = figure1(image, [part])
    (drawn,) = [
        i for axes in figure.axes for i in axes.images if i.get_cmap().name == "RdBu_r" and i.get_array().size == 4
    ]
    assert drawn.get_clim() == pytest.approx((centre - half, centre + half))
    assert drawn.to_rgba(values)[1, 0, :3].min() > 0.85
    bar = drawn.colorbar.ax
    assert {label.get_text() for label in bar.get_yticklabels()} == ticks
    assert "".join(text.get_text() for text in bar.texts) == arrow
    assert "attribution to a\n− b" in [axes.get_title() for axes in figure.axes]


def test_figures_are_drawn_to_files_and_repeatable(image, parts, tmp_path):
    for name in ("first", "again"):
        drawing.save(figure1(image, parts, "a digit"), tmp_path / name)
    for ending in (".png", ".pdf"):
        first, again = (tmp_path / f"{name}{ending}" for name in ("first", "again"))
        assert first.stat().st_size > 5000 and first.read_bytes() == again.read_bytes()
    assert plt.get_fignums() == []


def test_the_users_own_settings_stay_and_do_not_enter(image, parts, tmp_path):
    drawing.save(figure1(image, parts), tmp_path / "first")
    with plt.rc_context({"font.size": 20, "xtick.labelsize": 25, "ytick.labelsize": 25, "savefig.dpi": 30}):
        before = dict(plt.rcParams)
        drawing.save(figure1(image, parts), tmp_path / "again")
        drawing.image_grid([image] * 3, "abc")
        drawing.palette(20)
        assert dict(plt.rcParams) == before
    for ending in (".png", ".pdf"):
        assert (tmp_path / f"first{ending}").read_bytes() == (tmp_path / f"again{ending}").read_bytes()


def test_importing_and_drawing_change_no_setting():
    code = """
import matplotlib.pyplot as plt
before = dict(plt.rcParams)
import numpy as np
from kmex_utils import drawing
from kmex_utils.explanation import explorer, report
from kmex_utils.paper import figures
figures.training_curve([{"epoch": 1, "loss": 1, "accuracy": 50}])
drawing.png(drawing.image_grid([np.zeros((4, 4, 3), np.uint8)], ["black"]))
assert dict(plt.rcParams) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_looks_the_same_where_the_style_is_not_in_force(image, parts):
    """As in a notebook, which draws what it shows by itself."""

    def shown(figure):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        return np.asarray(Image.open(buffer))

    with plt.style.context(drawing.STYLE):
        expected = shown(figure1(image, parts))
    assert np.array_equal(shown(figure1(image, parts)), expected)


def test_colours_are_distinct():
    for count in (2, 10, 20):
        assert len({tuple(np.round(c, 3)) for c in drawing.palette(count)}) == count
    assert drawing.palette(1) == [to_rgb("#0173B2")]


def test_the_largest_of_a_map_have_a_colour_each():
    """Sizes 3, 2, 2, 1: equal ones by number."""
    q_s = np.array([[7, 7, 9, 9], [3, 7, 2, 2]])
    blue, orange, green, grey = *drawing.palette(3), (drawing.GREY,) * 3
    expected = [[blue, blue, green, green], [grey, blue, orange, orange]]
    assert np.array_equal(drawing.coloured(q_s, 3), np.array(expected))


def test_more_colours_need_seaborn(monkeypatch):
    monkeypatch.setitem(sys.modules, "seaborn", None)
    assert len(drawing.palette(10)) == 10
    with pytest.raises(ImportError, match="more than ten colours need seaborn: pip install"):
        drawing.palette(11)


def test_names_are_cut_to_fit():
    assert drawing.short("Blue_jay") == "Blue jay"
    assert drawing.short("Black_footed_Albatross") == "…ted Albatross"
    assert drawing.short("001.Black_footed_Albatross", 16, 2) == "Black footed\nAlbatross"
    assert drawing.short("n02085620-Chihuahua") == "Chihuahua" and drawing.short("7-Eleven") == "7-Eleven"
    cut = drawing.short("a very long name of a soft-coated wheaten terrier", 16, 2)
    assert cut.startswith("…") and cut.endswith("wheaten terrier") and all(len(line) <= 16 for line in cut.split("\n"))


@pytest.mark.parametrize(("share", "said"), [(0.0001, "< 1 %"), (0.0099, "< 1 %"), (0.01, "1 %"), (0.344, "34 %")])
def test_a_share_is_never_none(share, said):
    assert drawing.percent(share) == said


def test_names_are_no_formulas(image, parts, tmp_path):
    """Two $ in a title, within a name or of two names, and what matplotlib would refuse between them."""
    name = "x_{$ <b>&$"
    assert drawing.short("5$") == r"5\$", "matplotlib shows the $ alone"
    renamed = [
        replace(part, predicted=name, patches=tuple(replace(patch, class_name=name) for patch in part.patches))
        for part in parts
    ]
    activated = Activated(0, name, 0.5, 1.0, np.zeros((56, 56), np.float32), (0, 9, 0, 9), 0, image, (0, 9, 0, 9))
    points, labels = np.zeros((2, 2)), np.array([0, 1])
    group = figures.figure2(["a", name], points, labels, points, labels, *[{"c_j": (points, labels)}] * 2, name)
    drawn = [figure1(image, renamed, name), drawing.image_grid([image] * 2, [name, name]), group]
    drawn.append(figures.most_activated(image, name, [activated], name))
    for i, figure in enumerate(drawn):
        drawing.save(figure, tmp_path / str(i))
    assert drawn[0].get_suptitle() == r"x_{\$ <b>&\$"


@pytest.mark.parametrize(("size", "expected"), [(0, (40, 30)), (20, (20, 15)), (50, (40, 30))])
@pytest.mark.parametrize("upright", [False, True])
def test_an_image_for_a_page(size, expected, upright):
    import base64

    shape = (40, 30, 3) if upright else (30, 40, 3)
    head, content = drawing.data_url(np.full(shape, 90, np.uint8), size).split(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == (expected[::-1] if upright else expected)
        assert abs(np.asarray(image).mean() - 90) < 2
