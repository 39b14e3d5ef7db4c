"""Who made the logits columns, from what: a record that travels with the table, and the checks against it.

The record is JSON in the table's `info.description`, which selecting, shuffling, saving and loading preserve, and which
`concatenate_datasets` joins.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from datasets import Dataset

from ..data import name_difference
from ..teachers import Teacher
from .encoding import column_name, recorded_teachers


_FORMAT = "hf_ibdistill/1"
_LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "hf_ibdistill")


def describe_teacher(teacher: Teacher) -> dict:
    """What identifies a teacher: where it came from, a hash of its weights, configuration, preprocessing, classes."""
    config = teacher.model.config
    processor = json.loads(teacher.image_processor.to_json_string())
    return {
        "name": teacher.name,
        "source": config.name_or_path or None,
        "revision": getattr(config, "_commit_hash", None),
        "weights_sha256": teacher.weights_sha256(),
        "config": json.loads(config.to_json_string(use_diff=True)),
        "image_processor": processor,
        "num_labels": config.num_labels,
        "label_names": teacher.class_names,
    }


def build_record(teachers: Sequence[Teacher], dataset: dict, encoding: dict) -> dict:
    """The whole record: teachers, data set, encoding and library versions."""
    return {
        "format": _FORMAT,
        "teachers": [describe_teacher(teacher) for teacher in teachers],
        "dataset": dataset,
        "encoding": encoding,
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def attach_record(dataset: Dataset, record: dict) -> None:
    """Let the record travel with the table."""
    dataset.info.description = json.dumps(record, sort_keys=True)


def read_records(dataset: Dataset) -> list[dict]:
    """The table's records: none if nobody left one, several after `concatenate_datasets`."""
    description, records = (dataset.info.description or "").strip(), []
    decoder = json.JSONDecoder()
    while description.startswith("{"):
        try:
            record, end = decoder.raw_decode(description)
        except json.JSONDecodeError:
            break
        if isinstance(record, dict) and record.get("format") == _FORMAT:
            records.append(record)
        description = description[end:].strip()
    return records


def record_differences(expected: dict, found: dict) -> list[str]:
    """What differs between two records, a line each. Library versions may differ."""
    lines = []
    names = [teacher["name"] for teacher in expected["teachers"]]
    found_names = [teacher["name"] for teacher in found["teachers"]]
    if names != found_names:
        lines.append(f"teachers: {found_names} instead of {names}")
    for teacher, other in zip(expected["teachers"], found["teachers"]):
        for key in ("weights_sha256", "image_processor", "label_names"):
            if teacher[key] != other[key]:
                lines.append(f'teacher "{teacher["name"]}": {key} {other[key]} instead of {teacher[key]}')
    for part in ("dataset", "encoding"):
        for key in sorted({*expected[part], *found[part]}):
            if expected[part].get(key) != found[part].get(key):
                lines.append(f"{part}: {key} {found[part].get(key)} instead of {expected[part].get(key)}")
    return lines


def has_default_names(label_names: Sequence[str]) -> bool:
    """Whether the names are the ones that transformers gives classes that nobody named."""
    return list(label_names) == [f"LABEL_{i}" for i in range(len(label_names))]


def check_class_names(label_names: Sequence[str], expected: Sequence[str], whose: str) -> None:
    """Refuse other classes than the data set's, or the same in another order. Unnamed classes pass by their number.

    Raises:
        ValueError: what differs.
    """
    if len(label_names) != len(expected):
        raise ValueError(f"{whose} has {len(label_names)} classes; the data set has {len(expected)}.")
    unnamed = has_default_names(label_names) or has_default_names(expected)
    if not unnamed and list(label_names) != list(expected):
        raise ValueError(
            f"The data set's classes and those of {whose} differ: {name_difference(expected, label_names)}. "
            "Logits are matched to classes by position, so names and order must be the same."
        )


def check_columns(dataset: Dataset, teacher_names: Sequence[str], label_names: Sequence[str]) -> None:
    """Check, before training, that the table holds these teachers' logits over these classes.

    Raises:
        ValueError: a column is missing, has another number of classes or numbers that are not finite, or its teacher knew
            other classes.
    """
    recorded = [column_name(name) for name in recorded_teachers(dataset)]
    for name in teacher_names:
        column = column_name(name)
        if column not in dataset.column_names:
            raise ValueError(
                f'The student has a teacher "{name}", but the table has no column "{column}" (logits columns: '
                f"{', '.join(recorded) or 'none'}). Record it with record_teacher_logits, or pass teachers={{...}} to "
                "run the teachers while training."
            )
        length = getattr(dataset.features[column], "length", None)
        if length != len(label_names):
            raise ValueError(
                f'The column "{column}" holds {dataset.features[column]}; a list of {len(label_names)} numbers, one '
                "for each class of the student, is needed."
            )
        _check_finite(dataset, column)
    for record in read_records(dataset):
        for teacher in record["teachers"]:
            if teacher["name"] in teacher_names:
                check_class_names(teacher["label_names"], label_names, f'the teacher "{teacher["name"]}"')


def _check_finite(dataset, column):
    bad, start = [], 0
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=4096):
        values = batch[column].combine_chunks()
        logits = values.flatten().to_numpy(zero_copy_only=False)
        if values.null_count or not np.isfinite(logits).all():
            rows = values.to_pylist()
            bad += [start + i for i, row in enumerate(rows) if row is None or not np.isfinite(row).all()]
        start += len(values)
    if bad:
        raise ValueError(
            f'The column "{column}" has missing, NaN or infinite logits in {len(bad)} rows (first {bad[:10]}). '
            "Record them again, or leave these rows out."
        )
