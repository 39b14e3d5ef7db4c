"""Open a labelled image data set, whatever form it has: find its columns, name its classes, settle its splits."""

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "picture", "photo")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label")
_SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}


def load_image_dataset(
    source: str | os.PathLike,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    **load_kwargs,
) -> DatasetDict:
    """Open a labelled image data set with a train, a validation and, where the source has one, a test split.

    The label column comes back as a `ClassLabel`, so its names are known. Where there is no validation split, a
    stratified part of the training split becomes one, and a warning says so. A test split is never trained on.

    Args:
        source: `"digits"` (scikit-learn's 1,797 handwritten digits of 8×8 pixels, bundled), a `save_to_disk` folder, a
            folder of class folders (with or without split folders above them), a Parquet file or a folder of them, a
            folder of MNIST's IDX files (`train-images-idx3-ubyte` and so on, also gzipped; Fashion-MNIST has them too), or
            the id of a data set on the Hub.
        image_column: the image column; found when not given.
        label_column: the label column; found when not given.
        validation_fraction: share of the training split that becomes the validation split where there is none.
        seed: seed of that split.
        load_kwargs: passed to `datasets.load_dataset`, for example a configuration's `name` or a `revision`.

    Raises:
        FileNotFoundError: `source` looks like a path and nothing is there.
        ValueError: a column cannot be found, a split is empty or missing, or labels do not fit their names.
    """
    dataset = _open(source, load_kwargs)
    if not isinstance(dataset, dict):
        # A table on its own says which split it is; part of one is "train[:10%]".
        dataset = {str(dataset.split or "train").partition("[")[0]: dataset}
    splits = DatasetDict(_name_splits(dataset, source))
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f'The split "{name}" of {source} is empty; every split needs at least one row.')
    image_column, label_column = find_columns(splits["train"], image_column, label_column)
    splits = _with_class_labels(splits, label_column)
    if "validation" not in splits:
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction lies between 0 and 1; got {validation_fraction}.")
        total = len(splits["train"])
        parts, how = _split(splits["train"], label_column, validation_fraction, seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
        logger.warning(
            "%s has no validation split: %s %d of its %d training images become one (seed %d).",
            source, how, len(parts["test"]), total, seed,
        )  # fmt: skip
    return splits


def find_columns(
    dataset: Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """The names of the image and the label column, checked when given and found when not.

    Raises:
        ValueError: there is none, or several and no usual name among them; the message lists the columns.
    """
    features = dataset.features
    image = find_image_column(dataset, image_column)
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    scalars = [name for name in _LABEL_NAMES if isinstance(features.get(name), Value)]
    return image, _pick("label", label_column, labels or scalars, _LABEL_NAMES, features)


def find_image_column(dataset: Dataset, image_column: str | None = None) -> str:
    """The image column alone, as [`find_columns`] finds it.

    Raises:
        ValueError: as [`find_columns`].
    """
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    return _pick("image", image_column, images, _IMAGE_NAMES, dataset.features)


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """The names of the classes, in the order of their ids.

    Raises:
        ValueError: the column is not a `ClassLabel`.
    """
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f'The label column "{label_column}" is {feature}, without class names. Open the data with '
            f'load_image_dataset, or cast it: dataset.class_encode_column("{label_column}").'
        )
    return feature.names


def config_class_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's classes, in the order of its logits."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def class_config(dataset: Dataset, label_column: str = "label") -> dict:
    """A model configuration's `num_labels`, `id2label` and `label2id` for this data set's classes.

    Raises:
        ValueError: the column is not a `ClassLabel`.
    """
    names = class_names(dataset, label_column)
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def select_per_class(dataset: Dataset, images_per_class: int, label_column: str, seed: int = 0) -> Dataset:
    """A random subset with this many images of each class. Subsets of one seed are nested: the smaller is part of the
    larger.

    Raises:
        ValueError: a class has fewer images.
    """
    labels = np.asarray(dataset.with_format("numpy")[label_column])
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for class_id, name in enumerate(class_names(dataset, label_column)):
        rows = order[labels[order] == class_id]
        if images_per_class < 1 or len(rows) < images_per_class:
            raise ValueError(
                f'{images_per_class} images of class "{name}" were asked for; there are {len(rows)}. '
                "Ask for at least 1 and at most the number of the smallest class."
            )
        chosen.extend(rows[:images_per_class])
    return dataset.select(sorted(chosen))


def _open(source, load_kwargs):
    if str(source) == "digits":
        return _load_digits()
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            _check_saved_splits(path)
            return load_from_disk(str(path))
        if any(path.glob("*-images-idx3-ubyte*")):
            return _load_idx(path)
        return load_dataset(str(path), **load_kwargs)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is a file but not Parquet; give a folder, a .parquet file or a Hub id.")
        return load_dataset("parquet", data_files=str(path), **load_kwargs)
    if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"There is no folder or file {source}.")
    return load_dataset(str(source), **load_kwargs)


