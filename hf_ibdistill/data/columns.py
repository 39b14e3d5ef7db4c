"""The door: every table that enters the package gets an "image" and a "label" column here."""

from collections.abc import Mapping, Sequence

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
)
from datasets.table import InMemoryTable


IMAGE, LABEL = "image", "label"
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label")
_ENCODED_TYPES = ("string", "large_string", "binary", "large_binary")

Table = Dataset | IterableDataset


def as_image_table(
    table: Table | Mapping[str, Table],
    image_column: str | None = None,
    label_column: str | None = None,
    *,
    needs_image: bool = True,
    needs_label: bool | None = True,
) -> Table | DatasetDict | IterableDatasetDict:
    """The same rows with the image column named `"image"` and the label column named `"label"`. Other columns stay.

    A table that has these names is returned as it is, without a format such as "torch". Images of a stream stay encoded,
    because renaming a decoded column would compress them a second time.

    Args:
        table: a table, a stream, or several splits of either. All splits use the columns that are found in the training
            split, or in the first if there is none.
        image_column: the image column. `None` takes the one named `"image"`, or the only image column. A column of paths
            or encoded bytes must be given.
        label_column: the label column. `None` takes the one named `"label"`, or the only column that is a `ClassLabel`
            or has a usual name of a label.
        needs_image: whether it is an error if the table has no image column, or several. If not, they keep their names.
        needs_label: the same for the label column. `None` is true, unless a table has no column that could be one.

    Raises:
        TypeError: `table` is neither of these.
        ValueError: a column does not exist, cannot be determined, has another type, or its new name is taken; or the
            table has a transform, or no column types.
    """
    if needs_label is None:
        tables = table.values() if isinstance(table, Mapping) else [table]
        typed = [one.features for one in tables if isinstance(one, (Dataset, IterableDataset)) and one.features]
        needs_label = all(label_candidates(features) for features in typed)
    if isinstance(table, Mapping):
        if not table:
            raise ValueError("There are no splits.")
        first = table["train" if "train" in table else next(iter(table))]
        image, label = _find_columns(first, image_column, label_column, needs_image, needs_label)
        image, label = image if needs_image else image_column, label if needs_label else label_column
        splits = {}
        for name, split in table.items():
            try:
                splits[name] = as_image_table(split, image, label, needs_image=needs_image, needs_label=needs_label)
            except ValueError as error:
                raise ValueError(f'The split "{name}": {error}') from error
        return IterableDatasetDict(splits) if isinstance(first, IterableDataset) else DatasetDict(splits)
    image, label = _find_columns(table, image_column, label_column, needs_image, needs_label)
    names = {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old not in (None, new)}
    for old, new in names.items():
        if new in table.features:
            raise ValueError(
                f'The column "{old}" would be named "{new}", but another column has that name. Remove or rename "{new}".'
            )
    if isinstance(table, Dataset) and (table.format["type"] or table.format["columns"] != table.column_names):
        # A format decides what a row looks like, and may hide columns.
        table = table.with_format(None)
    if image is not None and not isinstance(table.features[image], Image):
        table = table.cast_column(image, Image())
    if isinstance(table, IterableDataset):
        return _rename_stream(table, names, image)
    return table.rename_columns(names) if names else table


def require_table(table: object, what: str, streams: bool = False) -> None:
    """Refuse anything but one table.

    Args:
        table: what was given.
        what: the argument's name, for the message.
        streams: whether a stream will do.

    Raises:
        TypeError: it is another object, several splits, or a stream.
    """
    kinds = "a datasets.Dataset or IterableDataset" if streams else "a datasets.Dataset"
    if isinstance(table, Mapping):
        raise TypeError(
            f"{what} is a {type(table).__name__} with the splits {', '.join(map(str, table)) or 'none'}, not {kinds}. Choose "
            f'one of them: splits["{next(iter(table), "train")}"].'
        )
    if isinstance(table, IterableDataset) and not streams:
        raise TypeError(f"{what} is an IterableDataset, not {kinds}. Open it without streaming=True.")
    if not isinstance(table, (Dataset, IterableDataset)):
        raise TypeError(f"{what} is a {type(table).__name__}, not {kinds}. Open it with load_image_dataset.")


def in_arrow(table: Dataset, columns: Sequence[str]) -> Dataset:
    """These columns of a table, whose rows come as Arrow tables. It is for this process: a pickle would hold the content.

    The time does not grow with the number of files. `select_columns` and `with_format` copy the description of each of them.
    """
    selected = Dataset(
        InMemoryTable(table.data.table.select(list(columns))),
        DatasetInfo(features=Features({name: table.features[name] for name in columns})),
        # `select` and `shuffle` leave the files alone and list the rows here.
        indices_table=table._indices,
        # By default it would be a hash of the content.
        fingerprint="in_arrow",
    )
    selected.set_format("arrow")
    return selected


def _rename_stream(table, names, image) -> IterableDataset:
    features = {names.get(name, name): feature for name, feature in table.features.items()}
    if image is not None:
        features[IMAGE] = Image(mode=getattr(features[IMAGE], "mode", None), decode=False)
    if names:
        # Renaming passes every row through a function, and whatever is decoded for it is encoded again after it.
        table = table.with_format(None).decode(False).rename_columns(names)
    return table if table.features == features else table.cast(Features(features))


def _find_columns(table, image_column, label_column, needs_image, needs_label) -> tuple[str | None, str | None]:
    require_table(table, "dataset", streams=True)
    features = table.features
    if features is None:
        raise ValueError("The stream has no column types (features=None). Open it with features=datasets.Features(…).")
    if isinstance(table, Dataset) and table.format["type"] == "custom":
        raise ValueError(
            "The table has a transform. Remove it with dataset.reset_format(): teachers and student must see the same "
            "images, so this package decodes and preprocesses them."
        )
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = _find("image", image_column, images, features, needs_image)
    label = _find("label", label_column, label_candidates(features), features, needs_label)
    if image_column is not None and not _holds_images(features[image]):
        raise ValueError(
            f'image_column="{image}" is {features[image]}, not images, paths or encoded bytes. Cast it: '
            f'dataset.cast_column("{image}", datasets.Image()).'
        )
    if label_column is not None and not isinstance(features[label], (ClassLabel, Value)):
        raise ValueError(f'label_column="{label}" is {features[label]}, not one label a row. Choose another column.')
    return image, label


def label_candidates(features: Features) -> list[str]:
    """The columns that could be the label column: a `ClassLabel`, or one with a usual name of a label."""
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) or (name in _LABEL_NAMES and isinstance(feature, Value))
    ]


def _holds_images(feature) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in _ENCODED_TYPES)


def _find(kind: str, given: str | None, candidates: Sequence[str], features: Features, is_needed: bool) -> str | None:
    columns = ", ".join(features)
    if given is not None:
        if not isinstance(given, str) or given not in features:
            raise ValueError(f'{kind}_column="{given}" does not exist; the columns are {columns}.')
        return given
    if kind in candidates:
        return kind
    if len(candidates) == 1:
        return candidates[0]
    if not is_needed:
        return None
    if candidates:
        raise ValueError(
            f"Several columns could be the {kind} column: {', '.join(candidates)}. Choose one with {kind}_column."
        )
    if kind == "image" and "row_key" in features:
        raise ValueError(
            f"The table holds logits without images; the columns are {columns}. Open the images, and join the logits to them: "
            "attach_teacher_logits(images, table), on the command line --logits TABLE."
        )
    raise ValueError(f"There is no {kind} column; the columns are {columns}. Name it with {kind}_column.")
