"""The door: whatever a table calls its columns, behind the door they are "image" and "label"."""

import json

import numpy as np
import pytest
from cells import encoded, random_image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
)
from numbered import ANIMALS, NAMED, numbers, picture

from hf_ibdistill.data.columns import as_image_table, require_table
from hf_ibdistill.images.decoding import decode_image
from hf_ibdistill.logits.provenance import attach_record, build_record, read_records
from hf_ibdistill.rows import ImageRows, StreamedImageRows


# Two rows of each type, to build tables from.
IMAGES = Image(), [picture(0), picture(1)]
MASKS = Image(), [picture(100), picture(101)]
CLASSES = NAMED, [0, 2]
COLORS = ClassLabel(names=["red", "blue"]), [1, 0]
WORDS = Value("string"), ["cat", "owl"]
NUMBERS = Value("int64"), [5, 6]
LISTS = List(Value("int64")), [[1], [2]]


def make(**columns):
    features = Features({name: feature for name, (feature, _) in columns.items()})
    return Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)


def test_a_table_with_standard_names_is_returned_as_it_is():
    table = make(image=IMAGES, label=CLASSES, note=WORDS)
    assert as_image_table(table) is table
    stream = as_image_table(make(scan=IMAGES, kind=CLASSES).to_iterable_dataset())
    assert as_image_table(stream) is stream


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        pytest.param({"scan": IMAGES, "kind": CLASSES}, {}, id="the only ones"),
        pytest.param({"scan": IMAGES, "fine_label": WORDS}, {}, id="a usual name of a label"),
        pytest.param({"image": IMAGES, "target": NUMBERS}, {}, id="numbers under a usual name"),
        pytest.param({"image": IMAGES, "mask": MASKS, "kind": CLASSES}, {}, id="image among several"),
        pytest.param({"image": IMAGES, "label": WORDS, "color": COLORS}, {}, id="label beside an unrelated class"),
        pytest.param({"scan": IMAGES, "mask": MASKS, "label": CLASSES}, {"image_column": "scan"}, id="image given"),
        pytest.param({"scan": IMAGES, "a": CLASSES, "b": COLORS}, {"label_column": "a"}, id="label given"),
        pytest.param({"scan": IMAGES, "note": WORDS}, {"label_column": "note"}, id="label under any name given"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["mapped", "streamed"])
def test_columns_are_found_and_renamed_and_the_others_kept(columns, given, is_streamed):
    image, label = list(columns)[0], given.get("label_column")
    label = label or next(name for name in columns if name not in ("scan", "image", "mask"))
    table = make(**columns, width=NUMBERS)
    found = as_image_table(table.to_iterable_dataset() if is_streamed else table, **given)
    others = set(columns) - {image, label} | {"width"}
    assert set(found.features) == {"image", "label"} | others
    assert found.features["label"] == columns[label][0]
    rows = list(found)
    assert [row["label"] for row in rows] == columns[label][1]
    for name in others:
        assert found.features[name] == table.features[name]
        assert [row[name] for row in rows] == [row[name] for row in table]
    if is_streamed:
        rows = [{**row, "image": decode_image(row["image"])} for row in rows]
    assert numbers({"image": [row["image"] for row in rows]}) == [0, 1]


def test_provenance_passes_the_door():
    record = build_record([], {"num_rows": 2}, None)
    table = make(scan=IMAGES, kind=CLASSES)
    attach_record(table, record)
    stream = table.to_iterable_dataset()
    attach_record(stream, record)
    for found in (as_image_table(table), as_image_table(stream)):
        assert found.info.description == json.dumps(record, sort_keys=True)
        assert read_records(found) == [record]


def test_formats_do_not_matter():
    table = make(scan=IMAGES, kind=CLASSES, width=NUMBERS)
    for name in (None, "torch", "numpy", "pandas", "arrow"):
        found = as_image_table(table.with_format(name, columns=["width"]))
        assert found.format["type"] is None and found[1]["label"] == 2
        assert [row["label"] for row in ImageRows(found, ["label"])] == [0, 2]
    for name in ("torch", "arrow", "pandas"):
        stream = as_image_table(table.to_iterable_dataset().with_format(name))
        assert [row["label"] for row in StreamedImageRows(stream, ["label"])] == [0, 2]


