"""What the plots of the study show, read back from their pixels."""

import itertools
import statistics

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from matplotlib.colors import to_rgb

from studies.data_efficiency.plots import _COLORS, plot_accuracy, plot_attention, plot_corrections, plot_shifts


GREEN = (0, 200, 90)
# The first two colors of lines, and a red.
BLUE, ORANGE, CRIMSON = (0, 114, 178), (230, 159, 0), (220, 20, 60)
# What eyes without the cones of long or of medium waves see of linear RGB (Machado et al. 2009, doi 10.1109/TVCG.2009.113).
COLOR_BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def read(path):
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count(pixels, color):
    # Lines and letters have soft edges.
    return int((np.abs(pixels - color).max(axis=-1) <= 40).sum())


def stretches(mask):
    """Begin and end of each run of true values."""
    return np.flatnonzero(np.diff(np.pad(mask.astype(int), 1))).reshape(-1, 2)


def draw_accuracy(path, **panels):
    plot_accuracy(path, panels, "labels")
    return read(path)


def largest_shape(pixels, color):
    """Rows and columns of the largest connected shape of a color, which leaves out the legend's."""
    shapes, _ = scipy.ndimage.label(np.abs(pixels - color).max(axis=-1) <= 40, np.ones((3, 3)))
    boxes = scipy.ndimage.find_objects(shapes)
    rows, columns = max(boxes, key=lambda box: (box[0].stop - box[0].start) * (box[1].stop - box[1].start))
    return np.array([rows.start, rows.stop]), np.array([columns.start, columns.stop])


def test_a_method_has_one_color_in_all_panels(tmp_path):
    line = {10: [0.5], 100: [0.7]}
    pixels = draw_accuracy(tmp_path / "plot.png", both={"plain": line, "ours": {10: [0.6]}}, ours={"ours": line})
    left, right = np.array_split(pixels, 2, axis=1)
    assert count(left, BLUE) > 100 and count(left, ORANGE) > 20
    assert count(right, BLUE) == 0 and count(right, ORANGE) > 100


def test_panels_stand_two_in_a_row(tmp_path):
    first, second = {"plain": {10: [0.5], 100: [0.7]}}, {"plain": {}, "ours": {10: [0.5], 100: [0.7]}}
    pixels = draw_accuracy(tmp_path / "plot.png", a=first, b=first, c=second)
    assert 0.6 < pixels.shape[0] / pixels.shape[1] < 0.9
    upper, lower = np.array_split(pixels[:-100], 2)
    assert all(count(half, BLUE) > 100 and count(half, ORANGE) == 0 for half in np.array_split(upper, 2, axis=1))
    left, right = np.array_split(lower, 2, axis=1)
    assert count(left, BLUE) == 0 and count(left, ORANGE) > 100
    assert (right[:-50] == 255).mean() > 0.99


def test_accuracies_have_bars_of_one_standard_deviation_on_a_logarithmic_axis(tmp_path):
    accuracies = [0.4, 0.55, 0.6]
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    # A line of single seeds that begins as high as the bar's upper end, and ends as low as its lower.
    ends = {1: [mean + spread], 10: [mean - spread]}
    pixels = draw_accuracy(str(tmp_path / "plot.png"), panel={"ends": ends, "seeds": {100: accuracies}})
    (line_rows, line_columns), (bar_rows, bar_columns) = (largest_shape(pixels, c) for c in (BLUE, ORANGE))
    assert np.ptp(bar_rows) > 200
    # Up to the size of a marker.
    np.testing.assert_allclose(bar_rows, line_rows, atol=4)
    assert bar_columns.mean() - line_columns[1] == pytest.approx(np.ptp(line_columns), abs=16)


def test_methods_that_share_a_place_stand_side_by_side(tmp_path):
    lines = {"plain": {1: [0.5, 0.6], 1000: [0.5, 0.6]}, "ours": {1: [0.8, 0.9], 1000: [0.8, 0.9]}}
    pixels = draw_accuracy(tmp_path / "plot.png", panel=lines)
    first, second = (largest_shape(pixels, color)[1] for color in (BLUE, ORANGE))
    assert all((second - first >= 2) & (second - first <= 20))


