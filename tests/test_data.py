"""Opening a data set: every form a source can have, the classes it gets, and the splits it is divided into."""

import gzip
import json
import struct
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from sklearn.datasets import load_digits
from torchvision.datasets.mnist import read_image_file

from hf_ibdistill.data import (
    check_class_names,
    class_config,
    class_names,
    find_columns,
    load_image_dataset,
    select_per_class,
)


ANIMALS = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number):
    """Tells its number by its colour."""
    return PIL.Image.new("RGB", (2, 2), (number % 256, number // 256, 7))


def numbers(split, image_column="image"):
    found = []
    for image in split[image_column]:
        red, green, _ = image.convert("RGB").getpixel((0, 0))
        found.append(red + 256 * green)
    return found


def table(labels, feature, start=0):
    """A row for each label; the pictures are numbered from `start`."""
    rows = {"image": [picture(start + i) for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": feature}))


def save(tmp_path, **splits):
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def named_labels(split):
    names = split.features["label"].names
    return [names[label] for label in split["label"]]


# Digits


def digit_counts(splits):
    rows = [row for split in splits for row in split]
    return Counter((np.asarray(row["image"]).tobytes(), row["label"]) for row in rows)


def test_digits():
    splits, other_seed = load_image_dataset("digits"), load_image_dataset("digits", seed=1)

    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8)
    expected = Counter((image.tobytes(), label) for image, label in zip(pixels, source.target))
    # Equal counts of (image, label) pairs: nothing lost, nothing in two splits.
    assert digit_counts(splits.values()) == expected and expected.total() == 1797
    assert splits["train"][0]["image"].size == (8, 8)
    assert all(split.features["label"].names == [str(i) for i in range(10)] for split in splits.values())
    # Results on the test split can be compared whatever the seed.
    assert splits["test"][:] == other_seed["test"][:]
    assert splits["train"]["label"][:] != other_seed["train"]["label"][:]
    assert len(splits["test"]) == 360 and len(splits["validation"]) == 144


# Forms of a source


def write_class_folders(root, classes, start=0):
    """Two pictures a class; their numbers tell the class: 10 · position + 0 and 1."""
    for position, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(2):
            picture(start + 10 * position + i).save(root / name / f"{i}.png")


def test_class_folders_without_split_folders(tmp_path):
    write_class_folders(tmp_path / "data", ["owl", "cat", "dog"])
    splits = load_image_dataset(tmp_path / "data", validation_fraction=0.5)
    assert splits.keys() == {"train", "validation"}
    rows = {}
    for split in splits.values():
        assert split.features["label"].names == ANIMALS
        rows |= dict(zip(numbers(split), named_labels(split)))
    assert rows == {0: "owl", 1: "owl", 10: "cat", 11: "cat", 20: "dog", 21: "dog"}


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("test", ["test", None])
def test_class_folders_with_split_folders(validation, test, tmp_path, caplog):
    for start, name in ((0, "train"), (100, validation), (200, test)):
        if name:
            write_class_folders(tmp_path / "data" / name, ANIMALS, start)
    splits = load_image_dataset(str(tmp_path / "data"))
    assert splits.keys() == {"train", "validation", *([test] if test else [])}
    for start, name in ((0, "train"), (100, "validation"), (200, test)):
        if name:
            assert sorted(numbers(splits[name])) == [start + n for n in (0, 1, 10, 11, 20, 21)]
            assert all(ANIMALS[(n - start) // 10] == label for n, label in zip(numbers(splits[name]), named_labels(splits[name])))  # fmt: skip
    assert "has no validation split" not in caplog.text


def test_saved_table(tmp_path):
    table([0, 1, 2] * 10, ClassLabel(names=ANIMALS)).save_to_disk(tmp_path / "data")
    splits = load_image_dataset(tmp_path / "data", validation_fraction=0.2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 6}
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(30))


@pytest.mark.parametrize("validation", ["validation", "valid", "val"])
def test_saved_tables_with_splits(validation, tmp_path):
    names = ClassLabel(names=ANIMALS)
    parts = {"train": table([0, 1, 2], names), validation: table([2, 1], names, 10), "testing": table([0], names, 20)}
    splits = load_image_dataset(save(tmp_path, **parts))
    assert {name: numbers(split) for name, split in splits.items()} == {
        "train": [0, 1, 2],
        "validation": [10, 11],
        "test": [20],
    }
    assert splits["validation"]["label"][:] == [2, 1]


def test_parquet_file(tmp_path):
    table([0, 1, 2] * 10, ClassLabel(names=ANIMALS)).to_parquet(tmp_path / "data.parquet")
    splits = load_image_dataset(tmp_path / "data.parquet", validation_fraction=0.2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 6}
    for split in splits.values():
        assert split.features["label"].names == ANIMALS
        assert split["label"][:] == [number % 3 for number in numbers(split)]


def test_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    for start, name in ((0, "train"), (10, "val"), (20, "test")):
        file = tmp_path / "data" / f"{name}-00000-of-00001.parquet"
        table(["owl", "cat", "dog"], Value("string"), start).to_parquet(file)
    splits = load_image_dataset(tmp_path / "data")
    assert {name: numbers(split) for name, split in splits.items()} == {
        "train": [0, 1, 2],
        "validation": [10, 11, 12],
        "test": [20, 21, 22],
    }
    for split in splits.values():
        assert named_labels(split) == ["owl", "cat", "dog"]


def test_one_split_of_another_name_is_trained_on_and_said_so(tmp_path, caplog):
    names = ClassLabel(names=ANIMALS)
    source = save(tmp_path, full=table([0, 1, 2], names), val=table([0], names, 10))
    splits = load_image_dataset(source)
    assert numbers(splits["train"]) == [0, 1, 2] and numbers(splits["validation"]) == [10]
    assert 'has no split "train": training on "full"' in caplog.text


# IDX files


def write_idx(path, array, compress=False):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", length) for length in array.shape)
    (gzip.open if compress else open)(path, "wb").write(header + array.astype(np.uint8).tobytes())


def write_idx_folder(folder, compress=False, **counts):
    """prefix → number of images."""
    random, arrays, suffix = np.random.default_rng(0), {}, ".gz" if compress else ""
    for prefix, count in counts.items():
        arrays[prefix] = random.integers(0, 256, (count, 5, 4)), np.arange(count) % 3
        for array, part in zip(arrays[prefix], ("images-idx3-ubyte", "labels-idx1-ubyte")):
            write_idx(folder / f"{prefix}-{part}{suffix}", array, compress)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(compress, tmp_path):
    arrays = write_idx_folder(tmp_path, compress, train=40, t10k=9)
    splits = load_image_dataset(tmp_path, validation_fraction=0.25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "validation": 10, "test": 9}
    assert splits["train"].features["label"].names == ["0", "1", "2"]
    images, labels = arrays["t10k"]
    assert splits["test"]["label"][:] == labels.tolist()
    for image, expected in zip(splits["test"]["image"], images):
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_an_idx_test_split_may_lack_some_of_the_classes(tmp_path):
    write_idx_folder(tmp_path, train=40, t10k=2)
    splits = load_image_dataset(tmp_path)
    assert splits["test"].features["label"].names == ["0", "1", "2"] and splits["test"]["label"][:] == [0, 1]


def test_idx_files_as_torchvision_reads_them(tmp_path):
    write_idx_folder(tmp_path, train=12)
    expected = read_image_file(str(tmp_path / "train-images-idx3-ubyte"))
    splits = load_image_dataset(tmp_path, validation_fraction=0.25)
    found = {np.asarray(image).tobytes() for split in splits.values() for image in split["image"]}
    assert found == {image.numpy().tobytes() for image in expected}


def test_damaged_idx_files_are_named(tmp_path):
    write_idx_folder(tmp_path, train=12)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for content in (b"", whole[:2], b"PNG" + whole, whole[:-1], whole + b"x"):
        images.write_bytes(content)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file"):
            load_image_dataset(tmp_path)
    images.write_bytes(whole)
    write_idx(labels, np.arange(11))
    with pytest.raises(ValueError, match=r"holds an array \(12, 5, 4\) and .* an array \(11,\)"):
        load_image_dataset(tmp_path)
    labels.unlink()
    with pytest.raises(ValueError, match="has IDX files, but not train-images-idx3-ubyte and train-labels-idx1-ubyte"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/nothing", "There is no folder or file .*nothing"),
        ("./nothing", "There is no folder or file ./nothing"),
        ("some/where/else", "There is no folder or file some/where/else"),
    ],
)
def test_missing_path(source, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        load_image_dataset(source.format(tmp=tmp_path))


def test_file_that_is_not_parquet(tmp_path):
    (tmp_path / "data.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"data\.csv is a file but not Parquet; give a folder, a \.parquet file"):
        load_image_dataset(tmp_path / "data.csv")


# Columns


def wide_table(*image_columns, label_columns=("label",)):
    features = Features(
        {name: Image() for name in image_columns}
        | {name: ClassLabel(names=ANIMALS) for name in label_columns}
        | {"width": Value("int64")}
    )
    rows = {name: [picture(100 * i + n) for n in range(6)] for i, name in enumerate(image_columns)}
    rows |= {name: [0, 1, 2] * 2 for name in label_columns} | {"width": [2] * 6}
    return Dataset.from_dict(rows, features=features)


def test_of_several_image_columns_the_usual_name_wins():
    assert find_columns(wide_table("mask", "image")) == ("image", "label")
    assert find_columns(wide_table("mask", "image"), image_column="mask") == ("mask", "label")
    assert find_columns(wide_table("scan")) == ("scan", "label")
    labels = ("coarse", "fine_label")
    assert find_columns(wide_table("scan", label_columns=labels)) == ("scan", "fine_label")
    assert find_columns(wide_table("scan", label_columns=labels), label_column="coarse") == ("scan", "coarse")


def test_given_columns_are_used_and_the_others_kept(tmp_path):
    source = save(tmp_path, train=wide_table("image", "depth", label_columns=("label", "kind")))
    splits = load_image_dataset(source, image_column="depth", label_column="kind")
    assert set(splits["train"].column_names) == {"image", "depth", "label", "kind", "width"}
    assert sorted(numbers(splits["train"], "depth") + numbers(splits["validation"], "depth")) == list(range(100, 106))


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ((), {}, "There is no image column; the columns are label, width. Name it with image_column"),
        (
            ("a", "b"),
            {},
            "2 columns could be the image column; the columns are a, b, label, width. Name it with image_",
        ),
        (("image",), {"image_column": "img"}, 'There is no column "img"; the columns are image, label, width'),
        (("image",), {"label_column": "kind"}, 'There is no column "kind"; the columns are image, label, width'),
    ],
)
def test_column_errors_list_the_columns(columns, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(save(tmp_path, train=wide_table(*columns)), **arguments)


def test_label_column_errors_list_the_columns(tmp_path):
    with pytest.raises(
        ValueError, match="There is no label column; the columns are image, width. Name it with label_"
    ):
        find_columns(wide_table("image", label_columns=()))
    with pytest.raises(ValueError, match="2 columns could be the label column; the columns are image, a, b, width"):
        find_columns(wide_table("image", label_columns=("a", "b")))
    train = wide_table("image")
    source = save(tmp_path, train=train, validation=train.remove_columns("label"))
    with pytest.raises(ValueError, match='The split "validation" has no column "label"; its columns are image, width'):
        load_image_dataset(source)


# Classes


def test_string_labels_become_classes_in_alphabetical_order(tmp_path):
    splits = {
        "train": table(["owl", "cat", "dog", "cat"], Value("string")),
        "test": table(["dog"], Value("string"), 10),
    }
    splits["validation"] = table(["owl", "dog"], Value("string"), 20)
    splits = load_image_dataset(save(tmp_path, **splits))
    assert splits["train"]["label"][:] == [2, 0, 1, 0]
    assert splits["test"]["label"][:] == [1] and splits["validation"]["label"][:] == [2, 1]
    assert all(class_names(split, "label") == ANIMALS for split in splits.values())
    assert numbers(splits["train"]) == [0, 1, 2, 3]


def test_integer_labels_become_classes_in_numerical_order(tmp_path):
    values = [10, 2, 33, 1, 2]
    train, validation = table(values, Value("int64")), table(values, Value("int64"))
    splits = load_image_dataset(save(tmp_path, train=train, validation=validation))
    assert class_names(splits["train"], "label") == ["1", "2", "10", "33"]
    assert named_labels(splits["train"]) == ["10", "2", "33", "1", "2"]


def test_class_names_and_their_order_are_kept(tmp_path):
    names = ["owl", "cat", "dog", "unused"]
    train = table([2, 0, 1], ClassLabel(names=names))
    splits = load_image_dataset(save(tmp_path, train=train, validation=train))
    assert splits["train"]["label"][:] == [2, 0, 1]
    assert class_config(splits["train"]) == {
        "num_labels": 4,
        "id2label": {0: "owl", 1: "cat", 2: "dog", 3: "unused"},
        "label2id": {"owl": 0, "cat": 1, "dog": 2, "unused": 3},
    }


def test_columns_without_class_names_are_explained():
    message = r'The label column "label" is Value\(.*without class names.*dataset\.class_encode_column\("label"\)'
    with pytest.raises(ValueError, match=message):
        class_config(table(["cat"], Value("string")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "fox", "owl"], r"\['dog'\] only in the first, \['fox'\] only in the second"),
        (["cat", "dog"], r"\['owl'\] only in the first, \[\] only in the second"),
        (["dog", "cat", "owl"], r"the same names in another order \(\['cat', 'dog', 'owl'\] and \['dog', 'cat', 'owl'\]\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("other", ["validation", "test"])
def test_splits_with_other_class_names_are_refused(other, names, message, tmp_path):
    source = save(
        tmp_path,
        **{"train": table([0, 1, 2], ClassLabel(names=ANIMALS)), other: table([0, 1], ClassLabel(names=names))},
    )
    with pytest.raises(ValueError, match=f'The splits "train" and "{other}" have different classes: {message}'):
        load_image_dataset(source)


def test_a_class_that_nobody_trains_on_is_refused(tmp_path):
    # Otherwise the model gets an output for "owl", is never shown one and is tested on them.
    parts = {"train": table(["cat", "dog"] * 10, Value("string")), "test": table(["cat", "owl"], Value("string"), 50)}
    with pytest.raises(ValueError, match="owl"):
        load_image_dataset(save(tmp_path, **parts))


def test_a_split_may_lack_some_of_the_classes(tmp_path):
    parts = {"train": table(ANIMALS, Value("string")), "validation": table(["owl"], Value("string"), 50)}
    splits = load_image_dataset(save(tmp_path, **parts))
    assert splits["validation"]["label"][:] == [2]


# Labels


def test_label_out_of_range_names_the_row(tmp_path):
    source = save(tmp_path, train=table([0, 1, 2, 0, 2], ClassLabel(names=ANIMALS)))
    # Arrow stores numbers; it is the description beside them that says how many classes there are.
    description = source / "train" / "dataset_info.json"
    info = json.loads(description.read_text())
    info["features"]["label"]["names"] = ["cat", "dog"]
    description.write_text(json.dumps(info))
    message = r'Row 2 of the split "train" has label 2; there are 2 classes \(2 such rows\)'
    with pytest.raises(ValueError, match=message):
        load_image_dataset(source)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_some_rows_without_a_label_name_the_row(split, tmp_path):
    names = ClassLabel(names=ANIMALS)
    parts = {name: table([0, 1, 2], names) for name in ("train", "validation", "test")}
    parts[split] = table([0, -1, 2, -1], names)
    message = rf'Row 1 of the split "{split}" has label -1; there are 3 classes \(2 such rows\)'
    with pytest.raises(ValueError, match=message):
        load_image_dataset(save(tmp_path, **parts))


def test_null_labels_are_refused(tmp_path):
    source = save(tmp_path, train=table(["cat", None, "dog"], Value("string")))
    with pytest.raises(ValueError, match='The split "train" has rows without a label in column "label"'):
        load_image_dataset(source)


@pytest.mark.parametrize("feature", [ClassLabel(names=ANIMALS), Value("int64")], ids=["named", "integers"])
def test_an_unlabelled_test_split_is_left_out(feature, tmp_path, caplog):
    labelled = table([0, 1, 2], feature)
    source = save(tmp_path, train=labelled, validation=labelled, test=table([-1, -1], feature))
    splits = load_image_dataset(source)
    assert splits.keys() == {"train", "validation"}
    assert splits["train"].features["label"].num_classes == 3
    assert "test split carries no labels" in caplog.text


@pytest.mark.parametrize("shards", [{}, {"train": 1, "validation": 1, "test": 1}], ids=["no file", "an empty file"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_empty_splits_are_refused(split, shards, tmp_path):
    names = ClassLabel(names=ANIMALS)
    parts = {name: table([0, 1, 2], names) for name in ("train", "validation", "test")}
    parts[split] = parts[split].select([])
    # Left to itself, `save_to_disk` writes no file at all for a split without rows.
    DatasetDict(parts).save_to_disk(tmp_path / "data", num_shards=shards or None)
    with pytest.raises(ValueError, match=f'The split "{split}" of .*data is empty'):
        load_image_dataset(tmp_path / "data")


def test_an_empty_parquet_file_names_its_split(tmp_path):
    (tmp_path / "data").mkdir()
    full = table([0, 1, 2], ClassLabel(names=ANIMALS))
    full.to_parquet(tmp_path / "data" / "train.parquet")
    full.select([]).to_parquet(tmp_path / "data" / "validation.parquet")
    with pytest.raises(ValueError, match='"validation" .*(no data|is empty)'):
        load_image_dataset(tmp_path / "data")


def test_string_labels_where_the_splits_have_other_columns_besides(tmp_path):
    train = table(["cat", "dog", "owl"], Value("string"))
    test = table(["dog"], Value("string"), 10).add_column("source", ["web"])
    splits = load_image_dataset(save(tmp_path, train=train, validation=train, test=test))
    assert named_labels(splits["test"]) == ["dog"]


# Validation split


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_validation_split_is_stratified_disjoint_and_announced(seed, tmp_path, caplog):
    labels = [0] * 60 + [1] * 30 + [2] * 10
    source = save(tmp_path, train=table(labels, ClassLabel(names=ANIMALS)), test=table([0], ClassLabel(names=ANIMALS)))
    splits = load_image_dataset(source, validation_fraction=0.2, seed=seed)
    assert Counter(splits["validation"]["label"][:]) == {0: 12, 1: 6, 2: 2}
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(100))
    assert all(labels[n] == label for n, label in zip(numbers(splits["train"]), splits["train"]["label"]))
    assert (
        f"has no validation split: a stratified 20 of its 100 training images become one (seed {seed})" in caplog.text
    )
    assert "a random (" not in caplog.text


def test_the_validation_split_is_reproducible_by_its_seed(tmp_path):
    source = save(tmp_path, train=table([0, 1, 2] * 20, ClassLabel(names=ANIMALS)))
    first, again, other = (numbers(load_image_dataset(source, seed=seed)["validation"]) for seed in (5, 5, 6))
    assert first == again and sorted(first) != sorted(other)


def test_a_validation_split_that_is_there_is_used(tmp_path, caplog):
    names = ClassLabel(names=ANIMALS)
    source = save(tmp_path, train=table([0, 1, 2] * 4, names), validation=table([0, 1], names, 50))
    splits = load_image_dataset(source)
    assert numbers(splits["train"]) == list(range(12)) and numbers(splits["validation"]) == [50, 51]
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "fraction"),
    [
        pytest.param([0, 0, 0, 0, 1], 0.4, id="one image of a class"),
        pytest.param([0, 1, 2] * 4, 0.1, id="fewer images than classes"),
        pytest.param([0, 1], 0.1, id="two images"),
        pytest.param([0, 1, 0], 0.9, id="fraction rounds to every image"),
    ],
)
def test_too_few_images_are_split_at_random(labels, fraction, tmp_path, caplog):
    source = save(tmp_path, train=table(labels, ClassLabel(names=ANIMALS)))
    splits = load_image_dataset(source, validation_fraction=fraction)
    assert len(splits["train"]) > 0 and len(splits["validation"]) > 0
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(len(labels)))
    assert "a random (there are too few images to split by class)" in caplog.text


def test_a_random_split_is_not_called_stratified(tmp_path, caplog):
    load_image_dataset(save(tmp_path, train=table([0, 1, 2] * 4, ClassLabel(names=ANIMALS))))
    assert "a random (" in caplog.text
    assert "1 of its 12 training images" in caplog.text and "a stratified" not in caplog.text


def test_one_image_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="A training split of one image cannot be divided; add a validation split"):
        load_image_dataset(save(tmp_path, train=table([0], ClassLabel(names=ANIMALS))))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_validation_fraction_lies_between_0_and_1(fraction, tmp_path):
    source = save(tmp_path, train=table([0, 1, 2] * 4, ClassLabel(names=ANIMALS)))
    with pytest.raises(ValueError, match=f"validation_fraction lies between 0 and 1; got {fraction}"):
        load_image_dataset(source, validation_fraction=fraction)


# The test split is never trained on


@pytest.mark.parametrize("names", [["test"], ["validation"], ["test", "validation"], ["a", "b"]])
def test_a_source_without_a_training_split_is_refused(names, tmp_path):
    source = save(tmp_path, **{name: table([0, 1, 2] * 4, ClassLabel(names=ANIMALS)) for name in names})
    with pytest.raises(ValueError, match=f'has no split "train"; its splits are {", ".join(names)}'):
        load_image_dataset(source)


def test_a_folder_with_a_test_folder_alone_is_refused(tmp_path):
    write_class_folders(tmp_path / "data" / "test", ANIMALS)
    with pytest.raises(ValueError, match='has no split "train"; its splits are test'):
        load_image_dataset(tmp_path / "data")


def test_asking_for_the_test_split_alone_is_refused(tmp_path):
    for name in ("train", "test"):
        write_class_folders(tmp_path / "data" / name, ANIMALS)
    with pytest.raises(ValueError, match='split.*"?test'):
        load_image_dataset(tmp_path / "data", split="test")


def test_a_test_split_saved_on_its_own_is_refused(tmp_path):
    for name in ("train", "test"):
        write_class_folders(tmp_path / "data" / name, ANIMALS)
    # A table knows the split that it was loaded as, and saving keeps that.
    datasets.load_dataset(str(tmp_path / "data"), split="test").save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").split == "test"
    with pytest.raises(ValueError, match='split.*"?test'):
        load_image_dataset(tmp_path / "saved")


def test_no_row_is_in_two_splits(tmp_path):
    names = ClassLabel(names=ANIMALS)
    source = save(tmp_path, train=table([0, 1, 2] * 10, names), test=table([0, 1, 2], names, 500))
    splits = load_image_dataset(source)
    assert numbers(splits["test"]) == [500, 501, 502]
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(30))


# Subsets


def test_subsets_are_balanced_nested_and_reproducible():
    labels = [0] * 9 + [1] * 6 + [2] * 12
    dataset = table(labels, ClassLabel(names=ANIMALS)).shuffle(seed=1)
    subsets = {n: select_per_class(dataset, n, "label", seed=4) for n in (1, 3, 6)}
    for n, subset in subsets.items():
        assert Counter(subset["label"][:]) == {0: n, 1: n, 2: n}
        assert all(labels[number] == label for number, label in zip(numbers(subset), subset["label"]))
    found = {n: set(numbers(subset)) for n, subset in subsets.items()}
    assert found[1] < found[3] < found[6] and len(found[6]) == 18
    assert numbers(select_per_class(dataset, 3, "label", seed=4)) == numbers(subsets[3])
    assert set(numbers(select_per_class(dataset, 3, "label", seed=5))) != found[3]


@pytest.mark.parametrize(("asked", "name", "found"), [(7, "dog", 6), (0, "cat", 9), (-1, "cat", 9)])
def test_subsets_that_cannot_be_drawn_are_refused(asked, name, found):
    dataset = table([0] * 9 + [1] * 6 + [2] * 12, ClassLabel(names=ANIMALS))
    with pytest.raises(ValueError, match=f'{asked} images of class "{name}" were asked for; there are {found}'):
        select_per_class(dataset, asked, "label")


def test_subsets_need_class_names():
    with pytest.raises(ValueError, match='The label column "label" is .* without class names'):
        select_per_class(table([0, 1], Value("int64")), 1, "label")


def test_class_names_are_compared_in_order():
    check_class_names(["cat", "dog", "eel"], ["cat", "dog", "eel"], "it")
    check_class_names(["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog", "eel"], "an unnamed model")
    with pytest.raises(ValueError, match="it has 2 classes; the data set has 3"):
        check_class_names(["cat", "dog"], ["cat", "dog", "eel"], "it")
    with pytest.raises(ValueError, match="the same names in another order"):
        check_class_names(["dog", "cat", "eel"], ["cat", "dog", "eel"], "it")
    with pytest.raises(ValueError, match=r"\['eel'\] only in the first, \['fox'\] only in the second"):
        check_class_names(["cat", "dog", "fox"], ["cat", "dog", "eel"], "it")
