import copy
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets, load_from_disk
from transformers import ViTImageProcessor

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification
from hf_ibdistill.logits.encoding import dense_feature
from hf_ibdistill.logits.provenance import (
    attach_record,
    build_record,
    check_class_names,
    check_columns,
    read_records,
    record_differences,
)
from hf_ibdistill.teachers import Teacher


NAMES = ["cat", "dog", "eel"]


def teacher(name="conv", seed=0, size=8, names=NAMES):
    torch.manual_seed(seed)
    config = IBResNetConfig.from_preset(
        "convolution-small", depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=3, id2label=dict(enumerate(names))
    )
    processor = ViTImageProcessor(size={"height": size, "width": size})
    return Teacher(name, IBResNetForImageClassification(config).eval(), processor)


def record(*teachers, dataset=None, encoding=None):
    return build_record(
        teachers or [teacher()], dataset or {"num_rows": 6}, encoding or {"kind": "dense", "dtype": "float16"}
    )


def table(logits=None):
    features = Features({"label": ClassLabel(names=NAMES), "x": Value("int64"), "conv_logits": dense_feature(3)})
    logits = np.zeros((6, 3), np.float16) if logits is None else logits
    return Dataset.from_dict({"label": [0, 1, 2] * 2, "x": range(6), "conv_logits": logits}, features=features)


def test_the_record_travels_with_the_table(tmp_path):
    ours, dataset = record(), table()
    attach_record(dataset, ours)
    dataset.shuffle(seed=0).select(range(4)).filter(lambda row: row["x"] > -1).save_to_disk(tmp_path / "t")
    assert read_records(load_from_disk(tmp_path / "t")) == [json.loads(json.dumps(ours))]


def test_concatenated_tables_carry_both_records():
    first, second = table(), table()
    attach_record(first, record(teacher(seed=0)))
    attach_record(second, record(teacher(seed=1)))
    records = read_records(concatenate_datasets([first, second]))
    assert len({r["teachers"][0]["weights_sha256"] for r in records}) == 2
    same = concatenate_datasets([first.select(range(3)), first.select(range(3, 6))])
    assert len(read_records(same)) == 1


@pytest.mark.parametrize("description", ["", "A set of pets.", '{"format": "else"}', '{"broken'])
def test_a_table_without_record_has_none(description):
    dataset = table()
    dataset.info.description = description
    assert read_records(dataset) == []


def test_equal_teachers_do_not_differ_and_library_versions_may():
    ours, other = record(), record()
    other["versions"]["torch"] = "0.0"
    assert record_differences(ours, other) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: record(teacher(seed=1)), 'teacher "conv": weights_sha256'),
        (lambda: record(teacher(size=9)), 'teacher "conv": image_processor'),
        (lambda: record(teacher(names=["dog", "cat", "eel"])), 'teacher "conv": label_names'),
        (lambda: record(teacher("inv")), r"teachers: ['inv'] instead of ['conv']"),
        (lambda: record(dataset={"num_rows": 7}), "dataset: num_rows 7 instead of 6"),
        (lambda: record(encoding={"kind": "dense", "dtype": "float32"}), "encoding: dtype float32 instead of float16"),
    ],
)
def test_what_differs_is_named(change, message):
    differences = record_differences(record(), change())
    assert any(message in line for line in differences), differences


def test_class_names_are_compared_in_order():
    check_class_names(NAMES, NAMES, "it")
    check_class_names(["LABEL_0", "LABEL_1", "LABEL_2"], NAMES, "an unnamed model")
    with pytest.raises(ValueError, match="it has 2 classes; the data set has 3"):
        check_class_names(["cat", "dog"], NAMES, "it")
    with pytest.raises(ValueError, match="the same names in another order"):
        check_class_names(["dog", "cat", "eel"], NAMES, "it")
    with pytest.raises(ValueError, match=r"\['eel'\] only in the first, \['fox'\] only in the second"):
        check_class_names(["cat", "dog", "fox"], NAMES, "it")


def test_check_columns_passes_what_fits():
    check_columns(table(), ["conv"], NAMES)


def test_check_columns_names_what_is_missing():
    with pytest.raises(ValueError, match=r'no column "inv_logits" \(logits columns: conv_logits\)'):
        check_columns(table(), ["conv", "inv"], NAMES)
    with pytest.raises(ValueError, match="a list of 4 numbers"):
        check_columns(table(), ["conv"], [*NAMES, "fox"])


def test_check_columns_reads_the_teachers_classes():
    dataset = table()
    attach_record(dataset, record(teacher(names=["dog", "cat", "eel"])))
    with pytest.raises(ValueError, match='the teacher "conv" differ: the same names in another order'):
        check_columns(dataset, ["conv"], NAMES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_columns_names_rows_that_are_not_finite(value):
    logits = np.zeros((6, 3), np.float16)
    logits[4, 1] = value
    with pytest.raises(ValueError, match=r"infinite logits in 1 rows \(first \[4\]\)"):
        check_columns(table(logits), ["conv"], NAMES)
    # A selection without the row is fine: only rows that will be trained on count.
    check_columns(table(logits).select([0, 1, 2, 3, 5]), ["conv"], NAMES)


def test_describing_does_not_change_the_teacher():
    one = teacher()
    before = copy.deepcopy(one.model.state_dict())
    record(one)
    assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())