def test_a_highlighted_method_is_thicker(tmp_path):
    panels = {"panel": {"plain": {1: [0.5], 10: [0.7]}, "ours": {1: [0.6], 10: [0.8]}}}
    counts = []
    for highlight in (None, "ours"):
        plot_accuracy(tmp_path / "plot.png", panels, "labels", highlight)
        counts.append([count(read(tmp_path / "plot.png"), color) for color in (BLUE, ORANGE)])
    assert counts[1][0] == pytest.approx(counts[0][0], rel=0.1) and counts[1][1] > 1.5 * counts[0][1]


def test_quantities_are_drawn_in_their_order(tmp_path):
    peak = {1: [0.5], 10: [0.9], 100: [0.5]}
    shuffled = {place: peak[place] for place in (100, 1, 10)}
    first, second = (draw_accuracy(tmp_path / "plot.png", panel={"plain": line}) for line in (peak, shuffled))
    np.testing.assert_array_equal(first, second)


def draw_shifts(path, **panels):
    plot_shifts(path, panels)
    return read(path)


def test_strengths_are_equally_far_apart_and_begin_at_zero(tmp_path):
    steps = {"two": {0: [0.4], 2: [0.8]}, "four": {1: [0.2], 5: [0.6]}}
    pixels = draw_shifts(tmp_path / "plot.png", noise=steps)
    two, four = (np.ptp(largest_shape(pixels, color)[1]) for color in (BLUE, ORANGE))
    # Up to the width of the bars' ends.
    assert four == pytest.approx(2 * two, abs=14)


def test_all_kinds_have_one_scale_and_four_make_a_row(tmp_path):
    small, large = {"plain": {0: [0.5], 5: [0.4]}}, {"plain": {0: [0.9], 5: [0.1]}}
    pixels = draw_shifts(tmp_path / "plot.png", a=small, b=large, c=small, d=large, e=small)
    upper, lower = np.array_split(pixels[:-50], 2)
    heights = [np.ptp(largest_shape(part, BLUE)[0]) for part in np.array_split(upper, 4, axis=1)]
    np.testing.assert_allclose(np.divide(heights, heights[1]), [1 / 8, 1, 1 / 8, 1], atol=0.05)
    first, *others = np.array_split(lower, 4, axis=1)
    assert count(first, BLUE) > 50 and all((part == 255).mean() > 0.99 for part in others[1:])


