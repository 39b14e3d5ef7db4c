"""Classes: their names and ids, and whether those of a model and of a dataset fit."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value, concatenate_datasets
from numbered import ANIMALS, NAMED, label_names, numbers, table
from transformers import ViTConfig

from hf_ibdistill import class_config
from hf_ibdistill.data.classes import (
    check_class_names,
    class_names,
    config_class_names,
    encode_labels,
    has_default_names,
    label_ids,
    labelled_rows,
)


STRING, INTEGER = Value("string"), Value("int64")


def encode(**splits):
    return encode_labels(DatasetDict(splits))


# Names and ids


def test_names_of_a_table_and_of_a_model():
    names = ["owl", "cat", "dog", "unused"]
    assert class_names(table([2, 0, 1], ClassLabel(names=names))) == names
    config = ViTConfig(**class_config(table([2, 0, 1], ClassLabel(names=names))))
    assert config.num_labels == 4 and config_class_names(config) == names


def test_class_config_has_the_classes_in_the_order_of_their_ids():
    expected = {
        "num_labels": 3,
        "id2label": {0: "cat", 1: "dog", 2: "owl"},
        "label2id": {"cat": 0, "dog": 1, "owl": 2},
    }
    images = table([2, 0, 1])
    assert class_config(images) == class_config(images.to_iterable_dataset()) == expected
    # The images do not matter: none, or several columns of them.
    assert class_config(images.remove_columns("image")) == expected
    several = images.rename_columns({"image": "scan", "label": "kind"})
    several = concatenate_datasets([several, images.select_columns("image").rename_column("image", "mask")], axis=1)
    several = several.add_column("color", [0, 1, 0], feature=ClassLabel(names=["red", "blue"]))
    assert class_config(several, "kind") == expected
    with pytest.raises(ValueError, match="kind, color"):
        class_config(several)


def test_a_column_without_class_names_is_explained():
    for feature, labels in ((STRING, ["cat"]), (INTEGER, [0])):
        with pytest.raises(ValueError, match=r'Value\(.*class_encode_column\("label"\)'):
            class_config(table(labels, feature))


def test_label_ids_are_those_of_the_rows():
    split = table([2, 0, 1, 2]).select([3, 1, 0])
    assert label_ids(split).dtype == np.int64 and label_ids(split).tolist() == [2, 0, 2]
    # Whatever the format, and with −1 for rows without a label.
    assert label_ids(table([1, None, 0]).with_format("torch")).tolist() == [1, -1, 0]


def test_class_names_are_compared_in_order():
    check_class_names(ANIMALS, ANIMALS, "it")
    unnamed = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert has_default_names(unnamed) and not has_default_names(ANIMALS) and not has_default_names(unnamed[1:])
    assert has_default_names(config_class_names(ViTConfig(num_labels=3)))
    check_class_names(unnamed, ANIMALS, "it")
    check_class_names(ANIMALS, unnamed, "it")
    with pytest.raises(ValueError, match="the teacher .*2.*3"):
        check_class_names(["cat", "dog"], ANIMALS, "the teacher")
    with pytest.raises(ValueError, match=r"the teacher .*order.*\['cat', 'dog', 'owl'\] and \['dog', 'cat', 'owl'\]"):
        check_class_names(["dog", "cat", "owl"], ANIMALS, "the teacher")
    with pytest.raises(ValueError, match=r"the teacher .*\['owl'\] .*first, \['fox'\] .*second"):
        check_class_names(["cat", "dog", "fox"], ANIMALS, "the teacher")


# Numbering the classes of several splits


def test_strings_become_classes_in_alphabetical_order():
    train, test = table(["owl", "cat", "dog", "cat"], STRING), table(["dog"], STRING, 10)
    # Splits may differ in their other columns.
    splits = encode(train=train, test=test.add_column("source", ["web"]), validation=table(["owl", "dog"], STRING))
    assert {name: split["label"][:] for name, split in splits.items()} == {
        "train": [2, 0, 1, 0],
        "test": [1],
        "validation": [2, 1],
    }
    assert all(class_names(split) == ANIMALS for split in splits.values())
    assert numbers(splits["train"]) == [0, 1, 2, 3] and splits["test"]["source"][:] == ["web"]


def test_integers_become_classes_in_numerical_order():
    train = table([10, 2, 33, 1, 2], INTEGER)
    splits = encode(train=train, validation=train)
    assert class_names(splits["train"]) == ["1", "2", "10", "33"]
    assert label_names(splits["train"]) == ["10", "2", "33", "1", "2"]


def test_class_names_and_their_order_are_kept():
    names = ["owl", "cat", "dog", "unused"]
    train = table([2, 0, 1], ClassLabel(names=names))
    splits = encode(train=train, validation=train)
    assert splits["train"]["label"][:] == [2, 0, 1] and class_names(splits["validation"]) == names


@pytest.mark.parametrize(("feature", "labels"), [(STRING, ANIMALS), (NAMED, [0, 1, 2])], ids=["strings", "named"])
def test_a_split_may_lack_some_of_the_classes(feature, labels):
    splits = encode(train=table(labels, feature), validation=table(labels[2:], feature))
    assert splits["validation"]["label"][:] == [2] and class_names(splits["validation"]) == ANIMALS


@pytest.mark.parametrize("feature", [STRING, NAMED], ids=["strings", "named"])
def test_a_class_that_nobody_trains_on_is_refused(feature):
    # Otherwise the model gets an output for "owl", is never shown one and is tested on them.
    train, test = (["cat", "dog"] * 2, ["cat", "owl"]) if feature is STRING else ([0, 1] * 2, [0, 2])
    with pytest.raises(ValueError, match='"test" .*owl'):
        encode(train=table(train, feature), test=table(test, feature))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "fox", "owl"], [r"['dog'] only in the first", "['fox'] only in the second"]),
        (["cat", "dog"], ["['owl'] only in the first", "[] only in the second"]),
        (["dog", "cat", "owl"], ["order", "['cat', 'dog', 'owl'] and ['dog', 'cat', 'owl']"]),
    ],
)
@pytest.mark.parametrize("other", ["validation", "test"])
def test_splits_with_other_class_names_are_refused(other, names, words):
    with pytest.raises(ValueError, match=f'"train" and "{other}"') as error:
        encode(**{"train": table([0, 1, 2]), other: table([0, 1], ClassLabel(names=names))})
    assert all(word in str(error.value) for word in words)


# Labels


def test_a_label_out_of_range_names_the_row():
    # Arrow stores numbers; only the description beside them has the number of classes.
    features = Features({"label": ClassLabel(names=["cat", "dog"])})
    train = Dataset(pa.table({"label": pa.array([0, 1, 2, 0, 2])}), info=DatasetInfo(features=features))
    with pytest.raises(ValueError, match=r'"train".* 2 rows .*labels \[2\].*rows \[2, 4\].* 2 classes'):
        encode(train=train)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_some_rows_to_measure_on_without_a_label_are_refused(split):
    parts = {name: table([0, 1, 2]) for name in ("train", "validation", "test")}
    with pytest.raises(ValueError, match=rf'"{split}".* 2 rows .*labels \[-1\].*rows \[1, 3\].* 3 classes'):
        encode(**{**parts, split: table([0, -1, 2, -1])})
    with pytest.raises(ValueError, match=f'"{split}" .*without a label'):
        encode(**{**parts, split: table([0, None, 2])})


@pytest.mark.parametrize("name", ["train", "test"])
def test_nan_is_no_label_and_no_mark_of_a_missing_one(name):
    nan = Dataset.from_dict({"label": [0.0, None, float("nan"), 1.0, float("nan")]})
    rows = [2, 4] if name == "train" else [1, 2, 4]
    with pytest.raises(ValueError, match=rf'"{name}" has {len(rows)} rows without a label \(first \[{rows[0]}, '):
        encode_labels(DatasetDict({"train": table([0, 1, 2]), name: nan}))


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([2, None, -1, 0], None, ["cat", "dog", "owl"]),
        ([7, None, -1, 5], Value("int64"), ["5", "7"]),
        ([7.0, None, -1.0, 5.0], Value("float64"), ["5", "7"]),
        (["owl", None, None, "cat"], STRING, ["cat", "owl"]),
        ([True, None, None, False], Value("bool"), ["False", "True"]),
    ],
)
def test_a_training_row_may_have_no_label(labels, feature, names, caplog):
    train = table(labels) if feature is None else table(labels, feature)
    encoded = encode(train=train)["train"]
    assert encoded.features["label"].names == names
    assert label_ids(encoded).tolist() == [len(names) - 1, -1, -1, 0]
    assert "2 of 4 training images have no label (first rows [1, 2])" in caplog.text


def test_a_training_split_needs_a_label():
    with pytest.raises(ValueError, match='3 rows of the split "train" has a label'):
        encode(train=table([None, -1, None]))
    with pytest.raises(ValueError, match='"test".*no training image.*dog'):
        encode(train=table([0, 2, None]), test=table([0, 1]))


def test_one_class_is_not_enough():
    with pytest.raises(ValueError, match="one class only, 'cat'"):
        encode(train=table(["cat"] * 3, STRING))


def test_labelled_rows_are_chosen_and_the_others_reported(caplog):
    assert labelled_rows(table([0, 1]), "The table")["label"][:] == [0, 1] and not caplog.records
    assert labelled_rows(table([2, None, 0, -1]), "The table")["label"][:] == [2, 0]
    assert "The table: 2 of 4 rows" in caplog.text
    with pytest.raises(ValueError, match="None of 2 rows"):
        labelled_rows(table([None, -1]), "The table")


def test_composed_and_decomposed_names_are_the_same_class():
    check_class_names(["caf\u00e9", "bar"], ["cafe\u0301", "bar"], "the teacher")
    with pytest.raises(ValueError, match="cafe"):
        check_class_names(["caf\u00e9", "bar"], ["cafe", "bar"], "the teacher")


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([1.0, 2.0, 10.0], Value("float64"), ["1", "2", "10"]),
        ([True, False], Value("bool"), ["False", "True"]),
        (["2", "10", "1"], STRING, ["1", "2", "10"]),
        (["b", "10", "1"], STRING, ["1", "10", "b"]),
        (["caf\u00e9", "cafe\u0301", "bar"], STRING, ["bar", "caf\u00e9"]),
    ],
)
def test_labels_of_other_types_become_classes(labels, feature, names):
    split = encode(train=table(labels, feature))["train"]
    assert class_names(split) == names
    read = str if feature.dtype != "float64" else lambda value: str(int(value))
    expected = [unicodedata.normalize("NFC", read(label)) for label in labels]
    assert label_names(split) == expected


@pytest.mark.parametrize(
    ("labels", "feature", "words"),
    [
        ([1.0, 0.5, 2.0], Value("float32"), "row 1 is 0.5"),
        ([1.0, float("inf")], Value("float64"), "row 1 is inf"),
        ([b"cat", b"dog"], Value("binary"), "binary"),
        (["cat", None, "dog", ""], STRING, r"\[3\].*empty text"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, feature, words):
    with pytest.raises(ValueError, match=f'"train" .*{words}'):
        encode(train=table(labels, feature))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_are_matched_by_name_if_one_has_names_as_text(split):
    text, named = table(["dog", "cat", "owl"], STRING), table([1, 0, 2])
    for train, other in ((named, text), (text, named)):
        splits = encode(**{"train": train, split: other})
        assert all(class_names(rows) == ANIMALS and rows["label"][:] == [1, 0, 2] for rows in splits.values())
    with pytest.raises(ValueError, match=f'"{split}" .*fox'):
        encode(**{"train": named, split: table(["cat", "fox"], STRING)})
    # Numbers beside names: neither is the other.
    with pytest.raises(ValueError, match=f'"{split}" .*1'):
        encode(**{"train": named, split: table([1, 0], INTEGER)})


def test_minus_one_is_no_class_in_a_column_of_numbers():
    encoded = encode(train=Dataset.from_dict({"label": [0, -1, 1, 0]}))["train"]
    assert encoded.features["label"].names == ["0", "1"] and label_ids(encoded).tolist() == [0, -1, 1, 0]
