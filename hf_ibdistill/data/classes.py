"""Classes: their names, their ids in a label column, and whether those of a model fit."""

import logging
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import PreTrainedConfig

from ..files import no_cache_files
from .columns import LABEL, Table, as_image_table, in_arrow, require_table
from .folders import sort_classes


logger = logging.getLogger(__name__)


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


def label_values(table: Dataset) -> pa.ChunkedArray:
    """The column "label" as it is stored. No other column is read."""
    return in_arrow(table, [LABEL])[:][LABEL]


def label_ids(table: Dataset) -> np.ndarray:
    """The column "label" as an array (N,) of int64; −1 for a row without a label, and without such a column."""
    if LABEL not in table.column_names:
        return np.full(len(table), -1)
    return label_values(table).fill_null(-1).to_numpy().astype(np.int64)


def check_labels(table: Dataset, *, unlabelled: bool = False) -> np.ndarray:
    """Refuse a table with a label that is no class.

    Args:
        table: a table that passed the door.
        unlabelled: whether rows may have no label.

    Returns:
        (N,), the class ids; −1 for a row without a label.

    Raises:
        ValueError: such a label; the message has the number of such rows and the first of them.
    """
    labels, names = label_ids(table), class_names(table)
    lowest = -1 if unlabelled else 0
    rows = np.flatnonzero((labels < lowest) | (labels >= len(names)))
    if len(rows):
        values = sorted(set(labels[rows].tolist()))[:10]
        raise ValueError(
            f"{len(rows)} rows have no label, or one that is no class (labels {values}, −1 for none; rows "
            f"{rows[:10].tolist()}). There are {len(names)} classes. Remove these rows."
        )
    return labels


def check_streamed_labels(labels: Sequence[int | None], num_classes: int, first_row: int) -> None:
    """Refuse a label that is neither a class nor null or −1.

    Args:
        labels: those of consecutive rows.
        num_classes: the number of classes.
        first_row: the number of the first of these rows, for the message.

    Raises:
        ValueError: such a label.
    """
    for row, label in enumerate(labels, first_row):
        if label is not None and not -1 <= label < num_classes:
            raise ValueError(
                f"Row {row}: the label {label} is no class. There are {num_classes}; −1 marks a row without one."
            )


def labelled_rows(table: Dataset, what: str) -> Dataset:
    """The rows with a label, which is checked. A warning reports the others, which null or −1 marks.

    Args:
        table: a table that passed the door.
        what: its name, for the warning.

    Raises:
        ValueError: no row has a label, or as from [`check_labels`].
    """
    rows = np.flatnonzero(check_labels(table, unlabelled=True) != -1)
    if len(rows) == 0 < len(table):
        raise ValueError(f"None of {len(table)} rows has a label. Add labelled images of every class.")
    if len(rows) == len(table):
        return table
    logger.warning("%s: %d of %d rows have no label and are left out.", what, len(table) - len(rows), len(table))
    return table.select(rows)


def config_class_names(config: PreTrainedConfig, owner: str = "the model") -> list[str]:
    """The names of a model's classes, in the order of its logits.

    Raises:
        ValueError: `id2label` does not number the classes from 0; the message names the owner.
    """
    given = config.id2label or {}
    named = given.items() if hasattr(given, "items") else enumerate(given)
    names = {str(i): str(name) for i, name in named}
    expected = [str(i) for i in range(len(names))]
    if not names or set(names) != set(expected):
        raise ValueError(
            f"id2label of {owner} numbers its classes {', '.join(names)[:60] or 'not at all'}. Number them 0, 1, 2, … "
            "without gaps, in the order of the logits."
        )
    return [names[i] for i in expected]


def class_config(table: Table, label_column: str | None = None) -> dict:
    """The fields `num_labels`, `id2label` and `label2id` of a model configuration for the classes of a table.

    Args:
        table: a table with a `ClassLabel` column.
        label_column: that column; found if not given.

    Raises:
        TypeError: `table` is not one table.
        ValueError: the column cannot be found or is not a `ClassLabel`.
    """
    require_table(table, "table", streams=True)
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
    label_names, expected = normalize_names(label_names), normalize_names(expected)
    is_unnamed = has_default_names(label_names) or has_default_names(expected)
    if not is_unnamed and label_names != expected:
        raise ValueError(
            f"The classes of the dataset and of {owner} differ: {name_difference(expected, label_names)}. "
            "Logits are matched to classes by position, so names and order must be the same."
        )


