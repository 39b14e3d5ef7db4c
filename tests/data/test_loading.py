"""Opening a dataset from end to end: source, splits, columns, classes."""

from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from numbered import ANIMALS, NAMED, label_names, numbers, picture, save, table, write_class_folders
from sklearn.datasets import load_digits

from hf_ibdistill import load_image_dataset


def test_every_split_has_the_columns_image_and_label(tmp_path):
    features = Features(
        {"mask": Image(), "scan": Image(), "color": ClassLabel(names=["red"]), "kind": Value("string")}
    )
    rows = {"mask": [picture(100)] * 6, "scan": [picture(n) for n in range(6)], "color": [0] * 6, "kind": ANIMALS * 2}
    full = Dataset.from_dict(rows, features=features)
    source = save(tmp_path, train=full, val=full.select([4]), testing=full.select([2, 0]))
    splits = load_image_dataset(source, image_column="scan", label_column="kind")
    assert splits.keys() == {"train", "validation", "test"}
    for split in splits.values():
        assert split.features == Features(
            {"mask": Image(), "image": Image(), "color": features["color"], "label": NAMED}
        )
        assert split["color"][:] == [0] * len(split) and numbers(split, "mask") == [100] * len(split)
    assert {name: (numbers(split), label_names(split)) for name, split in splits.items()} == {
        "train": (list(range(6)), ANIMALS * 2),
        "validation": ([4], ["dog"]),
        "test": ([2, 0], ["owl", "cat"]),
    }


def test_columns_that_cannot_be_found_are_named(tmp_path):
    train = table([0, 1, 2])
    source = save(tmp_path, train=train, validation=train.remove_columns("label"))
    for arguments, message in (
        ({}, '"validation".*"label".* image'),
        ({"image_column": "img"}, 'image_column="img".* image, label'),
        ({"label_column": "kind"}, 'label_column="kind".* image, label'),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(source, **arguments)


def test_a_part_of_the_training_split_becomes_the_validation_split(tmp_path, caplog):
    source = save(tmp_path, train=table([0, 1, 2] * 10), test=table([0, 1, 2], start=500))
    splits = load_image_dataset(source, validation_fraction=0.2, seed=7)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 6, "test": 3}
    # No row is in two splits, and the test split stays as it is.
    assert numbers(splits["test"]) == [500, 501, 502]
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(30))
    assert all(
        label_names(split) == [ANIMALS[n % 3] for n in numbers(split)] for split in splits.values() if len(split) > 3
    )
    assert str(source) in caplog.text and "seed 7" in caplog.text


def test_class_folders(tmp_path, caplog):
    write_class_folders(tmp_path / "data", ["owl", "cat", "dog"])
    splits = load_image_dataset(tmp_path / "data", validation_fraction=0.5)
    assert splits.keys() == {"train", "validation"}
    rows = {}
    for split in splits.values():
        assert split.features["label"].names == ANIMALS
        rows |= dict(zip(numbers(split), label_names(split)))
    assert rows == {0: "owl", 1: "owl", 10: "cat", 11: "cat", 20: "dog", 21: "dog"}
    assert "has no validation split" in caplog.text


def test_numbered_labels_of_a_source_become_classes(tmp_path):
    train = table([3, 1, 2, 3], Value("int64"))
    source = save(tmp_path, train=train, validation=train, test=table([1], Value("int64"), 10))
    splits = load_image_dataset(source)
    # A test split may lack some of the classes.
    assert splits["test"].features["label"].names == ["1", "2", "3"] and splits["test"]["label"][:] == [0]
    assert label_names(splits["train"]) == ["3", "1", "2", "3"]


def test_digits():
    splits, other = load_image_dataset("digits"), load_image_dataset("digits", seed=1)
    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8)
    expected = Counter((image.tobytes(), label) for image, label in zip(pixels, source.target))
    rows = [row for split in splits.values() for row in zip(*split[:].values())]
    # Equal counts of (image, label) pairs: nothing lost, nothing in two splits.
    assert Counter((np.asarray(image).tobytes(), label) for image, label in rows) == expected
    assert {name: len(split) for name, split in splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert splits["train"][0]["image"].size == (8, 8)
    assert all(split.features["label"].names == [str(i) for i in range(10)] for split in splits.values())
    # Results on the test split can be compared whatever the seed.
    encoded = [found["test"].cast_column("image", Image(decode=False))[:] for found in (splits, other)]
    assert encoded[0] == encoded[1]
    assert splits["train"]["label"][:] != other["train"]["label"][:]


def test_an_unlabeled_test_split_is_left_out(tmp_path, caplog):
    # Its −1 is no class, though the labels have no names.
    labeled = table([0, 1, 2], Value("int64"))
    source = save(tmp_path, train=labeled, validation=labeled, test=table([-1, -1], Value("int64")))
    splits = load_image_dataset(source)
    assert splits.keys() == {"train", "validation"}
    assert splits["train"].features["label"].num_classes == 3
    assert "test split has no labels" in caplog.text


def test_labels_that_do_not_fit_are_refused(tmp_path):
    for i, (parts, message) in enumerate(
        [
            ({"train": table([0.0, float("nan"), 1.0], Value("float64"))}, '"train" .*without a label'),
            (
                {"train": table(["cat", "dog"], Value("string")), "test": table(["owl"], Value("string"))},
                '"test" .*owl',
            ),
            ({"train": table([0, 1, 2]), "validation": table([0, -1])}, '"validation".*-1.*1'),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(save(tmp_path / str(i), **parts))


# The test split is never trained on


def test_a_test_split_alone_is_refused(tmp_path):
    for name in ("train", "test"):
        write_class_folders(tmp_path / "data" / name)
    (tmp_path / "parquet").mkdir()
    for name in ("train", "test"):
        table([0, 1, 2] * 4).to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    # Asked for alone.
    with pytest.raises(ValueError, match="split.*test"):
        load_image_dataset(tmp_path / "parquet", split="test")
    # Saved on its own: a table has the name of the split that it was loaded as, and saving keeps it.
    datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"), split="test").save_to_disk(
        tmp_path / "saved"
    )
    assert datasets.load_from_disk(tmp_path / "saved").split == "test"
    # A folder without another split.
    write_class_folders(tmp_path / "only" / "test")
    for source in ("saved", "only"):
        with pytest.raises(ValueError, match=f'{source} has no split "train".* test'):
            load_image_dataset(tmp_path / source)
    with pytest.raises(ValueError, match='no split "train".* test, validation'):
        load_image_dataset(save(tmp_path, test=table([0, 1]), validation=table([0, 1])))


def test_empty_splits_are_refused(tmp_path):
    (tmp_path / "parquet").mkdir()
    full = table([0, 1, 2])
    full.to_parquet(tmp_path / "parquet" / "train.parquet")
    full.select([]).to_parquet(tmp_path / "parquet" / "validation.parquet")
    for source in (tmp_path / "parquet", save(tmp_path, train=full, validation=full.select([]))):
        with pytest.raises(ValueError, match='"validation" .*(no data|is empty)'):
            load_image_dataset(source)
