"""Add images without labels to the training split."""

import logging
import os
from collections import Counter

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, concatenate_datasets
from tqdm.auto import tqdm

from ..images.decoding import decode_image
from ..images.views import row_key
from .columns import IMAGE, LABEL, as_image_table, require_table
from .folders import open_images
from .sources import open_source


logger = logging.getLogger(__name__)

UnlabelledSource = str | os.PathLike | Dataset | IterableDataset
_SPLIT_NAMES = ("train", "unlabelled", "unlabeled", "unsupervised")


def add_unlabelled(splits: DatasetDict, source: UnlabelledSource, image_column: str | None = None) -> DatasetDict:
    """Add the images of a source to the training split, without labels.

    Args:
        splits: an opened dataset.
        source: a folder of images at any depth, another source of [`load_image_dataset`], a table or a stream. Of several
            splits, the training or unlabelled one is added. The images of a stream are held in memory.
        image_column: the image column of the source; found if not given.

    Raises:
        TypeError: `source` is of another kind.
        ValueError: the source is empty or unclear, an image cannot be decoded, or images are in the validation or the test
            split as well; the message has their number.
    """
    table, name = _open(source)
    has_image_column = table.features is not None and image_column in table.features
    table = as_image_table(table, image_column if has_image_column else None, needs_label=False)
    if isinstance(table, IterableDataset):
        features = table.select_columns([IMAGE]).features
        batches = list(table.select_columns([IMAGE]).with_format("arrow").iter(batch_size=1024))
        content = pa.concat_tables(batches) if batches else features.arrow_schema.empty_table()
        # Not a generator of datasets, whose cache would survive a change of the stream.
        table = Dataset(content.cast(features.arrow_schema)).cast(features)
    if len(table) == 0:
        raise ValueError(f"unlabelled={name} holds no image. Give at least one.")
    if any(isinstance(feature, ClassLabel) for feature in table.features.values()) or LABEL in table.column_names:
        logger.warning("unlabelled=%s has labels. They are left out.", name)
    train = splits["train"]
    images = table.select_columns([IMAGE]).cast_column(IMAGE, train.features[IMAGE])
    _compare_kinds(train, images, name)
    _refuse_known(splits, images, name)
    logger.warning("%s adds %d images without labels to %d training images.", name, len(images), len(train))
    # The columns that the images lack are null in their rows.
    return DatasetDict({**splits, "train": concatenate_datasets([train, images])})


def _open(source) -> tuple[Dataset | IterableDataset, str]:
    if not isinstance(source, (str, os.PathLike)):
        require_table(source, "unlabelled", streams=True)
        return source, type(source).__name__
    splits = open_source(source, {}, open_images=lambda root: {"train": open_images(root)})
    names = [name for name in splits if name in _SPLIT_NAMES] if len(splits) > 1 else list(splits)
    if len(names) != 1:
        raise ValueError(f"unlabelled={source} has the splits {', '.join(splits)}. Open it, and pass one of them.")
    others = [f"{name} ({len(split)} rows)" for name, split in splits.items() if name not in names]
    if others:
        logger.warning("unlabelled=%s: the splits %s are left out.", source, ", ".join(others))
    return splits[names[0]], str(source)


def _compare_kinds(train, images, name) -> None:
    """Warn of images of another mode or size than any that is trained on; samples of 64 are compared."""
    kinds = []
    for table in (train, images):
        rows = sorted({int(row) for row in np.linspace(0, len(table) - 1, 64)})
        found = [_decode(cell, table, row) for row, cell in zip(rows, _encoded(table.select(rows)))]
        grey = [bool((np.ptp(np.asarray(image), axis=-1) == 0).all()) for image in found]
        kinds.append((Counter(image.size for image in found), Counter(grey)))
    (sizes, colors), (other_sizes, other_colors) = kinds
    if not sizes & other_sizes:
        ours, theirs = ("×".join(map(str, counts.most_common(1)[0][0])) for counts in (sizes, other_sizes))
        logger.warning("unlabelled=%s has images of other sizes, such as %s instead of %s pixels.", name, theirs, ours)
    if not colors & other_colors:
        ours, theirs = ("grey" if counts[True] else "colored" for counts in (colors, other_colors))
        logger.warning("The images of unlabelled=%s are %s, those with labels are %s.", name, theirs, ours)


def _refuse_known(splits, images, name) -> None:
    """Refuse images that results are measured on. It decodes every image once, as one epoch does."""
    known = {}
    for split in ("validation", "test"):
        if split in splits:
            known |= dict.fromkeys(_row_keys(splits[split], f'Reading the split "{split}"'), split)
    found = [known[key] for key in _row_keys(images, "Comparing unlabelled images") if key in known]
    if found:
        counts = ", ".join(f"{count} in the {split} split" for split, count in Counter(found).items())
        raise ValueError(
            f"unlabelled={name} has {len(found)} images that results are measured on: {counts}. Remove them from the source."
        )


def _row_keys(table, description):
    for row, cell in enumerate(tqdm(_encoded(table), desc=description, total=len(table), disable=len(table) < 10_000)):
        yield row_key(_decode(cell, table, row))


def _encoded(table):
    encoded = table.with_format(None).select_columns([IMAGE]).cast_column(IMAGE, Image(decode=False))
    for batch in encoded.iter(batch_size=64):
        yield from batch[IMAGE]


def _decode(cell, table, row):
    try:
        return decode_image(cell, table.features[IMAGE].mode)
    except ValueError as error:
        raise ValueError(f"Row {row} of the images: {error}") from error
