"""Splits: their names, the validation split that is held out, and balanced subsets."""

from collections import Counter

import numpy as np
import pytest
from datasets import Features, Image, Value
from numbered import NAMED, numbers, table

from hf_ibdistill import select_per_class
from hf_ibdistill.data.splits import drop_unlabelled_test, hold_out_validation, name_splits, stratified_rows


ROWS = [table([0], start=i) for i in range(4)]


def named(*names):
    """`name_splits` of a row for each name, numbered in this order: new name → number."""
    return {name: ROWS.index(split) for name, split in name_splits(dict(zip(names, ROWS)), "the source").items()}


# Names


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("test", ["test", "testing"])
def test_usual_names_of_splits(test, validation, caplog):
    assert named("train", validation, test) == {"train": 0, "validation": 1, "test": 2}
    assert named(test, validation, "train") == {"test": 0, "validation": 1, "train": 2}
    assert named("train", validation) == {"train": 0, "validation": 1}
    assert named("train") == {"train": 0}
    assert not caplog.records


def test_one_split_of_another_name_is_trained_on_with_a_warning(caplog):
    assert named("full", "val") == {"train": 0, "validation": 1}
    assert 'the source has no split "train"' in caplog.text and '"full"' in caplog.text


def test_splits_that_are_left_out_are_reported(caplog):
    assert named("train", "unlabeled", "test", "extra") == {"train": 0, "test": 2}
    assert '"unlabeled" with 1 rows' in caplog.text and '"extra" with 1 rows' in caplog.text


@pytest.mark.parametrize("names", [["train", "val", "dev"], ["train", "test", "testing"]])
def test_two_splits_for_one_purpose_are_refused(names):
    with pytest.raises(ValueError, match=", ".join(names)):
        named(*names)


@pytest.mark.parametrize("names", [["test"], ["validation"], ["test", "validation"], ["a", "b"]])
def test_a_source_without_a_training_split_is_refused(names):
    with pytest.raises(ValueError, match=f'the source has no split "train".* {", ".join(names)}'):
        named(*names)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_empty_splits_are_refused(split):
    parts = dict(zip(("train", "validation", "test"), ROWS))
    parts[split] = parts[split].select([])
    with pytest.raises(ValueError, match=f'"{split}" of the source is empty'):
        name_splits(parts, "the source")


@pytest.mark.parametrize("feature", [NAMED, Value("int64")], ids=["named", "integers"])
def test_an_unlabeled_test_split_is_left_out(feature, caplog):
    parts = {"train": table([0, 1], feature), "test": table([-1, None], feature)}
    assert drop_unlabelled_test(name_splits(parts, "")).keys() == {"train"}
    assert "test split has no labels" in caplog.text
    caplog.clear()
    # One label is enough to be looked at, and one missing label is an error later.
    partly = name_splits({**parts, "test": table([-1, 0], feature)}, "")
    assert drop_unlabelled_test(partly).keys() == {"train", "test"} and not caplog.records


# Validation split


def hold_out(train, fraction=0.1, seed=0, **others):
    return hold_out_validation(name_splits({"train": train, **others}, ""), fraction, seed, "the source")


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_validation_split_is_stratified_disjoint_and_reported(seed, caplog):
    labels = [0] * 60 + [1] * 30 + [2] * 10
    splits = hold_out(table(labels), 0.2, seed, test=table([0], start=500))
    assert Counter(splits["validation"]["label"][:]) == {0: 12, 1: 6, 2: 2}
    assert numbers(splits["test"]) == [500]
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(100))
    assert all(labels[n] == label for n, label in zip(numbers(splits["train"]), splits["train"]["label"]))
    assert "a stratified 20 of its 100 training images" in caplog.text and f"(seed {seed})" in caplog.text
    assert "a random (" not in caplog.text


def test_the_validation_split_is_reproducible_by_its_seed():
    train = table([0, 1, 2] * 20)
    first, again, other = (numbers(hold_out(train, seed=seed)["validation"]) for seed in (5, 5, 6))
    assert first == again and sorted(first) != sorted(other)


def test_the_held_out_rows_are_those_of_train_test_split():
    train = table([0] * 9 + [1] * 6 + [2] * 12).shuffle(seed=1)
    expected = train.train_test_split(test_size=8, stratify_by_column="label", seed=3)
    parts = map(train.select, stratified_rows(np.array(train["label"]), 8, seed=3))
    assert list(map(numbers, parts)) == list(map(numbers, expected.values()))