def _check_saved_splits(path):
    """`load_from_disk` fails without a reason on a table that was saved with no rows, and so with no file."""
    for state in sorted(path.rglob("state.json")):
        if json.loads(state.read_text()).get("_data_files") == []:
            raise ValueError(
                f'The split "{state.parent.name}" of {path} is empty; every split needs at least one row.'
            )


def _load_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    rows = {"image": list(pixels), "label": digits.target}
    # The source has no test split. This one is the same for every seed, so that results can be compared.
    return Dataset.from_dict(rows, features=features).train_test_split(
        test_size=0.2, stratify_by_column="label", seed=0
    )


def _load_idx(folder):
    splits = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        files = {}
        for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            found = [path for path in (folder / f"{prefix}-{part}", folder / f"{prefix}-{part}.gz") if path.exists()]
            files[part] = found[0] if found else None
        images, labels = files.values()
        if images is None and labels is None and split == "test":
            continue
        if images is None or labels is None:
            raise ValueError(
                f"{folder} has IDX files, but not {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte (or .gz); "
                "a split needs both."
            )
        pixels, classes = _read_idx(images), _read_idx(labels)
        if pixels.ndim != 3 or classes.shape != pixels.shape[:1]:
            raise ValueError(
                f"{images} holds an array {pixels.shape} and {labels} an array {classes.shape}; expected images "
                "(N, height, width) and a label for each."
            )
        features = Features({"image": Image(), "label": Value("int64")})
        splits[split] = Dataset.from_dict({"image": list(pixels), "label": classes}, features=features)
    return splits


