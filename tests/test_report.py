"""Tables and plots."""

import re
import statistics

import numpy as np
import PIL.Image
import pytest

from hf_ibdistill.report import markdown_table, mean_and_spread, plot_run


GREEN = (0, 200, 90)
# matplotlib's first two line colours, and the one for wrong predictions
BLUE, ORANGE, CRIMSON = (31, 119, 180), (255, 127, 14), (220, 20, 60)


def test_table():
    expected = "| run | accuracy |\n| --- | --- |\n| plain | 0.5 |\n| distilled | 71 % |"
    assert markdown_table(["run", "accuracy"], [["plain", 0.5], ("distilled", "71 %")]) == expected
    assert markdown_table(["run"], []) == "| run |\n| --- |"


def test_a_bar_in_a_cell_does_not_begin_another_cell():
    # https://github.github.com/gfm/#example-200
    line = markdown_table(["setting", "value"], [["recipe", "crop|flip"]]).splitlines()[2]
    cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells == ["recipe", "crop|flip"]


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.913, 0.921, 0.9, 0.87], [0.25, 0.25]])
def test_mean_and_spread(values):
    expected = f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert mean_and_spread(values) == expected


def test_one_run_has_no_spread():
    assert mean_and_spread([0.9137]) == "91.4"


def history(start):
    entries = [{"step": 5, "loss": 1.0}]
    for step in (10, 20, 30):
        metrics = {"eval_accuracy": start + step / 100, "eval_negative_log_likelihood": 2 / step}
        entries.append({"step": step, **metrics})
    return [*entries, {"step": 30, "train_runtime": 1.0}]


def draw(path, runs=1, images=1, predictions=None):
    names = ["cat", "dog", "owl"][:images]
    plot_run(
        path,
        {f"run {i}": history(0.1 * i) for i in range(runs)},
        [PIL.Image.new("RGB", (8, 8), GREEN)] * images,
        names,
        predictions or {"class": names, "conv": names},
    )
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count(pixels, colour):
    # Lines and letters have soft edges.
    return int((np.abs(pixels - colour).max(axis=-1) <= 40).sum())


def test_plots_show_a_curve_for_each_run(tmp_path):
    one, two = draw(tmp_path / "one.png", runs=1), draw(str(tmp_path / "two.png"), runs=2)
    assert count(one, BLUE) > 100 and count(two, BLUE) > 100
    assert count(one, ORANGE) == 0 and count(two, ORANGE) > 100


@pytest.mark.parametrize("images", [1, 3])
def test_plots_show_every_image(images, tmp_path):
    pixels = draw(tmp_path / "plot.png", images=images)
    columns = (np.abs(pixels - GREEN).max(axis=-1) <= 12).sum(axis=0) > 20
    # Stretches of columns with green in them: an image each.
    assert (np.diff(columns.astype(int)) == 1).sum() == images


@pytest.mark.parametrize("wrong_names", [["dog", "dog"], ["cat", "cat"]], ids=["first image", "second image"])
def test_wrong_predictions_stand_out(wrong_names, tmp_path):
    right = {"class": ["cat", "dog"], "conv": ["cat", "dog"]}
    wrong = {"class": ["cat", "dog"], "conv": wrong_names}
    assert count(draw(tmp_path / "right.png", images=2, predictions=right), CRIMSON) == 0
    assert count(draw(tmp_path / "wrong.png", images=2, predictions=wrong), CRIMSON) > 20


def test_the_machine_is_described_in_json():
    import json

    from hf_ibdistill.report import describe_machine

    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cores"] >= 1 and machine["memory_gb"] > 0
    assert machine["versions"]["transformers"].split(".")[0] >= "5"
