"""Rows of a table on disk → batches."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_from_disk
from transformers import ViTImageProcessor

from hf_ibdistill.images import decode_image
from hf_ibdistill.training.collator import DistillationCollator


NUM_ROWS, NUM_CLASSES = 6, 3
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (NUM_ROWS, 8, 8, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0, 2]
LOGITS = {name: RNG.normal(size=(NUM_ROWS, NUM_CLASSES)) for name in ("conv", "inv", "third")}


def image_processor(size=8, mean=0.5):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[0.5] * 3)


def read_rows(folder, teachers, dtype="float16", image_column="image", label_column="label"):
    """Decoded rows of a table whose logits columns have the order of `teachers`."""
    features = {image_column: Image(), label_column: ClassLabel(num_classes=NUM_CLASSES)}
    columns = {image_column: list(PIXELS), label_column: LABELS}
    for name in teachers:
        features[f"{name}_logits"] = List(Value(dtype), length=NUM_CLASSES)
        columns[f"{name}_logits"] = list(LOGITS[name])
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(folder)
    table = load_from_disk(folder)
    logits = {name: np.array(table[f"{name}_logits"], dtype=dtype) for name in teachers}
    return [{**row, **{f"{name}_logits": logits[name][i] for name in teachers}} for i, row in enumerate(table)]


@pytest.mark.parametrize("columns", [("conv", "inv", "third"), ("third", "inv", "conv"), ("inv", "third", "conv")])
@pytest.mark.parametrize("names", [("conv", "inv", "third"), ("inv", "conv"), ("third",)])
def test_teachers_are_stacked_in_the_order_of_the_names(names, columns, tmp_path):
    batch = DistillationCollator(image_processor(), teacher_names=names)(read_rows(tmp_path, columns))
    expected = np.stack([LOGITS[name].astype(np.float16) for name in names], axis=1)
    assert batch["teacher_logits"].shape == (NUM_ROWS, len(names), NUM_CLASSES)
    np.testing.assert_array_equal(batch["teacher_logits"].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_keep_their_stored_type(dtype, tmp_path):
    batch = DistillationCollator(image_processor(), teacher_names=["conv"])(read_rows(tmp_path, ["conv"], dtype))
    assert batch["teacher_logits"].dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(batch["teacher_logits"][:, 0].numpy(), LOGITS["conv"].astype(dtype))


def test_images_and_labels_keep_their_rows(tmp_path):
    batch = DistillationCollator(image_processor(), teacher_names=["conv"])(read_rows(tmp_path, ["conv"]))
    # (pixel / 255 − mean) / standard deviation, channels first.
    expected = (PIXELS.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=1e-6)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == LABELS and batch["labels"].dtype == torch.int64


def test_other_column_names(tmp_path):
    rows = read_rows(tmp_path, [], image_column="picture", label_column="animal")
    batch = DistillationCollator(image_processor(), "picture", "animal")(rows)
    assert set(batch) == {"pixel_values", "labels"} and batch["labels"].tolist() == LABELS


@pytest.mark.parametrize("columns", [(), ("conv",), ("inv",)])
def test_no_teacher_logits_unless_every_teachers_column_is_there(columns, tmp_path):
    batch = DistillationCollator(image_processor(), teacher_names=["conv", "inv"])(read_rows(tmp_path, columns))
    assert set(batch) == {"pixel_values", "labels"}


def test_no_teacher_logits_unless_asked_for(tmp_path):
    batch = DistillationCollator(image_processor())(read_rows(tmp_path, ["conv", "inv"]))
    assert set(batch) == {"pixel_values", "labels"}


def test_each_online_teacher_sees_the_images_of_its_own_processor(tmp_path):
    processors = {"same": image_processor(), "larger": image_processor(12), "darker": image_processor(mean=0.9)}
    collator = DistillationCollator(image_processor(), teacher_image_processors=processors)
    rows = read_rows(tmp_path, [])
    batch = collator(rows)
    assert set(batch) == {"pixel_values", "labels", "teacher_pixel_values"}
    images = [row["image"] for row in rows]
    assert set(batch["teacher_pixel_values"]) == set(processors)
    for name, processor in processors.items():
        expected = processor(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["teacher_pixel_values"][name], expected), name
    assert torch.equal(batch["pixel_values"], batch["teacher_pixel_values"]["same"])
    assert batch["teacher_pixel_values"]["larger"].shape == (NUM_ROWS, 3, 12, 12)
    assert not torch.equal(batch["pixel_values"], batch["teacher_pixel_values"]["darker"])


def test_images_of_several_sizes_and_modes_make_one_batch(tmp_path):
    greyscale = RNG.integers(0, 256, (20, 14), dtype=np.uint8)
    transparent = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=NUM_CLASSES)})
    table = {"image": [PIXELS[0], greyscale, transparent], "label": [0, 1, 2]}
    Dataset.from_dict(table, features=features).save_to_disk(tmp_path)
    table = load_from_disk(tmp_path).cast_column("image", Image(decode=False))
    rows = [{**row, "image": decode_image(row["image"])} for row in table]
    batch = DistillationCollator(image_processor())(rows)
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    # Greyscale: three equal channels.
    assert torch.equal(batch["pixel_values"][1, 0], batch["pixel_values"][1, 2])
