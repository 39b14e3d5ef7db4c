"""Splits: their names, a held-out validation split, and subsets."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets.utils.stratify import stratified_shuffle_split_generate_indices

from ..checks import check_numbers
from .classes import class_names, label_ids, label_values
from .columns import LABEL, Table, as_image_table, require_table
from .folders import split_of


logger = logging.getLogger(__name__)


def name_splits(splits: Mapping[str, Table], source: object) -> DatasetDict | IterableDatasetDict:
    """The splits under the names "train", "validation" and "test". The last two are optional.

    Raises:
        ValueError: there is no training split, or a split is empty.
    """
    named, others = {}, []
    for name, split in splits.items():
        standard = split_of(name)
        if standard is None:
            others.append(name)
        elif standard in named:
            raise ValueError(f'{source} has several splits for "{standard}": {", ".join(splits)}. Rename one.')
        else:
            named[standard] = split
    if "train" not in named:
        if len(others) != 1:
            raise ValueError(f'{source} has no split "train"; its splits are {", ".join(splits)}.')
        logger.warning('%s has no split "train": training on "%s".', source, others[0])
        named["train"] = splits[others.pop()]
    for name in others:
        rows = "" if isinstance(splits[name], IterableDataset) else f" with {len(splits[name])} rows"
        logger.warning('%s: the split "%s"%s is left out.', source, name, rows)
    if isinstance(named["train"], IterableDataset):
        return IterableDatasetDict(named)
    for name, split in named.items():
        if len(split) == 0:
            raise ValueError(f'The split "{name}" of {source} is empty; every split needs at least one row.')
    return DatasetDict(named)


def drop_unlabelled_test(splits: DatasetDict) -> DatasetDict:
    """Leave out a test split without any label (null or −1), as benchmarks publish whose test labels are secret."""
    if "test" in splits and {None, -1}.issuperset(label_values(splits["test"]).unique().to_pylist()):
        logger.warning("The test split has no labels and is left out.")
        return DatasetDict({name: split for name, split in splits.items() if name != "test"})
    return splits


def hold_out_validation(splits: DatasetDict, fraction: float, seed: int, source: object) -> DatasetDict:
    """Make part of the training split the validation split, if there is none. The part is stratified by class if every
    class has enough images.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or there is only one training image.
    """
    if "validation" in splits:
        return splits
    check_numbers(0, 1, validation_fraction=fraction)
    check_numbers(0, 2**32 - 1, whole=True, seed=seed)
    if fraction in (0, 1):
        raise ValueError(f"validation_fraction={fraction} is not between 0 and 1.")
    train = splits["train"]
    labels = label_ids(train)
    labelled, unlabelled = np.flatnonzero(labels != -1), np.flatnonzero(labels == -1)
    count = len(labelled)
    if count < 2:
        raise ValueError(
            f"A training split with labels for {count} images cannot be divided; add a validation split to the data."
        )
    smallest = np.unique(labels[labelled], return_counts=True)[1].min()
    held_out = min(max(1, round(count * fraction)), count - 1)
    is_stratified = smallest >= 2 and min(held_out, count - held_out) >= train.features[LABEL].num_classes
    if is_stratified:
        rest, chosen = stratified_rows(labels[labelled], held_out, seed)
    else:
        # As `train_test_split` chooses them, which would write a cache file beside the data.
        order = np.random.default_rng(seed).permutation(count)
        rest, chosen = order[held_out:], order[:held_out]
    rest = labelled[rest] if not len(unlabelled) else np.sort(np.concatenate((labelled[rest], unlabelled)))
    parts = train.select(rest), train.select(labelled[chosen])
    logger.warning(
        "%s has no validation split: %s %d of its %d training images with labels become one (seed %d).",
        source,
        "a stratified" if is_stratified else "a random (there are too few images to split by class)",
        held_out,
        count,
        seed,
    )
    return DatasetDict({**splits, **dict(zip(("train", "validation"), parts))})


def stratified_rows(labels: np.ndarray, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out rows at random, with the same share of every class.

    The result is that of `train_test_split(stratify_by_column="label")`, which reads the labels one by one.

    Args:
        labels: (N,), class ids.
        held_out: number of rows to hold out.
        seed: seed of the choice.

    Returns:
        The numbers of the other rows, and those of the held-out rows.
    """
    random = np.random.default_rng(seed)
    return next(stratified_shuffle_split_generate_indices(labels, len(labels) - held_out, held_out, rng=random))


def select_per_class(
    dataset: Dataset, images_per_class: int, label_column: str | None = None, seed: int = 0, keep_rest: bool = False
) -> Dataset:
    """A random subset with this many labelled images of each class. Subsets of one seed are nested: the smaller is part of
    the larger.

    Args:
        dataset: a table with a `ClassLabel` column.
        images_per_class: images of each class.
        label_column: the label column; found if not given.
        seed: seed of the choice.
        keep_rest: keep the other rows without their labels, which become null, instead of leaving them out.

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: the column cannot be found or is not a `ClassLabel`, or a class has fewer images.
    """
    require_table(dataset, "dataset")
    check_numbers(1, whole=True, images_per_class=images_per_class)
    check_numbers(0, whole=True, seed=seed)
    dataset = as_image_table(dataset, label_column=label_column, needs_image=False)
    names, labels = class_names(dataset), label_ids(dataset)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for class_id, name in enumerate(names):
        rows = order[labels[order] == class_id]
        if len(rows) < images_per_class:
            raise ValueError(
                f'images_per_class={images_per_class}, but the class "{name}" has {len(rows)} images. Choose at most the '
                "size of the smallest class."
            )
        chosen.extend(rows[:images_per_class])
    if not keep_rest:
        return dataset.select(sorted(chosen))
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    # A column that one part lacks is null in its rows. No row is copied.
    parts = [dataset.select(chosen), dataset.select(rest).remove_columns(LABEL)]
    return concatenate_datasets(parts).select(np.argsort(np.concatenate((chosen, rest))))


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, from all over."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count, dtype=int))] if len(items) else []
