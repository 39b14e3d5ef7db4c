"""Join published logits to a user's own copy of the images."""

import logging

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..data.columns import IMAGE, as_image_table, require_table
from ..files import no_cache_files
from ..images.views import row_key
from ..logits.encoding import FILE_KEY, ROW_KEY, check_keys, column_name, recorded_teachers
from ..logits.provenance import check_files, check_same_teachers
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
    """Add to images the logits that were recorded for the same images, matched by the key of their pixels.

    Logits can be published even if the images cannot. The order of the rows does not matter, and rows with the same image
    get the same logits. If other pixels come out of the same file, as of a JPEG file with another decoder, the key of the
    file finds them, and a warning reports it.

    Args:
        images: the user's own copy, with an image column.
        logits_table: a table with `row_key` and logits columns; other columns are left out.
        image_column: the image column; found if not given.
        skip_missing: leave out images without recorded logits instead of stopping.
        num_workers: processes that decode the images; `None` is this one.

    Returns:
        The columns of `images`, with the image column named `image` and the label column named `label`, plus `row_key`,
        `file_key` if the table has it, the logits columns and their provenance, in the order of `images`.

    Raises:
        TypeError: an argument is not one table.
        ValueError: the table has no `row_key` of whole numbers or no logits, joins different teachers of one name, a column
            would exist twice, or images have no recorded logits; the message has their number and the first rows.
    """
    require_table(images, "images")
    require_table(logits_table, "logits_table")
    teachers = recorded_teachers(logits_table)
    if ROW_KEY not in logits_table.column_names or not teachers:
        raise ValueError(
            f'The logits table needs the column "{ROW_KEY}" and a logits column; its columns are '
            f"{', '.join(logits_table.column_names)}. A table made by record_teacher_logits has both."
        )
    check_keys(logits_table)
    check_same_teachers(logits_table)
    check_files(logits_table)
    has_files = FILE_KEY in logits_table.column_names
    columns = [ROW_KEY, *([FILE_KEY] if has_files else []), *map(column_name, teachers)]
    images = as_image_table(images, image_column, needs_label=False)
    twice = [name for name in columns if name in images.column_names]
    if twice:
        raise ValueError(f"The images already have the columns {twice}. Remove them first.")
    rows = _Keys(images, file_keys=True)
    hashes = torch.utils.data.DataLoader(rows, batch_size=64, num_workers=num_workers or 0, collate_fn=list)
    keys = np.array([pair for batch in tqdm(hashes, desc="Hashing the images") for pair in batch]).reshape(-1, 2)
    partner = _find(keys[:, 0], logits_table, ROW_KEY)
    if has_files:
        same_file = _find(keys[:, 1], logits_table, FILE_KEY)
        by_file = (partner < 0) & (same_file >= 0)
        partner = np.where(by_file, same_file, partner)
        if by_file.any():
            logger.warning(
                "%s have other pixels than the recorded ones, but the same files: another decoder, for example of JPEG. "
                "They get the logits of these files.",
                _describe(by_file),
            )
    missing = partner < 0
    if missing.any():
        message = f"{_describe(missing)} have no recorded logits"
        if not skip_missing:
            what = "pixels and files" if has_files else "pixels"
            decoder = "" if has_files else f', or another decoder (the table has no "{FILE_KEY}" to find its files)'
            raise ValueError(
                f"{message}, because their {what} differ: another version of the dataset, resized or re-compressed files"
                f"{decoder}. Pass the recorded images, or skip_missing=True to leave these out."
            )
        logger.warning("%s and are left out.", message)
        images, partner = images.select(np.flatnonzero(~missing)), partner[~missing]
    with no_cache_files():
        # Otherwise joining would copy the images as well.
        logits = logits_table.select_columns(columns).select(partner).flatten_indices()
        # The descriptions are joined, and with them the provenance of both.
        return concatenate_datasets([images, logits], axis=1)


class _Keys(ImageRows):
    """(row key, file key) in place of row, with one decoded image at a time."""

    def __getitems__(self, indices):
        return [(row_key(row[IMAGE]), row[FILE_KEY]) for row in self.read(indices)]


def _find(keys, logits_table, column) -> np.ndarray:
    """The row of the table with each key, or −1."""
    known = logits_table.select_columns([column]).with_format("arrow")[:][column]
    # A recording that an earlier version began has rows without file keys.
    rows = np.flatnonzero(known.is_valid().to_numpy())
    known = known.drop_null().to_numpy()
    if not len(known):
        return np.full(len(keys), -1)
    order = np.argsort(known, kind="stable")
    found = order[np.searchsorted(known, keys, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[found] == keys, rows[found], -1)


def _describe(chosen) -> str:
    rows = np.flatnonzero(chosen)
    return f"{len(rows)} of {len(chosen)} images (rows {rows[:10].tolist()}{', …' if len(rows) > 10 else ''})"
