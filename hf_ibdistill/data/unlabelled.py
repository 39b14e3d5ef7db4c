"""Add images without labels to the training split."""

import logging
import os
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
from datasets import Dataset, DatasetDict, Image, IterableDataset, concatenate_datasets

from ..images.decoding import decode_image
from ..images.views import row_key
from ..progress import Progress
from .columns import IMAGE, as_image_table, label_candidates
from .folders import UNLABELLED_NAMES, open_images
from .sources import open_source
from .splits import spread


logger = logging.getLogger(__name__)

UnlabelledSource = str | os.PathLike | Dataset | IterableDataset
_SPLIT_NAMES = ("train", *UNLABELLED_NAMES)


def add_unlabelled(
    splits: DatasetDict,
    source: UnlabelledSource,
    image_column: str | None = None,
    prepare: Callable[[Dataset], Dataset] | None = None,
    *,
    skip_unreadable: bool = False,
) -> DatasetDict:
    """Add the images of a source to the training split, without labels.

    Args:
        splits: an opened dataset.
        source: a folder of images at any depth, another source of [`load_image_dataset`], a table or a stream. Of several
            splits, the training or unlabelled one is added. The images of a stream are held in memory.
        image_column: the image column of the source; found if not given.
        prepare: what was done to the images of `splits` since they were opened, such as [`scale_pixels`].
        skip_unreadable: add images that cannot be decoded as well, with a warning, for a recording that leaves them out.

    Raises:
        ValueError: the source is empty or unclear, an image cannot be decoded, or images are in the validation or the test
            split as well; the message has their number.
    """
    table, name = _open(source)
    features = table.features or {}
    has_image_column, has_labels = image_column in features, bool(label_candidates(features))
    if features:
        # Whatever the other columns are, they cannot disturb.
        images = [column for column, feature in features.items() if isinstance(feature, Image)]
        table = table.select_columns([image_column] if has_image_column else images or list(features))
    try:
        table = as_image_table(table, image_column if has_image_column else None, needs_label=False)
    except ValueError as error:
        raise ValueError(f"unlabelled={name}: {error}") from error
    if isinstance(table, IterableDataset):
        features = table.select_columns([IMAGE]).features
        batches = list(table.select_columns([IMAGE]).with_format("arrow").iter(batch_size=1024))
        content = pa.concat_tables(batches) if batches else features.arrow_schema.empty_table()
        # Not a generator of datasets, whose cache would survive a change of the stream.
        table = Dataset(content.cast(features.arrow_schema)).cast(features)
    if len(table) == 0:
        raise ValueError(f"unlabelled={name} holds no image. Give at least one.")
    if has_labels:
        logger.warning("unlabelled=%s has labels. They are left out.", name)
    if prepare is not None:
        table = prepare(table)
    train = splits["train"]
    images = table.select_columns([IMAGE]).cast_column(IMAGE, train.features[IMAGE])
    _compare_kinds(train, images, name)
    _refuse_known(splits, images, name, skip_unreadable)
    logger.warning("%s adds %d images without labels to %d training images.", name, len(images), len(train))
    # The columns that the images lack are null in their rows.
    return DatasetDict({**splits, "train": concatenate_datasets([train, images])})


def _open(source) -> tuple[Dataset | IterableDataset, str]:
    if not isinstance(source, (str, os.PathLike)):
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
        sample = table.select(spread(range(len(table)), 64))
        found = [image for image in _decode(sample) if not isinstance(image, ValueError)]
        if not found:
            return
        gray = [len({band.tobytes() for band in image.split()}) == 1 for image in found]
        kinds.append((Counter(image.size for image in found), Counter(gray)))
    (sizes, colors), (other_sizes, other_colors) = kinds
    if not sizes & other_sizes:
        ours, theirs = ("×".join(map(str, counts.most_common(1)[0][0])) for counts in (sizes, other_sizes))
        logger.warning("unlabelled=%s has images of other sizes, such as %s instead of %s pixels.", name, theirs, ours)
    if not colors & other_colors:
        ours, theirs = ("gray" if counts[True] else "colored" for counts in (colors, other_colors))
        logger.warning("The images of unlabelled=%s are %s, those with labels are %s.", name, theirs, ours)


def _refuse_known(splits, images, name, skip_unreadable) -> None:
    """Refuse images that results are measured on. It decodes every image once, as one epoch does."""
    known, errors = {}, []
    for split in ("validation", "test"):
        if split in splits:
            known |= dict.fromkeys(_row_keys(splits[split], errors, f"read the {split} split"), split)
            if errors:
                logger.warning(
                    '%d images of the split "%s" cannot be decoded. unlabelled=%s is not compared with them. %s',
                    len(errors),
                    split,
                    name,
                    errors[0],
                )
                errors.clear()
    found = [known[key] for key in _row_keys(images, errors, "compare the unlabelled images") if key in known]
    if errors and skip_unreadable:
        logger.warning("unlabelled=%s has %d images that cannot be decoded. %s", name, len(errors), errors[0])
    elif errors:
        raise ValueError(
            f"unlabelled={name} has {len(errors)} images that cannot be decoded. Remove them. {errors[0]}"
        )
    if found:
        counts = ", ".join(f"{count} in the {split} split" for split, count in Counter(found).items())
        raise ValueError(
            f"unlabelled={name} has {len(found)} images that results are measured on: {counts}. Remove them from the source."
        )


def _row_keys(table, errors, what):
    """The key of each image; errors are added to the list."""
    with Progress(what, len(table)) as progress:
        for image in _decode(table):
            if isinstance(image, ValueError):
                errors.append(image)
            else:
                yield row_key(image)
            progress.update()


def _decode(table):
    """Each image, or the error about its row."""
    encoded = table.with_format(None).select_columns([IMAGE]).cast_column(IMAGE, Image(decode=False))
    cells = (cell for batch in encoded.iter(batch_size=64) for cell in batch[IMAGE])
    # Reading `features` copies all class names.
    mode = table.features[IMAGE].mode
    for row, cell in enumerate(cells):
        try:
            yield decode_image(cell, mode)
        except ValueError as error:
            yield ValueError(f"Row {row}: {error}")
