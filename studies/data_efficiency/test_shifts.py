"""Changes of images, and the accuracy on them."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from scipy.stats import ttest_rel

from hf_ibdistill import load_image_dataset
from studies.data_efficiency import shifts, study


def photo(seed=0, size=32):
    """Smooth, as photos are, and bright, so that black shows."""
    coarse = np.random.default_rng(seed).integers(60, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", shifts.KINDS)
def test_a_change_grows_with_its_strength_and_is_always_the_same(kind):
    distances = np.zeros(5)
    for seed in range(8):
        image = photo(seed)
        before = image.tobytes()
        for strength in shifts.STRENGTHS:
            changed = shifts.change(image, kind, strength)
            assert changed.size == image.size and changed.mode == "RGB" and image.tobytes() == before
            assert changed.tobytes() == shifts.change(photo(seed), kind, strength).tobytes()
            distances[strength - 1] += np.abs(np.asarray(changed, float) - np.asarray(image, float)).mean()
    assert distances[0] > 0 and (np.diff(distances) > 0).all()


def test_changes_are_what_numpy_makes_of_the_pixels():
    image = photo()
    pixels = np.asarray(image, float)
    # One of four shifts by three pixels.
    found = np.asarray(shifts.change(image, "shift", 3))
    expected = []
    for axis in (0, 1):
        for distance in (3, -3):
            moved = np.roll(pixels, distance, axis)
            gap = slice(0, 3) if distance > 0 else slice(-3, None)
            moved[(gap, slice(None))[:: 1 if axis == 0 else -1]] = 0
            expected.append(moved)
    assert sum(np.array_equal(found, moved) for moved in expected) == 1
    # The mean gray level stays, and distances from it shrink to 1 − 0.17 · 2.
    gray = round(float((pixels @ [0.299, 0.587, 0.114]).mean()))
    np.testing.assert_allclose(np.asarray(shifts.change(image, "contrast", 2)), gray + 0.66 * (pixels - gray), atol=2)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=25)
    assert np.array_equal(np.asarray(shifts.change(image, "jpeg", 3)), np.asarray(PIL.Image.open(file)))
    flat = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
    noise = np.asarray(shifts.change(flat, "noise", 2), float) - 128
    assert noise.std() == pytest.approx(20, rel=0.03) and abs(noise.mean()) < 1
    assert not np.array_equal(noise, np.asarray(shifts.change(flat, "noise", 2, seed=1), float) - 128)


def test_the_models_of_the_study_are_measured_and_compared(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (results / "recipes.json").write_text(json.dumps({"conv": {}, "undistilled": {}}))
    given = [
        "--name",
        "digits",
        "--images",
        "200",
        "--results_dir",
        str(results),
        "--work_dir",
        str(tmp_path / "work"),
    ]
    with pytest.raises(ValueError, match="no models in .*200_0/conv_base"):
        shifts.main([*given, "--methods", "conv", "--seeds", "0"])
    steps = ["--teacher_steps", "20", "--student_steps", "2", "--bf16", "false"]
    study.main([*given, *steps, "--methods", "conv", "undistilled", "--seeds", "0"])
    measured = [*given, "--methods", "conv", "undistilled", "--seeds", "0", "--num_images", "60"]
    shifts.main(measured)
    cell = json.loads((results / "shifts/200_conv_base_0.json").read_text())
    of_study = json.loads((results / "grid/200_conv_base_0.json").read_text())
    labels = load_image_dataset("digits")["test"]["label"][:60]
    predictions = [int(digit) for digit in of_study["predictions"][:60]]
    assert cell["clean"] == pytest.approx(np.mean([a == b for a, b in zip(predictions, labels)]))
    assert cell["accuracy"].keys() == shifts.KINDS.keys() == cell["consistency"].keys()
    assert all(len(values) == 5 for part in ("accuracy", "consistency") for values in cell[part].values())
    # The table of the cells, which are not measured again.
    capsys.readouterr()
    shifts.main(measured)
    rows = capsys.readouterr().out.splitlines()
    mean = 100 * np.mean([value for values in cell["accuracy"].values() for value in values])
    assert len(rows) == 4 and f" | {mean:.1f} | " in rows[2]


def test_accuracies_by_strength_begin_with_the_unchanged_image_and_end_in_a_mean(tmp_path):
    random, cells = np.random.default_rng(0), {}
    for name in ("5000_conv_base_0", "5000_conv_base_1", "5000_conv_linear_0", "1000_conv_base_0"):
        accuracy = {kind: random.random(5).tolist() for kind in shifts.KINDS}
        cells[name] = {"clean": random.random(), "accuracy": accuracy}
        (tmp_path / f"{name}.json").write_text(json.dumps(cells[name]))
    found = shifts.accuracies_by_strength(shifts.read_shifts(tmp_path, 5000))
    pair = [cells[f"5000_conv_base_{seed}"] for seed in (0, 1)]
    unchanged = tuple(cell["clean"] for cell in pair)
    assert list(found) == [*shifts.KINDS, "mean of the changes"]
    for kind in shifts.KINDS:
        changed = {i + 1: tuple(cell["accuracy"][kind][i] for cell in pair) for i in range(5)}
        assert found[kind] == {"convolution teacher": {0: unchanged, **changed}}
    by_strength = found["mean of the changes"]["convolution teacher"]
    assert by_strength[0] == pytest.approx(unchanged)
    for i in range(5):
        expected = [sum(values[i] for values in cell["accuracy"].values()) / 7 for cell in pair]
        assert by_strength[i + 1] == pytest.approx(expected)


def test_differences_are_of_the_seeds_that_both_have():
    def cell(value):
        values = {kind: [value] * 5 for kind in shifts.KINDS}
        return {"clean": value, "accuracy": values, "consistency": values}

    cells = {
        "undistilled": {0: cell(0.5), 1: cell(0.6), 2: cell(0.9)},
        "both_views": {0: cell(0.7), 1: cell(0.65)},
    }
    interval = ttest_rel([0.7, 0.65], [0.5, 0.6]).confidence_interval()
    row = shifts.shift_table(cells).splitlines()[3]
    assert row.endswith(f"+12.50 ({100 * interval.low:+.2f} … {100 * interval.high:+.2f}) |")
