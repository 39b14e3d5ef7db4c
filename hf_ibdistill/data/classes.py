"""Classes: their names, their ids in a label column, and whether those of a model fit."""

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features
from transformers import PreTrainedConfig

from .columns import LABEL, Table, as_image_table


def class_names(table: Table) -> list[str]:
    """The names of the classes, in the order of their ids.

    Raises:
        ValueError: the column "label" is not a `ClassLabel`.
    """
    feature = table.features[LABEL]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The label column is {feature}, without class names. Open the data with load_image_dataset, or cast it: "
            f'dataset.class_encode_column("{LABEL}").'
        )
    return feature.names


def label_ids(table: Dataset) -> np.ndarray:
    """The column "label" as an array (N,) of int64; −1 for a row without a label."""
    return table.select_columns([LABEL]).with_format("arrow")[:][LABEL].fill_null(-1).to_numpy().astype(np.int64)


def config_class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's classes, in the order of its logits."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def class_config(table: Table, label_column: str | None = None) -> dict:
    """The fields `num_labels`, `id2label` and `label2id` of a model configuration for the classes of a table.

    Args:
        table: a table with a `ClassLabel` column.
        label_column: that column; found if not given.

    Raises:
        ValueError: the column cannot be found or is not a `ClassLabel`.
    """
    names = class_names(as_image_table(table, label_column=label_column, needs_image=False))
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def check_class_names(label_names: Sequence[str], expected: Sequence[str], owner: str) -> None:
    """Refuse classes that differ from those of the dataset, in name or in order. Unnamed classes pass by their number.

    Raises:
        ValueError: what differs.
    """
    if len(label_names) != len(expected):
        raise ValueError(f"{owner} has {len(label_names)} classes; the dataset has {len(expected)}.")
    # Some systems write an accented letter as one sign, others as two.
    label_names, expected = (
        [unicodedata.normalize("NFC", name) for name in names] for names in (label_names, expected)
    )
    is_unnamed = has_default_names(label_names) or has_default_names(expected)
    if not is_unnamed and label_names != expected:
        raise ValueError(
            f"The classes of the dataset and of {owner} differ: {name_difference(expected, label_names)}. "
            "Logits are matched to classes by position, so names and order must be the same."
        )


def has_default_names(label_names: Sequence[str]) -> bool:
    """Whether the names are the ones that transformers gives to unnamed classes."""
    return list(label_names) == [f"LABEL_{i}" for i in range(len(label_names))]


def name_difference(expected: Iterable[str], found: Iterable[str]) -> str:
    """A description of how two lists of names differ."""
    expected, found = list(expected), list(found)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if not missing and not extra:
        return f"the same names in another order ({expected[:10]} and {found[:10]})"
    return f"{missing[:10]} only in the first, {extra[:10]} only in the second"


def encode_labels(splits: DatasetDict) -> DatasetDict:
    """Make the column "label" of every split a `ClassLabel` with the classes of the training split.

    Raises:
        ValueError: a split has rows without a label, other classes, or ids out of range.
    """
    for name, split in splits.items():
        # NaN is how pandas writes a missing value.
        missing = pc.is_null(split.select_columns([LABEL]).with_format("arrow")[:][LABEL], nan_is_null=True)
        rows = np.flatnonzero(missing.to_numpy())
        if len(rows):
            raise ValueError(f'The split "{name}" has {len(rows)} rows without a label (first {rows[:10].tolist()}).')
    if not isinstance(splits["train"].features[LABEL], ClassLabel):
        splits = _number_classes(splits)
    names = splits["train"].features[LABEL].names
    ids = {name: label_ids(split) for name, split in splits.items()}
    for name, split in splits.items():
        found = split.features[LABEL].names
        if found != names:
            raise ValueError(
                f'The splits "train" and "{name}" have different classes: {name_difference(names, found)}.'
            )
        labels = ids[name]
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise ValueError(
                f'Row {wrong[0]} of the split "{name}" has label {labels[wrong[0]]}; there are {len(names)} classes '
                f"({len(wrong)} such rows)."
            )
        untaught = np.setdiff1d(labels, ids["train"])
        if len(untaught):
            raise ValueError(
                f'The split "{name}" has classes that no training image has: {[names[i] for i in untaught[:10]]}.'
            )
    return splits


def _number_classes(splits):
    names = sorted(splits["train"].unique(LABEL))
    ids = {name: i for i, name in enumerate(names)}
    for split, rows in splits.items():
        unknown = [value for value in rows.unique(LABEL) if value not in ids]
        if unknown:
            raise ValueError(
                f'The split "{split}" has classes that no training image has: {unknown[:10]}. The classes are '
                f"{names[:10]}."
            )
    feature = ClassLabel(names=[str(name) for name in names])
    return DatasetDict(
        {
            split: rows.map(
                lambda batch: {LABEL: [ids[value] for value in batch[LABEL]]},
                batched=True,
                features=Features({**rows.features, LABEL: feature}),
                desc="Numbering the classes",
            )
            for split, rows in splits.items()
        }
    )
