"""Join published logits to a user's own copy of the images."""

import logging

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from ..data.columns import IMAGE, as_image_table, in_arrow, require_table
from ..data.splits import spread
from ..files import no_cache_files
from ..images.decoding import file_key
from ..images.views import row_key
from ..logits.encoding import FILE_KEY, ROW_KEY, check_keys, column_name, recorded_teachers
from ..logits.provenance import check_files, check_same_teachers
from ..progress import Progress
from ..rows import ImageRows
from .batches import EncodedRows


logger = logging.getLogger(__name__)


# Images of known files that are decoded, to find out whether their pixels are the recorded ones.
_SAMPLE = 64


def attach_teacher_logits(
    images: Dataset,
    logits_table: Dataset,
    *,
    image_column: str | None = None,
    skip_missing: bool = False,
    num_workers: int | None = None,
) -> Dataset:
    """Add to images the logits that were recorded for the same images, matched by the key of their file, or of their pixels.

    Logits can be published even if the images cannot. The order of the rows does not matter, and rows with the same image
    get the same logits. Only images of other files are decoded, and 64 of the others. If other pixels come out of the same
    file, as of a JPEG file with another decoder, a warning reports it.

    Args:
        images: the user's own copy, with an image column.
        logits_table: a table with `row_key` and logits columns; other columns are left out.
        image_column: the image column; found if not given.
        skip_missing: leave out images without recorded logits instead of stopping.
        num_workers: processes that read the images; `None` is this one.

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
    partner = np.full(len(images), -1)
    if has_files:
        partner = _find(_read_keys(_FileKeys(images), range(len(images)), num_workers), logits_table, FILE_KEY)
        _compare_pixels(images, logits_table, partner)
    others = np.flatnonzero(partner < 0)
    if len(others):
        partner[others] = _find(_read_keys(_PixelKeys(images), others.tolist(), num_workers), logits_table, ROW_KEY)
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


class _FileKeys(EncodedRows):
    """The key of the encoded file in place of a row. Nothing is decoded."""

    def __init__(self, images):
        super().__init__(images.select_columns([IMAGE]))

    def __getitems__(self, rows):
        keys, (_, table) = [], super().__getitems__(rows)
        for row, cell in zip(rows, table[IMAGE]):
            try:
                keys.append(file_key(cell.as_py()))
            except (ValueError, OSError) as error:
                raise ValueError(f"Row {row}: {error}") from error
        return keys


class _PixelKeys(ImageRows):
    """The key of the pixels in place of a row, with one decoded image at a time."""

    def __getitems__(self, rows):
        return [row_key(row[IMAGE]) for row in self.read(rows)]


def _read_keys(keys, rows, num_workers) -> np.ndarray:
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    loader = torch.utils.data.DataLoader(keys, batch_sampler=batches, num_workers=num_workers or 0, collate_fn=list)
    found: list[int] = []
    with Progress("find the logits of the images", len(rows)) as progress:
        for batch in loader:
            found += batch
            progress.update(len(batch))
    return np.array(found, np.int64)


def _compare_pixels(images, logits_table, partner) -> None:
    """Warn if files have other pixels than when they were recorded."""
    sample = spread(np.flatnonzero(partner >= 0).tolist(), _SAMPLE)
    if not sample:
        return
    recorded = in_arrow(logits_table, [ROW_KEY])[partner[sample]][ROW_KEY]
    differing = np.array(_PixelKeys(images).__getitems__(sample)) != recorded.to_numpy()
    if differing.any():
        logger.warning(
            "%d of %d images that were compared have other pixels than the recorded ones, but the same files: another "
            "decoder, for example of JPEG. All files get the logits that were recorded for them.",
            differing.sum(),
            len(sample),
        )


def _find(keys, logits_table, column) -> np.ndarray:
    """The row of the table with each key, or −1."""
    known = in_arrow(logits_table, [column])[:][column]
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
