"""The predictions for each row: what they hold, and which rows are the same."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Image
from safetensors import safe_open
from small import NAMES, make_images

from hf_ibdistill.evaluation import classification_metrics
from hf_ibdistill.publishing.predictions import Predictions, Rows


def outputs(dataset, num_teachers=2, seed=0, num_classes=3):
    random = np.random.default_rng(seed)
    shape = (len(dataset), num_classes)
    heads = random.normal(size=(len(dataset), num_teachers, num_classes))
    found = {"logits": random.normal(size=shape), "labels": np.array(dataset["label"])}
    return {**found, "class_logits": random.normal(size=shape), "teacher_token_logits": heads}


@pytest.fixture(scope="module")
def images():
    return make_images(50)


def test_they_are_those_of_the_logits(images):
    given = outputs(images)
    found = Predictions.of_outputs(given, images, ["conv", "inv"])
    metrics = classification_metrics(given["logits"], given["labels"])
    probabilities = torch.tensor(given["logits"]).softmax(-1)
    assert found.is_right.mean() == pytest.approx(metrics["accuracy"])
    assert -found.log_probability.mean() == pytest.approx(metrics["negative_log_likelihood"], rel=1e-6)
    np.testing.assert_allclose(found.confidence, probabilities.max(-1).values, rtol=1e-6)
    np.testing.assert_array_equal(found.predicted, probabilities.argmax(-1))
    assert list(found.tokens) == ["class token", "conv", "inv"]
    np.testing.assert_array_equal(found.tokens["class token"], given["class_logits"].argmax(-1))
    np.testing.assert_array_equal(found.tokens["inv"], given["teacher_token_logits"][:, 1].argmax(-1))
    alone = outputs(images, num_teachers=0)
    assert Predictions.of_outputs(alone, images, []).tokens == {}


def test_nan_comes_last_as_in_the_accuracy(images):
    given = {name: outputs(images)[name] for name in ("logits", "labels")}
    given["logits"][::2, 0] = np.nan
    given["logits"][1] = np.nan
    found = Predictions.of_outputs(given, images)
    assert found.is_right.mean() == classification_metrics(**given)["accuracy"]


@pytest.mark.parametrize(("num_classes", "row", "token"), [(3, 10, 1), (256, 10, 1), (257, 12, 2), (65_536, 12, 2)])
def test_a_file_keeps_them_in_few_bytes(num_classes, row, token, images, tmp_path):
    names = [f"class {i}" for i in range(num_classes)]
    random = np.random.default_rng(0)
    rows = Rows(random.integers(0, num_classes, 100), names, "0123")
    classes = [random.integers(0, num_classes, 100) for _ in range(3)]
    numbers = [random.random(100).astype(np.float32) for _ in range(2)]
    given = Predictions(rows, classes[0], *numbers, {"class token": classes[1], "conv": classes[2]})
    given.save(tmp_path / "p.safetensors")
    found = Predictions.load(tmp_path / "p.safetensors")
    for name in ("predicted", "confidence", "log_probability"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    np.testing.assert_array_equal(found.rows.labels, rows.labels)
    assert found.rows[1:] == (names, "0123") and list(found.tokens) == ["class token", "conv"]
    np.testing.assert_array_equal(found.tokens["conv"], classes[2])
    assert found.rows.difference(rows) is None
    with safe_open(tmp_path / "p.safetensors", "numpy") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert size == 100 * (row + 2 * token)


def test_a_damaged_file_is_named(images, tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="p.safetensors"):
        Predictions.load(path)
    given = Predictions.of_outputs(outputs(images), images, ["conv", "inv"])
    given.rows = given.rows._replace(class_names=NAMES[:2])
    given.save(path)
    content = path.read_bytes()
    for damaged in (content, content[:100], b"{}", content.replace(b'"tokens"', b'"xokens"')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="p.safetensors is damaged"):
            Predictions.load(path)


def test_rows_are_known_by_classes_labels_and_pixels(images):
    def jpeg(row):
        buffer = io.BytesIO()
        row["image"].save(buffer, "BMP")
        return {"image": {"bytes": buffer.getvalue(), "path": None}}

    first = Rows.of(images)
    encoded = images.map(jpeg, features=images.features.copy())
    assert encoded.cast_column("image", Image(decode=False))[0]["image"]["bytes"][:2] == b"BM"
    assert first.difference(Rows.of(encoded)) is None
    changed = images.map(lambda row: {"image": PIL.Image.new("L", (8, 8))}, features=images.features.copy())
    for other, message in (
        (changed, "images differ"),
        (images.select(range(49)), "50 and 49 rows"),
        (images.select([*range(48), 49, 48]), "the labels of 2 of 50 rows"),
        (images.cast_column("label", type(images.features["label"])(names=["cat", "dog", "owl"])), "3 classes"),
    ):
        assert message in first.difference(Rows.of(other))