def normalize_names(names: Iterable[str]) -> list[str]:
    """Names in which an accented letter is one sign, because some systems write it as two."""
    return [unicodedata.normalize("NFC", name) for name in names]


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

    Null or −1 is a training row without a label; a warning reports their number.

    Raises:
        ValueError: another split has rows without a label, or a split has NaN, other classes, or ids out of range.
    """
    splits = DatasetDict(splits)
    for name, split in splits.items():
        values = label_values(split)
        # NaN is how pandas writes a missing value.
        missing = pc.is_null(values, nan_is_null=True)
        if name == "train":
            missing = pc.and_not(missing, pc.is_null(values))
        rows = np.flatnonzero(missing.to_numpy())
        if len(rows):
            raise ValueError(
                f'The split "{name}" has {len(rows)} rows without a label (first {rows[:10].tolist()}). Remove them; a '
                "training row without a label has null, not NaN."
            )
    if not all(isinstance(split.features[LABEL], ClassLabel) for split in splits.values()):
        splits = _number_classes(splits)
    names, ids = splits["train"].features[LABEL].names, {}
    for name, split in splits.items():
        found = split.features[LABEL].names
        if normalize_names(found) != normalize_names(names):
            raise ValueError(
                f'The splits "train" and "{name}" have different classes: {name_difference(names, found)}.'
            )
        try:
            ids[name] = check_labels(split, unlabelled=name == "train")
        except ValueError as error:
            raise ValueError(f'The split "{name}": {error}') from error
    unlabelled = np.flatnonzero(ids["train"] == -1)
    if len(unlabelled) == len(ids["train"]):
        raise ValueError(
            f'None of {len(unlabelled)} rows of the split "train" has a label. Add labelled images of every class.'
        )
    if len(unlabelled):
        logger.warning(
            "%d of %d training images have no label (first rows %s). Only teachers teach from them.",
            len(unlabelled),
            len(ids["train"]),
            unlabelled[:10].tolist(),
        )
    if len(names) < 2:
        raise ValueError(
            f"The labels have one class only, {names[0]!r}; a classifier needs two. Add images of another."
        )
    for name, labels in ids.items():
        untaught = np.setdiff1d(labels, ids["train"])
        if len(untaught):
            raise ValueError(
                f'The split "{name}" has classes that no training image has: {[names[i] for i in untaught[:10]]}.'
            )
    return splits


def _number_classes(splits):
    """Labels of any kind → a `ClassLabel` with the classes of the training split, matched by name."""
    readers = {name: _value_reader(split, name) for name, split in splits.items()}
    train = splits["train"].features[LABEL]
    if isinstance(train, ClassLabel):
        names = normalize_names(train.names)
    else:
        names = {readers["train"](value) for value in splits["train"].unique(LABEL)} - {None, -1}
        names = sort_classes(names) if train.dtype in _TEXT else sorted(names)
    ids = {name: i for i, name in enumerate(names)}
    known = {*ids, None, -1}
    for split, rows in splits.items():
        unknown = [value for value in map(readers[split], rows.unique(LABEL)) if value not in known]
        if unknown:
            raise ValueError(
                f'The split "{split}" has classes that no training image has: {unknown[:10]}. The classes are '
                f"{names[:10]}."
            )
    feature = ClassLabel(names=[str(name) for name in names])
    for split, rows in splits.items():
        labels = [ids.get(readers[split](value), -1) for value in label_values(rows).to_pylist()]
        # Not `map`, which would write a copy of the images. The new column comes first, because a table without columns
        # has no rows.
        new = "_" + max(rows.column_names, key=len)
        with no_cache_files():
            numbered = rows.add_column(new, np.array(labels, np.int64), feature=feature)
        splits[split] = numbered.remove_columns(LABEL).rename_column(new, LABEL).select_columns(rows.column_names)
    return splits


_TEXT = ("string", "large_string")


def _value_reader(rows, split):
    """A function from a label to the name of its class, or to its number if it has none.

    Raises:
        ValueError: labels of this type are no classes; the message names the first row.
    """
    feature = rows.features[LABEL]
    if isinstance(feature, ClassLabel):
        names = normalize_names(feature.names)
        return lambda value: value if value is None or not 0 <= value < len(names) else names[value]
    if feature.dtype in _TEXT:
        empty = np.flatnonzero(pc.equal(label_values(rows), "").fill_null(False).to_numpy())
        if not len(empty):
            return lambda value: value if value is None else unicodedata.normalize("NFC", value)
        what = (
            f"{len(empty)} rows (first {empty[:10].tolist()}) have an empty text, and a row without a label has null"
        )
    elif feature.dtype == "bool" or "int" in feature.dtype:
        return lambda value: value
    elif feature.dtype.startswith("float"):
        values = label_values(rows).fill_null(-1).to_numpy()
        # pandas makes floats of numbers if one of them is missing.
        wrong = np.flatnonzero(values != np.round(values))
        if not len(wrong) and np.isfinite(values).all():
            return lambda value: None if value is None else int(value)
        row = int(wrong[0]) if len(wrong) else int(np.flatnonzero(~np.isfinite(values))[0])
        what = f"row {row} is {values[row]}, and a class has a name or a whole number"
    else:
        what = f"the column is {feature}"
    raise ValueError(
        f'The labels of the split "{split}" are no classes: {what}. Choose another column, or convert it.'
    )