def smallest_distance(colors, blindness):
    """Between two colors in CIE L*a*b*, as color-blind eyes see them."""
    rgb = np.array([to_rgb(color) for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(linear @ np.transpose(COLOR_BLIND[blindness]), 0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    return min(np.linalg.norm(one - other) for one, other in itertools.combinations(lab, 2))


@pytest.mark.parametrize("blindness", COLOR_BLIND)
def test_color_blind_readers_tell_the_lines_of_a_few_methods_apart(blindness):
    usual = [f"C{i}" for i in range(len(_COLORS))]
    assert smallest_distance(_COLORS, blindness) > 15 > 10 > smallest_distance(usual, blindness)


def draw_attention(path, images, maps):
    """The pictures in the plot: [row][column]."""
    plot_attention(path, images, ["caption"] * len(images), maps)
    pixels = read(path)
    filled = pixels.min(axis=-1) < 230
    rows, columns = (stretches(filled.mean(axis=axis) > 0.5) for axis in (1, 0))
    return [[pixels[top + 2 : bottom - 2, left + 2 : right - 2] for left, right in columns] for top, bottom in rows]


def brightest_patch(picture, height, width):
    brightness = PIL.Image.fromarray(picture.mean(axis=-1).astype(np.float32))
    patches = np.asarray(brightness.resize((width, height), PIL.Image.Resampling.BOX))
    return divmod(int(patches.argmax()), width)


def attention_to(*patches, height=3, width=4):
    maps = np.full((len(patches), height, width), 0.01, np.float32)
    for i, (y, x) in enumerate(patches):
        maps[i, y, x] = 0.5
    return maps


def test_attention_is_drawn_where_it_is(tmp_path):
    patches = {"class": [(0, 0), (2, 1)], "conv": [(0, 3), (1, 2)]}
    maps = {name: attention_to(*places) for name, places in patches.items()}
    _, *rows = draw_attention(tmp_path / "plot.png", [PIL.Image.new("RGB", (12, 12), GREEN)] * 2, maps)
    found = [[brightest_patch(picture, 3, 4) for picture in row] for row in rows]
    assert found == list(patches.values())


@pytest.mark.parametrize(("images", "tokens"), [(1, 1), (3, 2)])
def test_images_are_above_and_below_the_attention(images, tokens, tmp_path):
    pale = [(0, 0), (2, 1), (1, 3)][:images]
    pictures = [PIL.Image.new("RGB", (12, 12), color) for color in (GREEN, BLUE, CRIMSON)[:images]]
    for picture, (y, x) in zip(pictures, pale):
        picture.paste((225, 225, 225), (3 * x, 4 * y, 3 * x + 3, 4 * y + 4))
    even = {f"token {i}": np.full((images, 3, 4), 0.05) for i in range(tokens)}
    rows = draw_attention(str(tmp_path / "plot.png"), pictures, even)
    assert [[brightest_patch(picture, 3, 4) for picture in row] for row in rows] == [pale] * (1 + tokens)
    for picture, color in zip(rows[0], (GREEN, BLUE, CRIMSON)):
        np.testing.assert_allclose(np.median(picture, axis=(0, 1)), color, atol=2)


def draw_corrections(path, *arguments, names):
    """Each cell of the plot: 1 if it is blue, −1 if red, 0 if white."""
    plot_corrections(path, *arguments, names)
    pixels = read(path)
    dark = pixels.min(axis=-1) < 100
    top, *_, bottom = np.flatnonzero(dark.mean(axis=1) > 0.5)
    left, *_, right = np.flatnonzero(dark.mean(axis=0) > 0.5)
    rows = np.array_split(pixels[top : bottom + 1, left : right + 1], len(names))
    # The median: not the number in the cell.
    cells = [[np.median(cell, axis=(0, 1)) for cell in np.array_split(row, len(names), axis=1)] for row in rows]
    red, _, blue = np.moveaxis(cells, -1, 0)
    sign = np.sign(blue - red) * (np.abs(blue - red) > 30)
    assert (np.min(cells, axis=-1)[sign == 0] > 240).all()
    return sign.tolist()


@pytest.mark.parametrize(
    ("labels", "before", "after", "expected"),
    [
        ([0, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [[1, 1], [0, 0]]),
        ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0], [[0, 0], [-1, -1]]),
        ([0, 1, 2, 2], [0, 1, 0, 0], [0, 1, 1, 1], [[0, 0, 0], [0, 0, 0], [1, -1, 0]]),
    ],
    ids=["better", "worse", "another confusion"],
)
def test_better_is_blue_and_worse_is_red(labels, before, after, expected, tmp_path):
    names = ["cat", "dog", "owl"][: len(expected)]
    arrays = np.array(labels), [np.array(before)], [np.array(after)]
    assert draw_corrections(tmp_path / "plot.png", *arrays, names=names) == expected


def test_corrections_are_means_over_seeds(tmp_path):
    labels = np.array([0, 0, 0, 1, 1, 1])
    usual, better, worse = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    for after, sign in (([better, worse], 0), ([better, usual, usual], 1), ([worse, usual], -1)):
        found = draw_corrections(str(tmp_path / "plot.png"), labels, [usual], after, names=["cat", "dog"])
        assert found == [[sign, sign], [sign, sign]]