def _read_idx(path):
    """The array of an IDX file: two zero bytes, the type (8 is uint8), the number of dimensions, each as a big-endian
    32-bit number, and the values."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as one of unsigned bytes does")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file: {error}.") from error


def _name_splits(splits, source):
    named = {}
    for name, aliases in _SPLIT_ALIASES.items():
        found = next((alias for alias in aliases if alias in splits), None)
        if found is not None:
            named[name] = splits[found]
    others = [name for name in splits if not any(name in aliases for aliases in _SPLIT_ALIASES.values())]
    if "train" in others:
        named["train"] = splits["train"]
    elif len(others) == 1:
        logger.warning('%s has no split "train": training on "%s".', source, others[0])
        named["train"] = splits[others[0]]
    else:
        raise ValueError(f'{source} has no split "train"; its splits are {", ".join(splits)}.')
    return named


def _pick(kind, given, candidates, usual_names, columns):
    if given is not None:
        if given not in columns:
            raise ValueError(f'There is no column "{given}"; the columns are {", ".join(columns)}.')
        return given
    if len(candidates) == 1:
        return candidates[0]
    for name in usual_names:
        if name in candidates:
            return name
    problem = f"{len(candidates)} columns could be the {kind} column" if candidates else f"There is no {kind} column"
    raise ValueError(f"{problem}; the columns are {', '.join(columns)}. Name it with {kind}_column.")


def _with_class_labels(splits, label_column):
    for name, split in splits.items():
        if label_column not in split.column_names:
            raise ValueError(
                f'The split "{name}" has no column "{label_column}"; its columns are {", ".join(split.column_names)}.'
            )
        if split.data.column(label_column).null_count:
            raise ValueError(f'The split "{name}" has rows without a label in column "{label_column}".')
    if "test" in splits and _is_unlabelled(splits["test"], label_column):
        logger.warning("The test split carries no labels and is left out.")
        del splits["test"]
    if not isinstance(splits["train"].features[label_column], ClassLabel):
        splits = _number_classes(splits, label_column)
    names = splits["train"].features[label_column].names
    for name, split in splits.items():
        if split.features[label_column].names != names:
            raise ValueError(
                f'The splits "train" and "{name}" have different classes: {name_difference(names, split.features[label_column].names)}.'
            )
        labels = np.asarray(split.with_format("numpy")[label_column])
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise ValueError(
                f'Row {wrong[0]} of the split "{name}" has label {labels[wrong[0]]}; there are {len(names)} classes '
                f"({len(wrong)} such rows)."
            )
    return splits


def _is_unlabelled(dataset, label_column):
    """Whether every label is −1, as in benchmarks that keep their test labels to themselves."""
    labels = dataset.with_format("arrow")[:][label_column].unique().to_pylist()
    return labels == [-1]


def _number_classes(splits, label_column):
    names = sorted(splits["train"].unique(label_column))
    ids = {name: i for i, name in enumerate(names)}
    for split, rows in splits.items():
        unknown = [value for value in rows.unique(label_column) if value not in ids]
        if unknown:
            raise ValueError(
                f'The split "{split}" has classes that no training image has: {unknown[:10]}. The classes are {names[:10]}.'
            )
    feature = ClassLabel(names=[str(name) for name in names])
    return DatasetDict(
        {
            split: rows.map(
                lambda batch: {label_column: [ids[value] for value in batch[label_column]]},
                batched=True,
                features=Features({**rows.features, label_column: feature}),
                desc="Numbering the classes",
            )
            for split, rows in splits.items()
        }
    )


def name_difference(expected: Iterable[str], found: Iterable[str]) -> str:
    """What differs between two lists of names, in words."""
    expected, found = list(expected), list(found)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if not missing and not extra:
        return f"the same names in another order ({expected[:10]} and {found[:10]})"
    return f"{missing[:10]} only in the first, {extra[:10]} only in the second"


def has_default_names(label_names: Sequence[str]) -> bool:
    """Whether the names are the ones that transformers gives classes that nobody named."""
    return list(label_names) == [f"LABEL_{i}" for i in range(len(label_names))]


def public_name(source: str | os.PathLike) -> str:
    """What a card may tell of a data set's or a teacher's source: a name or Hub id as it is, of a folder or file its own name,
    since the path to it tells about a machine."""
    path = Path(source)
    return path.resolve().name if path.is_absolute() or path.exists() else str(source)


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


def _split(dataset, label_column, fraction, seed):
    """Two parts, and in words how they were drawn."""
    if len(dataset) < 2:
        raise ValueError("A training split of one image cannot be divided; add a validation split to the data.")
    smallest = np.unique(np.asarray(dataset.with_format("numpy")[label_column]), return_counts=True)[1].min()
    held_out = min(max(1, round(len(dataset) * fraction)), len(dataset) - 1)
    num_classes = dataset.features[label_column].num_classes
    stratify = smallest >= 2 and min(held_out, len(dataset) - held_out) >= num_classes
    parts = dataset.train_test_split(
        test_size=held_out, stratify_by_column=label_column if stratify else None, seed=seed
    )
    return parts, "a stratified" if stratify else "a random (there are too few images to split by class)"