def test_jpeg_files_of_a_stream_are_not_compressed_again():
    cells = {name: [encoded(random_image(seed=10 * i + j), "JPEG", quality=95) for j in range(3)] for i, name in
             enumerate(("scan", "mask"))}  # fmt: skip
    table = make(scan=(Image(), cells["scan"]), mask=(Image(), cells["mask"]), kind=(NAMED, [0, 1, 2]))
    found = as_image_table(table.to_iterable_dataset(), "scan")
    assert [row["image"]["bytes"] for row in found] == [cell["bytes"] for cell in cells["scan"]]
    # The other image column keeps its bytes as well; it is decoded for the reader alone.
    assert found.features["mask"].decode
    undecoded = found.cast_column("mask", Image(decode=False))
    assert [row["mask"]["bytes"] for row in undecoded] == [cell["bytes"] for cell in cells["mask"]]

    mapped = ImageRows(as_image_table(table, "scan"), ["label"])
    streamed = list(StreamedImageRows(found, ["label"]))
    assert len(streamed) == len(mapped) == 3
    for ours, theirs in zip(streamed, mapped):
        assert ours["label"] == theirs["label"]
        np.testing.assert_array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))


@pytest.mark.parametrize("is_streamed", [False, True], ids=["mapped", "streamed"])
def test_columns_of_paths_or_bytes_are_images_if_they_are_given(is_streamed, tmp_path):
    paths, contents = [str(tmp_path / f"{i}.png") for i in range(2)], []
    for i, path in enumerate(paths):
        picture(i).save(path)
        contents.append(encoded(picture(i)))
    pairs = {"bytes": Value("binary"), "path": Value("string")}
    for column in (
        (Value("string"), paths),
        (Value("binary"), [cell["bytes"] for cell in contents]),
        (pairs, contents),
    ):
        table = make(file=column, label=CLASSES)
        with pytest.raises(ValueError, match="image_column"):
            as_image_table(table)
        found = as_image_table(table.to_iterable_dataset() if is_streamed else table, "file")
        rows = (StreamedImageRows if is_streamed else ImageRows)(found, ["label"])
        rows = list(rows) if is_streamed else [rows[i] for i in range(2)]
        assert numbers({"image": [row["image"] for row in rows]}) == [0, 1]
        assert [row["label"] for row in rows] == [0, 2]


def test_splits_get_the_columns_of_the_training_split():
    train = make(scan=IMAGES, mask=MASKS, kind=CLASSES)
    test = train.select([1])
    found = as_image_table({"test": test, "train": train}, image_column="scan")
    assert isinstance(found, DatasetDict) and list(found) == ["test", "train"]
    assert {name: (numbers(split), split["label"][:]) for name, split in found.items()} == {
        "test": ([1], [2]),
        "train": ([0, 1], [0, 2]),
    }
    streams = DatasetDict(train=train, test=test)
    streams = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in streams.items()})
    found = as_image_table(streams, image_column="scan")
    assert isinstance(found, IterableDatasetDict)
    assert {name: [row["label"] for row in split] for name, split in found.items()} == {"train": [0, 2], "test": [2]}


def test_a_split_without_the_columns_of_the_training_split_is_named():
    train = make(scan=IMAGES, kind=CLASSES)
    with pytest.raises(ValueError, match='"validation".*"kind".*scan'):
        as_image_table({"train": train, "validation": train.remove_columns("kind")})
    with pytest.raises(ValueError, match='"test".*"scan"'):
        as_image_table({"train": train, "test": train.rename_column("scan", "photo")})
    with pytest.raises(ValueError, match="no splits"):
        as_image_table(DatasetDict())


