"""The pictures of a run: the numbers behind them, and pixels read back."""

import io
import warnings

import numpy as np
import PIL.Image
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion

from hf_ibdistill.publishing.picture import (
    COLORS,
    LETTERS,
    Example,
    class_accuracies,
    confused_pairs,
    confusion_matrix,
    curve,
    drawn_names,
    plot_attention,
    plot_calibration,
    plot_class_differences,
    plot_classes,
    plot_curves,
    plot_examples,
    shorten,
)


GREEN = (0, 200, 90)


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


BLUE, ORANGE, TEAL = map(rgb, COLORS[:3])


def pixels(png):
    with PIL.Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG" and image.width == 1120
        return np.asarray(image.convert("RGB")).astype(int)


def count(picture, color):
    # Lines and letters have soft edges.
    return int((np.abs(picture - color).max(axis=-1) <= 25).sum())


def history(start, evaluations=3):
    entries = [{"step": 5, "loss": 1.0}]
    for step in range(10, 10 * evaluations + 1, 10):
        metrics = {"eval_accuracy": start + step / 100, "eval_negative_log_likelihood": 2 / step}
        entries.append({"step": step, **metrics})
    return [*entries, {"step": 30, "train_runtime": 1.0}]


@pytest.fixture(autouse=True)
def no_warnings():
    """matplotlib warns of letters that its font lacks, labels it leaves out, and layouts that do not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_run_has_a_curve_and_one_run_its_training_loss():
    one, two = pixels(plot_curves({"a": history(0.1)})), pixels(plot_curves({"_a": history(0.1), "b$": history(0.2)}))
    for picture, has_second in ((one, True), (two, True), (pixels(plot_curves({"a": history(0.1)[1:]})), False)):
        assert count(picture, BLUE) > 100 and (count(picture, ORANGE) > 100) == has_second


def test_curves_are_read_from_the_log():
    steps, values = curve(history(0.1), "missing", "eval_accuracy")
    np.testing.assert_allclose(steps, [10, 20, 30])
    np.testing.assert_allclose(values, [0.2, 0.3, 0.4])
    assert plot_curves({"a": []}) is None and plot_curves({"a": [{"step": 3, "train_runtime": 2.0}]}) is None
    assert plot_curves({"a": [], "b": history(0.1)[:1]}) is None


@pytest.mark.parametrize(
    "entries",
    [
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.0}],
        [{"step": 1, "eval_accuracy": float("nan"), "eval_loss": float("inf"), "loss": float("nan")}],
        [{"step": i, "loss": 1 / i, "eval_accuracy": 0.5, "eval_loss": 1.0} for i in range(1, 50_000)],
    ],
    ids=["no evaluation", "nan", "long"],
)
def test_logs_of_any_kind_are_drawn(entries):
    assert len(plot_curves({"a": entries})) < 150_000


def random_predictions(num_classes, num_rows=2000, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_rows)
    return labels, np.where(random.random(num_rows) < 0.6, labels, random.integers(0, num_classes, num_rows))


@pytest.mark.parametrize("num_classes", [2, 7, 300])
def test_confusions_and_accuracies_are_counted(num_classes):
    labels, predicted = random_predictions(num_classes)
    labels[labels == 1] = 0
    expected = sklearn_confusion(labels, predicted, labels=range(num_classes))
    for kind in (np.int64, np.uint16):
        matrix = confusion_matrix(labels.astype(kind), predicted.astype(kind), num_classes)
        np.testing.assert_array_equal(matrix, expected)
        pairs = confused_pairs(labels.astype(kind), predicted.astype(kind), num_classes)
        assert {(i, j): n for i, j, n in pairs} == {
            (i, j): expected[i, j] for i, j in zip(*expected.nonzero()) if i != j
        }
        assert [n for *_, n in pairs] == sorted((n for *_, n in pairs), reverse=True)
    accuracies, rows = class_accuracies(labels, predicted, num_classes)
    assert rows.sum() == 2000 and rows[1] == 0 and np.isnan(accuracies[1])
    for i in (0, num_classes - 1):
        if rows[i]:
            assert accuracies[i] == pytest.approx((predicted[labels == i] == i).mean())


NAMES = {
    "long": ["a name of a class that is much longer than any column has room for"] * 2,
    "scripts": ["猫", "कुत्ता"],
    "signs": ["$x$ costs $5", "<script>alert(1)</script>"],
    "hidden": ["_a", " "],
    "right to left": ["قطة", "חתול"],
}


@pytest.mark.parametrize("num_classes", [2, 5, 12, 13, 30, 31, 1000])
@pytest.mark.parametrize("names", NAMES)
def test_any_number_of_classes_with_any_names(num_classes, names):
    labels, predicted = random_predictions(num_classes, 2000 + 20 * num_classes)
    labels[labels == 0] = 1
    class_names = NAMES[names] + [f"class {i}" for i in range(num_classes - 2)]
    if num_classes in (2, 31) or names == "long":
        png = plot_classes(labels, predicted, class_names)
        assert len(png) < 150_000 and count(pixels(png), BLUE) > 500
    drawn = drawn_names(class_names)
    assert drawn[2:] == class_names[2:] and max(map(len, drawn)) <= 30
    if names in ("scripts", "right to left"):
        assert drawn[:2] == ["#0", "#1"]
    if names == "hidden":
        assert drawn[:2] == ["_a", "#1"]


def test_a_model_without_mistakes_or_rows_of_a_class():
    labels = np.zeros(50, np.uint8)
    for count_of_classes in (2, 40):
        assert pixels(plot_classes(labels, labels, [str(i) for i in range(count_of_classes)])).size


def test_the_matrix_is_darkest_where_the_rows_are():
    # All rows of class 0 are right; those of class 1 are taken for class 0.
    picture = pixels(plot_classes(np.array([0] * 9 + [1] * 9), np.zeros(18, int), ["a", "b"]))
    dark = np.abs(picture - (8, 48, 107)).max(axis=-1) < 6
    columns, rows = dark.any(axis=0).nonzero()[0], dark.any(axis=1).nonzero()[0]
    # The left column of the matrix, in both of its rows; nothing of the right column.
    assert columns.max() < 0.5 * picture.shape[1] and np.ptp(rows) > 0.5 * picture.shape[0]


def test_names_are_shortened_in_the_middle():
    assert shorten("n02085620-a-long-name-of-a-dog", 11) == "n0208…a-dog"
    assert shorten(" two\nlines ", 20) == "two lines" and all(len(shorten("x" * 50, n)) == n for n in (6, 7, 20))


def test_differences_of_classes():
    first, second = np.array([0.5, 0.5, np.nan]), np.array([0.9, 0.1, np.nan])
    picture = pixels(plot_class_differences({"a": first, "_b": second, "c": first}, ["x", "y", "z"]))
    # The second run is right of the middle for the first class and left of it for the second.
    rows, columns = (np.abs(picture - ORANGE).max(axis=-1) <= 25).nonzero()
    upper = rows < np.median(rows)
    assert columns[upper].mean() > columns[rows > np.median(rows) + 5].mean() + 200
    assert count(picture, TEAL) > 20
    assert pixels(plot_class_differences({"a": np.zeros(1000), "b": np.ones(1000)}, ["n"] * 1000)).shape[0] < 1500


def test_calibration_of_runs_and_of_odd_confidences():
    random = np.random.default_rng(0)
    confidence = random.random(500).astype(np.float32)
    runs = {"a": (confidence, random.random(500) < confidence), "b": (confidence, confidence > 0)}
    picture = pixels(plot_calibration(runs))
    assert count(picture, BLUE) > 300 and count(picture, ORANGE) > 300
    odd = np.array([np.nan, 1.0, 0.0], np.float32)
    assert pixels(plot_calibration({"_x$y": (odd, np.array([False, True, False]))})).size


def stretches(is_filled):
    edges = np.flatnonzero(np.diff(np.pad(is_filled.astype(int), 1)))
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 8), (300, 300), (1000, 1000)]])
def test_every_image_is_shown(sizes):
    examples = [Example(PIL.Image.new("RGB", size, GREEN), [("true: cat", None), ("cat", True)]) for size in sizes]
    picture = pixels(plot_examples({"Title": examples, "Other $": examples[:1]}))
    is_green = np.abs(picture - GREEN).max(axis=-1) <= 12
    assert [len(stretches(is_green.sum(axis=axis) > 20)) for axis in (0, 1)] == [len(sizes), 2]


def test_a_wide_image_keeps_its_shape():
    picture = pixels(plot_examples({"": [Example(PIL.Image.new("L", (200, 50), 128), [])]}))
    is_gray = np.abs(picture - 128).max(axis=-1) <= 12
    (left, right), *_ = stretches(is_gray.sum(axis=0) > 20)
    (top, bottom), *_ = stretches(is_gray.sum(axis=1) > 20)
    assert (right - left) / (bottom - top) == pytest.approx(4, rel=0.05)


def test_wrong_lines_have_another_color():
    def draw(is_right):
        return pixels(plot_examples({"": [Example(PIL.Image.new("RGB", (8, 8), GREEN), [("M" * LETTERS, is_right)])]}))

    assert count(draw(True), ORANGE) == 0 < count(draw(False), ORANGE)
    assert count(draw(False), BLUE) == 0 < count(draw(True), BLUE)


def test_attention_is_brightest_where_it_is():
    maps = {"class token": np.zeros((2, 4, 4)), "conv": np.full((2, 4, 4), 0.1)}
    maps["class token"][0, 0, 0] = maps["conv"][1, 3, 3] = 1.0
    examples = [Example(PIL.Image.new("RGB", (16, 16), "black"), [("true: a", None)])] * 2
    picture = pixels(plot_attention(examples, maps))
    yellow = (picture[..., 0] > 120) & (picture[..., 2] < 60)
    rows, columns = yellow.nonzero()
    (first, second) = stretches(yellow.any(axis=1))
    top = columns[(rows >= first[0]) & (rows < first[1])]
    bottom = columns[rows >= second[0]]
    cell = picture.shape[1] / 6
    assert top.max() < cell / 2 and bottom.min() > 1.5 * cell
