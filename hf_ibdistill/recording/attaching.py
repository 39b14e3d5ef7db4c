"""Join published logits to a user's own copy of the images."""

import logging

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from ..data.columns import IMAGE, as_image_table, require_table
from ..images.views import row_key
from ..logits.encoding import ROW_KEY, column_name, recorded_teachers
from ..logits.provenance import attach_record, read_records
from ..rows import ImageRows


logger = logging.getLogger(__name__)


def attach_teacher_logits(
    images: Dataset,
    logits_table: Dataset,
    *,
    image_column: str | None = None,
    skip_missing: bool = False,
    num_workers: int | None = None,
) -> Dataset:
    """Add to images the logits that were recorded for the same images, matched by the key of their content.

    Logits can be published even if the images cannot. A user who has the images joins the two here. The order of the
    rows does not matter, and rows with the same image get the same logits.

    Args:
        images: the user's own copy, with an image column.
        logits_table: a table with `row_key` and logits columns; other columns are left out.
        image_column: the image column; found if not given.
        skip_missing: leave out images without recorded logits instead of stopping.
        num_workers: processes that decode the images; `None` is this one.

    Returns:
        The columns of `images`, with the image column named `image` and the label column named `label`, plus `row_key`,
        the logits columns and their provenance, in the order of `images`.

    Raises:
        TypeError: an argument is not one table.
        ValueError: the table has no `row_key` or no logits, a column would exist twice, or images have no recorded
            logits; the message has their number and the first rows.
    """
    require_table(images, "images")
    require_table(logits_table, "logits_table")
    teachers = recorded_teachers(logits_table)
    if ROW_KEY not in logits_table.column_names or not teachers:
        raise ValueError(
            f'The logits table needs the column "{ROW_KEY}" and a logits column; its columns are '
            f"{', '.join(logits_table.column_names)}. A table made by record_teacher_logits has both."
        )
    columns = [ROW_KEY, *map(column_name, teachers)]
    images = as_image_table(images, image_column, needs_label=False)
    twice = [name for name in columns if name in images.column_names]
    if twice:
        raise ValueError(f"The images already have the columns {twice}. Remove them first.")
    keyed = images.select_columns([IMAGE]).map(
        _KeysOf(images),
        batched=True,
        with_indices=True,
        num_proc=num_workers,
        remove_columns=[IMAGE],
        features=Features({ROW_KEY: Value("int64")}),
        desc="Hashing the images",
    )
    keys, known = _keys(keyed), _keys(logits_table)
    order = np.argsort(known, kind="stable")
    position = np.searchsorted(known, keys, sorter=order).clip(max=len(known) - 1)
    partner = order[position]
    missing = np.flatnonzero(known[partner] != keys)
    if len(missing):
        message = f"{len(missing)} of {len(images)} images have no recorded logits (rows {missing[:10].tolist()}"
        message += ", …)" if len(missing) > 10 else ")"
        if not skip_missing:
            raise ValueError(
                f"{message}. Their pixels differ from all recorded ones: another version of the dataset, or resized or "
                "re-compressed files. skip_missing=True leaves them out."
            )
        logger.warning("%s and are left out.", message)
        found = np.flatnonzero(known[partner] == keys)
        images, partner = images.select(found), partner[found]
    joined = concatenate_datasets([images, logits_table.select_columns(columns).select(partner)], axis=1)
    records = read_records(logits_table)
    if len(records) == 1:
        attach_record(joined, records[0])
    return joined


class _KeysOf:
    """(rows, indices) → row keys; an object, so that it can be sent to worker processes."""

    def __init__(self, images):
        self.rows = ImageRows(images)

    def __call__(self, _, indices):
        return {ROW_KEY: [row_key(row[IMAGE]) for row in self.rows.__getitems__(indices)]}


def _keys(table) -> np.ndarray:
    return table.select_columns([ROW_KEY]).with_format("arrow")[:][ROW_KEY].to_numpy()