def test_rows_without_a_label_stay_in_the_training_split(caplog):
    labels = [0, None, 1, -1] * 20 + [2] * 10
    splits = hold_out(table(labels), 0.2)
    held_out = numbers(splits["validation"])
    # 50 rows have a label: 20, 20 and 10 of the classes.
    assert Counter(splits["validation"]["label"][:]) == {0: 4, 1: 4, 2: 2}
    assert all(labels[n] == label for n, label in zip(held_out, splits["validation"]["label"]))
    assert sorted(numbers(splits["train"]) + held_out) == list(range(90))
    assert all(labels[n] == label for n, label in zip(numbers(splits["train"]), splits["train"]["label"]))
    assert "10 of its 50 training images with labels" in caplog.text
    with pytest.raises(ValueError, match="for 1 images .*validation split"):
        hold_out(table([0, None, None, -1]))


def test_a_validation_split_that_is_there_is_used(caplog):
    splits = hold_out(table([0, 1, 2] * 4), validation=table([0, 1], start=50))
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
def test_too_few_images_are_split_at_random(labels, fraction, caplog):
    splits = hold_out(table(labels), fraction)
    assert len(splits["train"]) > 0 and len(splits["validation"]) > 0
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == list(range(len(labels)))
    assert "a random (there are too few images" in caplog.text and "a stratified" not in caplog.text
    assert f"{len(splits['validation'])} of its {len(labels)} training images" in caplog.text


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="for 1 images .*validation split"):
        hold_out(table([0]))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_validation_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(ValueError, match=f"validation_fraction={fraction}"):
        hold_out(table([0, 1, 2] * 4), fraction)


# Subsets


LABELS = [0] * 9 + [1] * 6 + [2] * 12


def test_subsets_are_balanced_nested_and_reproducible():
    dataset = table(LABELS).shuffle(seed=1)
    subsets = {n: select_per_class(dataset, n, seed=4) for n in (1, 3, 6)}
    for n, subset in subsets.items():
        assert Counter(subset["label"][:]) == {0: n, 1: n, 2: n}
        assert all(LABELS[number] == label for number, label in zip(numbers(subset), subset["label"]))
    found = {n: set(numbers(subset)) for n, subset in subsets.items()}
    assert found[1] < found[3] < found[6] and len(found[6]) == 18
    assert numbers(select_per_class(dataset, 3, seed=4)) == numbers(subsets[3])
    assert set(numbers(select_per_class(dataset, 3, seed=5))) != found[3]
    # The label column may have any name, and the images none.
    assert numbers(select_per_class(dataset.rename_column("label", "kind"), 3, "kind", seed=4)) == numbers(subsets[3])
    assert select_per_class(dataset.remove_columns("image"), 3, seed=4)["label"][:] == subsets[3]["label"][:]


def test_rows_without_a_label_are_in_no_subset():
    features = Features({"image": Image(), "label": NAMED})
    dataset = table([0, None, 1, 2, None, 2, -1]).cast(features)
    assert sorted(numbers(select_per_class(dataset, 1, seed=2)))[:2] == [0, 2]


def test_the_rest_can_stay_without_labels():
    labels = [0, None, 1, 1, 0, 2, -1, 2]
    dataset = table(labels)
    chosen = set(numbers(select_per_class(dataset, 1, seed=3)))
    whole = select_per_class(dataset, 1, seed=3, keep_rest=True)
    assert numbers(whole) == list(range(8)) and whole.features == dataset.features
    assert whole.column_names == dataset.column_names
    assert whole["label"][:] == [labels[n] if n in chosen else None for n in range(8)] and len(chosen) == 3


@pytest.mark.parametrize(("asked", "words"), [(7, '.*"dog".* 6 '), (0, ""), (-1, ""), (1.5, ""), ("2", "")])
def test_subsets_that_cannot_be_drawn_are_refused(asked, words):
    with pytest.raises(ValueError, match=f"images_per_class={asked!r}{words}"):
        select_per_class(table(LABELS), asked)


@pytest.mark.parametrize(("feature", "labels"), [(Value("int64"), [0, 1]), (Value("string"), ["cat", "dog"])])
def test_subsets_need_class_names(feature, labels):
    with pytest.raises(ValueError, match=r"class_encode_column"):
        select_per_class(table(labels, feature), 1)