@pytest.mark.parametrize(
    ("columns", "given", "words"),
    [
        pytest.param({"label": CLASSES}, {}, ["no image column", "label", "image_column"], id="no image"),
        pytest.param({"image": IMAGES, "note": WORDS}, {}, ["no label column", "image, note", "label_column"], id="no label"),
        pytest.param({"scan": IMAGES, "mask": MASKS, "label": CLASSES}, {}, ["scan, mask", "image_column"], id="two images"),
        pytest.param({"image": IMAGES, "kind": CLASSES, "color": COLORS}, {}, ["kind, color", "label_column"], id="two labels"),
        pytest.param({"image": IMAGES, "kind": CLASSES, "target": NUMBERS}, {}, ["kind, target", "label_column"], id="a class and a usual name"),
        pytest.param({"image": IMAGES, "label": CLASSES}, {"image_column": "img"}, ['image_column="img"', "image, label"], id="image gone"),
        pytest.param({"image": IMAGES, "label": CLASSES}, {"label_column": "kind"}, ['label_column="kind"', "image, label"], id="label gone"),
        pytest.param({"image": IMAGES, "mask": MASKS, "label": CLASSES}, {"image_column": "mask"}, ['"mask"', '"image"'], id="image taken"),
        pytest.param({"image": IMAGES, "label": CLASSES, "color": COLORS}, {"label_column": "color"}, ['"color"', '"label"'], id="label taken"),
        pytest.param({"image": NUMBERS, "label": CLASSES}, {"image_column": "image"}, ['image_column="image"', "int64"], id="numbers as images"),
        pytest.param({"image": IMAGES, "label": CLASSES}, {"image_column": "label"}, ['image_column="label"', "ClassLabel"], id="classes as images"),
        pytest.param({"image": IMAGES, "tags": LISTS}, {"label_column": "tags"}, ['label_column="tags"', "List"], id="lists as labels"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_named(columns, given, words):
    table = make(**columns)
    for one in (table, table.to_iterable_dataset(), {"train": table}):
        with pytest.raises(ValueError) as error:
            as_image_table(one, **given)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_columns_that_are_not_needed_may_be_missing_or_several():
    unlabeled = make(scan=IMAGES, width=NUMBERS)
    assert set(as_image_table(unlabeled, needs_label=False).features) == {"image", "width"}
    several = make(scan=IMAGES, kind=CLASSES, color=COLORS)
    assert set(as_image_table(several, needs_label=False).features) == {"image", "kind", "color"}
    # Found, it is renamed all the same; given, it must exist.
    assert set(as_image_table(make(scan=IMAGES, kind=CLASSES), needs_label=False).features) == {"image", "label"}
    with pytest.raises(ValueError, match='label_column="kind"'):
        as_image_table(unlabeled, label_column="kind", needs_label=False)
    splits = {"train": make(scan=IMAGES, kind=CLASSES), "more": unlabeled}
    found = as_image_table(splits, needs_label=False)
    assert {name: set(split.features) for name, split in found.items()} == {
        "train": {"image", "label"},
        "more": {"image", "width"},
    }
    for columns in ({"kind": CLASSES}, {"a": IMAGES, "b": MASKS, "kind": CLASSES}):
        assert set(as_image_table(make(**columns), needs_image=False).features) == {*columns, "label"} - {"kind"}


def test_a_transform_is_refused():
    table = make(image=IMAGES, label=CLASSES)
    table.set_transform(lambda rows: rows)
    with pytest.raises(ValueError, match=r"reset_format\(\)"):
        as_image_table(table)
    table.reset_format()
    assert as_image_table(table) is table


def test_a_stream_without_column_types_is_refused():
    stream = IterableDataset.from_generator(lambda: iter([{"image": None, "label": 0}]))
    assert stream.features is None
    with pytest.raises(ValueError, match=r"features=None.*features="):
        as_image_table(stream)


@pytest.mark.parametrize("thing", [[{"image": 1, "label": 2}], None, np.zeros((2, 2))], ids=["list", "none", "array"])
def test_other_objects_are_refused(thing):
    for wrong in (thing, {"train": thing}):
        with pytest.raises(TypeError, match=type(thing).__name__):
            as_image_table(wrong)
    with pytest.raises(TypeError, match=f"images.*{type(thing).__name__}"):
        require_table(thing, "images")


def test_one_mapped_table_can_be_required():
    table = make(image=IMAGES, label=CLASSES)
    require_table(table, "images")
    with pytest.raises(TypeError, match=r'images .*train, test.*\["train"\]'):
        require_table(DatasetDict(train=table, test=table), "images")
    with pytest.raises(TypeError, match="images .*IterableDataset"):
        require_table(table.to_iterable_dataset(), "images")


def test_numbers_of_rows_are_kept():
    table = make(scan=IMAGES, kind=CLASSES).select([1, 0, 1])
    found = as_image_table(table)
    assert numbers(found) == [1, 0, 1] and [ANIMALS[i] for i in found["label"]] == ["owl", "cat", "owl"]
