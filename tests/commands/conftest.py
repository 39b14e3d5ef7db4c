"""What the commands left, shared by all tests of commands: a dataset, two teachers, their table and a student."""

from types import SimpleNamespace

import pytest
from datasets import DatasetDict
from running import run
from small import make_images


# Evaluation after every epoch would take longer than training.
QUICK = ["--max_steps", "1", "--eval_strategy", "no", "--disable_tqdm"]


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """Folders of the main job, whose models took one step."""
    folder = tmp_path_factory.mktemp("outputs")
    images = make_images(54)
    splits = {"train": range(30), "validation": range(30, 42), "test": range(42, 54)}
    DatasetDict({name: images.select(rows) for name, rows in splits.items()}).save_to_disk(folder / "images")
    dataset = ["--dataset", folder / "images"]
    for name, preset in (("conv", "convolution-small"), ("inv", "involution-small")):
        run("train-teacher", *dataset, *QUICK, "--preset", preset, "--output_dir", folder / name)
    teachers = [f"{name}={folder / name}" for name in ("conv", "inv")]
    run("record", *dataset, "--teachers", *teachers, "--output_dir", folder / "table")
    run("distill", "--dataset", folder / "table", *QUICK, "--output_dir", folder / "student")
    names = ("images", "conv", "inv", "table", "student")
    return SimpleNamespace(root=folder, teachers=teachers, **{name: folder / name for name in names})
