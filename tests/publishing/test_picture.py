"""The picture of a run, read back from its pixels."""

import numpy as np
import PIL.Image
import pytest

from hf_ibdistill.publishing.picture import plot_run


GREEN = (0, 200, 90)
# The first two colors of lines in matplotlib, and the one of wrong predictions.
BLUE, ORANGE, CRIMSON = (31, 119, 180), (255, 127, 14), (220, 20, 60)


def history(start):
    entries = [{"step": 5, "loss": 1.0}]
    for step in (10, 20, 30):
        metrics = {"eval_accuracy": start + step / 100, "eval_negative_log_likelihood": 2 / step}
        entries.append({"step": step, **metrics})
    return [*entries, {"step": 30, "train_runtime": 1.0}]


def draw(path, runs=1, images=1, **predictions):
    names = ["cat", "dog", "owl"][:images]
    plot_run(
        path,
        {f"run {i}": history(0.1 * i) for i in range(runs)},
        [PIL.Image.new("RGB", (8, 8), GREEN)] * images,
        names,
        {"class": names, "conv": names, **predictions},
    )
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of one run and image, and of two runs and three images, with right predictions only."""
    folder = tmp_path_factory.mktemp("pictures")
    return draw(folder / "small.png"), draw(str(folder / "large.png"), runs=2, images=3)


def count(pixels, color):
    # Lines and letters have soft edges.
    return int((np.abs(pixels - color).max(axis=-1) <= 40).sum())


def test_every_run_has_a_curve(pictures):
    one, two = pictures
    assert count(one, BLUE) > 100 and count(two, BLUE) > 100
    assert count(one, ORANGE) == 0 and count(two, ORANGE) > 100


def test_every_image_is_shown(pictures):
    for pixels, images in zip(pictures, (1, 3)):
        columns = (np.abs(pixels - GREEN).max(axis=-1) <= 12).sum(axis=0) > 20
        begins = np.flatnonzero(np.diff(np.pad(columns.astype(int), 1)) == 1)
        assert len(begins) == images


@pytest.mark.parametrize("names", [["dog", "dog"], ["cat", "cat"]], ids=["first image", "second image"])
def test_wrong_predictions_stand_out(names, pictures, tmp_path):
    assert [count(right, CRIMSON) for right in pictures] == [0, 0]
    assert count(draw(tmp_path / "wrong.png", images=2, conv=names), CRIMSON) > 20
