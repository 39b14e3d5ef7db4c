"""Every benchmark runs at its smallest size. `python -m pytest benchmarks`"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ONCE = ["--repetitions", "1"]
FLAGS = {
    "deit": [*ONCE, "--num_rows", "2", "--batch_size", "2", "--steps", "1", "--num_classes", "10"],
    "export": [*ONCE, "--batch_sizes", "1", "--images", "1"],
    "freed_memory": [*ONCE, "--models", "convolution teacher", "--batch_size", "2", "--steps", "1"],
    "involution": [*ONCE, "--large_size", "64", "--large_batch_size", "1", "--small_sizes", "8", "--small_batch_size", "2"],
    "loading": [*ONCE, "--rows", "20", "40", "--classes", "10", "--rows_read", "8", "--num_views", "2"],
    "memory": ["--num_rows", "300", "--num_classes", "10", "--megapixels", "0.01", "--num_photos", "2"],
    "reading": [*ONCE, "--num_images", "20", "--side", "8", "--batch_size", "8"],
    "recording": [
        *ONCE, "--teachers", *["convolution-small"] * 4, "--images", "8", "--batch_size", "4", "--light_sizes", "16",
        "--light_images", "32", "--light_batch_size", "16", "--num_classes", "10",
    ],
    "rehearsal": [
        "--rows", "96", "--num_classes", "20", "--num_views", "2", "--batch_size", "16", "--shard_size", "8", "--kills", "1",
        "--steps", "10", "--train_batch_size", "8",
    ],
    "scale": ["--rows", "50", "100", "--num_views", "2", "--repetitions", "1"],
    "several_students": [
        *ONCE, "--num_students", "1", "2", "--photo_size", "40", "30", "--image_size", "16", "--num_photos", "8", "--epochs",
        "1", "--num_views", "4", "--batch_size", "4",
    ],
    "storage": [
        "--rows", "20", "--num_views", "2", "--top_k", "10", "--temperatures", "2", "--teacher_steps", "2",
        "--teacher_images", "32", "--batch_size", "16", "--packed", "26", "--student_steps", "1", "--student_seeds", "0",
    ],
    "streaming": [*ONCE, "--rows", "40", "--files", "2", "--num_workers", "0"],
    # Against itself, because a clone may lack the history.
    "versions": [
        *ONCE, "--old", ".", "--steps", "read_batch", "record_photos", "attach_digits", "publish", "--num_rows", "50", "--num_views", "2", "--num_files", "40", "--num_predictions", "20",
        "--num_classes", "10", "--num_recorded", "4", "--num_recorded_rows", "8", "--num_attached", "20", "--num_photos", "2", "--megapixels", "0.01",
        "--num_published", "8", "--teacher_steps", "1", "--teacher_images", "32", "--teacher_batch_size", "8",
    ],
    "views_accuracy": [
        "--images_per_class", "4", "--num_test", "20", "--photo_size", "24", "--image_size", "16", "--teacher_size", "8",
        "--num_views", "4", "--steps", "2", "--seeds", "0", "--teacher_steps", "2", "--batch_size", "8",
    ],
    "views_per_image": [
        *ONCE, "--photo_size", "40", "30", "--image_size", "16", "--num_photos", "8", "--epochs", "1", "--num_views", "4",
        "--batch_size", "4",
    ],
    "training": [*ONCE, "--image_size", "8", "--num_rows", "16", "--batch_size", "8", "--steps", "1"],
}  # fmt: skip


def run(name, *flags):
    """`python benchmarks/name.py flags` from the root of the repository; its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figures(value):
    """All numbers of a JSON value that were measured."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from figures(part)
    elif isinstance(value, float):
        yield value


def refuse(constant):
    raise ValueError(f"The results hold {constant}.")


@pytest.mark.parametrize("name", FLAGS)
def test_figures_are_finite(name, tmp_path):
    output = run(name, *FLAGS[name], "--output_file", str(tmp_path / "results.json"))
    # JSON has no NaN and no infinity; Python reads them as constants.
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert results.pop("machine")["cores"] >= 1 and results.pop("arguments")
    peaks = [
        value for row in results.get("rows", []) for step in row["peak_bytes"].values() for value in step.values()
    ]
    assert max([*figures(results), *peaks]) > 0
    assert "| --- |" in output
    # Tables that it trained and recorded are removed.
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_profiles_name_operators(tmp_path):
    run("profile_steps", "--batch_size", "4", "--num_views", "2", "--output_dir", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recording.txt", "training.txt"]
    assert all("aten::" in path.read_text() for path in tmp_path.iterdir())
