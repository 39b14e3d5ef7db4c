"""Open a dataset: source, splits, columns, classes, images without labels."""

import logging
import os

from datasets import DatasetDict, IterableDatasetDict

from .classes import check_class_names, class_names, encode_labels
from .columns import as_image_table, require_table
from .sources import open_source
from .splits import drop_unlabelled_test, hold_out_validation, name_splits
from .unlabelled import UnlabelledSource, add_unlabelled


logger = logging.getLogger(__name__)


def load_image_dataset(
    source: str | os.PathLike,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    unlabelled: UnlabelledSource | None = None,
    **load_kwargs,
) -> DatasetDict | IterableDatasetDict:
    """Open a dataset of images with a train and a validation split, and a test split if the source has one.

    Every split has the columns `image` (`datasets.Image`) and `label` (`datasets.ClassLabel`); other columns are kept.
    A training image may have no label (null or −1): teachers teach from it, while teachers and results need labels.
    Without a validation split, a stratified part of the training split becomes one, and a warning reports it. A test
    split is never trained on.

    Args:
        source: one of
            - `"digits"`: the 1,797 handwritten digits of scikit-learn, 8×8 pixels, bundled;
            - a `save_to_disk` folder, also at an address such as `hf://datasets/user/table`;
            - a folder of class folders, with or without split folders above them;
            - a Parquet file, or a folder of them;
            - a folder of IDX files as MNIST and Fashion-MNIST have them (`train-images-idx3-ubyte`, …, also gzipped);
            - the id of a dataset on the Hub.
        image_column: the image column; found if not given.
        label_column: the label column; found if not given.
        validation_fraction: share of the training split that becomes the validation split if there is none.
        seed: seed of that split.
        unlabelled: further images for the training split, without labels: a folder of images at any depth, another of these
            sources, a table or a stream, whose images are held in memory. Images of the validation or test split are
            refused; each image is decoded once to find them.
        load_kwargs: for a Hub id, passed to `datasets.load_dataset`, for example the `name` of a configuration or a
            `revision`. Parquet files take `split` and the options of their reader; other sources take none. With
            `streaming=True`, the splits are streams, which [`record_teacher_logits`] records. They need labels of the type
            `ClassLabel`, and no validation split is made.

    Raises:
        TypeError: `source` is no text or path, or `unlabelled` is of another kind.
        FileNotFoundError: `source` looks like a path and nothing is there.
        ValueError: a column cannot be found, a split is empty or missing, files are damaged or differ, labels do not fit
            their names, unlabelled images are among those to measure on, or an argument does not apply to this source.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a {type(source).__name__}. Pass a folder, a file or a Hub id.")
    if not (unlabelled is None or isinstance(unlabelled, (str, os.PathLike))):
        require_table(unlabelled, "unlabelled", streams=True)
    splits = name_splits(open_source(source, load_kwargs), source)
    splits = as_image_table(splits, image_column, label_column)
    if isinstance(splits, IterableDatasetDict):
        return _check_streams(splits, source, unlabelled)
    splits = encode_labels(drop_unlabelled_test(splits))
    splits = hold_out_validation(splits, validation_fraction, seed, source)
    return splits if unlabelled is None else add_unlabelled(splits, unlabelled, image_column)


def _check_streams(splits, source, unlabelled) -> IterableDatasetDict:
    """What can be known before streams are read."""
    if unlabelled is not None:
        raise ValueError(f"unlabelled={unlabelled!r} needs a table to be added to. Leave out streaming=True.")
    names = {name: class_names(split) for name, split in splits.items()}
    for name in names:
        check_class_names(names[name], names["train"], f'the split "{name}"')
    if "validation" not in splits:
        logger.warning("%s has no validation split, and none is made of a stream.", source)
    return splits
