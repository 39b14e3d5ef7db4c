"""Sources: where images come from, and what each format looks like on disk."""

import glob
import gzip
import importlib.util
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from ..files import is_address
from ..mirror import Mirror
from .columns import in_arrow
from .folders import check_name, divide_rows, open_image_folder, report_files, split_in, walk
from .splits import stratified_rows


logger = logging.getLogger(__name__)


def open_source(
    source: str | os.PathLike,
    load_kwargs: Mapping,
    open_images: Callable[[Path], dict[str, Dataset]] = open_image_folder,
) -> dict[str, Dataset]:
    """Open a source by its format; see [`~data.loading.load_image_dataset`].

    Args:
        source: where the images come from.
        load_kwargs: passed to `datasets.load_dataset`.
        open_images: reads a folder of image files.

    Returns:
        Split → table, with the columns and the names of splits that the source has.

    Raises:
        FileNotFoundError: `source` looks like a path and nothing is there.
        ValueError: the files are of another format, damaged or empty, their splits are not clear, or an argument does not
            apply.
    """
    opened = _open(source, load_kwargs, open_images)
    if isinstance(opened, (Dataset, IterableDataset)):
        # A single table names its split; part of one is "train[:10%]".
        opened = {str(opened.split or "train").partition("[")[0]: opened}
    if not isinstance(opened, dict):
        raise ValueError(f"split={load_kwargs.get('split')!r} opens several tables. Give one split, or none.")
    if [*opened] != ["train"] or isinstance(opened["train"], IterableDataset):
        return opened
    return _divide_by_column(opened["train"], source)


def _divide_by_column(rows, source):
    """Split → rows of a training table, by its column "split" if that has names of splits."""
    column = next((name for name in rows.column_names if name.lower() == "split"), None)
    if column is None:
        return {"train": rows}
    feature, values = rows.features[column], in_arrow(rows, [column])[:][column].to_pylist()
    if isinstance(feature, ClassLabel):
        values = [value if value is None or value < 0 else feature.names[value] for value in values]
    return divide_rows(rows, [split_in(str(value)) for value in values], f'The column "{column}" of {source}')


def _open(source, load_kwargs, open_images):
    if not str(source).strip():
        raise ValueError(f"source={str(source)!r} names nothing. Pass a folder, a file or a Hub id; . is this folder.")
    check_name(str(source))
    if is_address(source):
        _refuse(source, load_kwargs)
        return open_address(source)
    path = Path(source).expanduser()
    if str(source) == "digits":
        if path.exists():
            logger.warning(
                '"digits" opens the bundled digits, not the folder of that name; ./digits opens the folder.'
            )
        _refuse(source, load_kwargs)
        return _load_digits()
    if path.is_dir():
        return _open_folder(path, load_kwargs, open_images)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is not a Parquet file; give a folder, a .parquet file or a Hub id.")
        return _open_parquet(path.parent, [path], load_kwargs)
    if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"There is no folder or file {source}.")
    # `load_dataset` takes such a name for a format, and opens the working folder.
    if str(source).isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{source}"):
        raise ValueError(
            f"There is no folder {source}; source={str(source)!r} is a format. Pass the folder that has it."
        )
    return load_dataset(str(source), **load_kwargs)


def _refuse(source, load_kwargs, names=None):
    """Refuse arguments that this kind of source would ignore: those of these names, or all."""
    given = {name: value for name, value in load_kwargs.items() if value is not None and value is not False}
    ignored = [f"{name}={value!r}" for name, value in given.items() if names is None or name in names]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} does not apply to {source}. Leave it out; it is for Hub ids.")


def open_address(source: str | os.PathLike) -> Dataset | DatasetDict:
    """Open a saved table at an address that fsspec knows, such as `hf://datasets/user/table`. It is downloaded into the cache folder
    of `datasets`, unless it is there.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: there is one that is not finished or damaged, or the address cannot be opened.
    """
    mirror = Mirror(source)
    names = mirror.pull()
    if any(name.endswith("recording.json") for name in names):
        raise ValueError(f"{mirror.address} holds a recording that is not finished. Record again; it continues there.")
    if not any(name.endswith("state.json") for name in names):
        raise FileNotFoundError(
            f"There is no saved table at {mirror.address}. Other files there are for datasets.load_dataset, whose tables and "
            "streams the functions of this package take."
        )
    return open_saved(mirror.folder)


def _open_folder(path, load_kwargs, open_images):
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        _refuse(path, load_kwargs)
        return open_saved(path)
    for manifest in (*path.glob("recording.json"), *path.glob("*/recording.json")):
        raise ValueError(
            f"{manifest.parent} holds a recording that is not finished. Record again; it continues there."
        )
    if any(re.search("-images[-.]idx3-ubyte", file.name) for file in path.iterdir()):
        _refuse(path, load_kwargs)
        return _load_idx(path)
    files = [Path(file) for file in sorted(walk(path))]
    parquet = [file for file in files if file.suffix.lower() == ".parquet" and file.name != "metadata.parquet"]
    if parquet:
        report_files(path, sorted({*files} - {*parquet}), "beside the Parquet files")
        return _open_parquet(path, parquet, load_kwargs)
    _refuse(path, load_kwargs)
    return open_images(path)


def open_saved(path: str | os.PathLike) -> Dataset | DatasetDict:
    """Open a folder that `save_to_disk` or recording wrote.

    Raises:
        ValueError: a split has no rows, or a file is missing or damaged.
    """
    path = Path(path)
    try:
        states = [*path.glob("state.json"), *sorted(path.glob("*/state.json"))]
        files = {state.parent.name: json.loads(state.read_text(encoding="utf-8"))["_data_files"] for state in states}
        # `load_from_disk` fails on an empty split without a reason.
        opened = load_from_disk(str(path)) if all(files.values()) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be opened as a saved table, so a file is missing or damaged: {error}"
        ) from error
    for name in files:
        if not files[name]:
            raise ValueError(f'The split "{name}" of {path} is empty; every split needs at least one row.')
    if isinstance(opened, DatasetDict):
        others = [state.parent for state in path.glob("*/state.json") if state.parent.name not in opened]
        report_files(path, others, "that dataset_dict.json does not name")
    return opened


def _open_parquet(root, files, load_kwargs):
    """Group Parquet files by the split words in their names and in those of the folders below the root. Without such a
    word in any of them, all are training data."""
    _refuse(root, load_kwargs, ("name", "revision", "data_files", "data_dir"))
    splits = {}
    for file in files:
        found = split_in(*file.relative_to(root).with_suffix("").parts)
        if len(found) > 1:
            raise ValueError(f"{file} names several splits: {', '.join(sorted(found))}. Rename it or its folder.")
        splits.setdefault(next(iter(found), None), []).append(file)
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise ValueError(
            f"{root} has Parquet files with and without a split in their name: {unnamed[0].relative_to(root)} and "
            f"{next(iter(splits.values()))[0].relative_to(root)}. Name all of them like train-00000-of-00002.parquet."
        )
    return load_parquet(splits or {"train": unnamed}, load_kwargs)


def load_parquet(splits: Mapping[str, Sequence[Path]], load_kwargs: Mapping):
    """Open Parquet files, split → files, by `datasets.load_dataset`. Returns the one that the argument `split` names, or
    split → table.

    Raises:
        ValueError: a file is damaged, a split is empty or unknown, its files have different columns, or an argument is
            wrong.
    """
    load_kwargs = dict(load_kwargs)
    asked = load_kwargs.pop("split", None)
    if asked is not None:
        name = str(asked).partition("[")[0]
        if name not in splits:
            raise ValueError(f"split={str(asked)!r}, but the files hold the splits {', '.join(splits)}. Choose one.")
        return _load_split(name, splits[name], {"split": asked, **load_kwargs})
    return {name: _load_split(name, files, {"split": name, **load_kwargs}) for name, files in splits.items()}


def _load_split(name, files, load_kwargs):
    # `load_dataset` would read all files, those of other splits as well, with the features of the first.
    features, counts = zip(*map(_parquet_features, files))
    for file, found in zip(files, features):
        for column in features[0] | found:
            types = [table.get(column, "missing") for table in (features[0], found)]
            if types[0] != types[1]:
                raise ValueError(
                    f'The column "{column}" of the split "{name}" differs: {types[0]} in {files[0]}, {types[1]} in {file}. '
                    "Write both with the same types and classes."
                )
    if not sum(counts):
        raise ValueError(f'The split "{name}" in {files[0]} is empty; every split needs at least one row.')
    # The library reads each path as a pattern.
    patterns = {name: [glob.escape(str(file)) for file in files]}
    try:
        return load_dataset("parquet", data_files=patterns, **load_kwargs)
    except (DatasetGenerationError, TypeError) as error:
        raise ValueError(f'The split "{name}" in {files[0]} cannot be read: {error.__cause__ or error}') from error


def _parquet_features(file):
    """The column types and the number of rows of a Parquet file."""
    try:
        content = pq.read_metadata(file)
        return Features.from_arrow_schema(content.schema.to_arrow_schema()), content.num_rows
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{file} is not a whole Parquet file; download or write it again: {error}") from error


def public_name(source: str | os.PathLike) -> str:
    """What a card may show of a source: a name or Hub id as it is, of a path only its last part, because the rest
    describes a machine."""
    path, text = Path(source), str(source)
    if path.exists():
        return path.resolve().name
    # A path of Windows on another system, and the reverse.
    is_path = "\\" in text or text.startswith((".", "~", "/")) or len(path.parts) > 2
    return last_part(source) if is_path else text


def last_part(path: str | os.PathLike) -> str:
    """The name of a file or folder, of a path of any system."""
    return PureWindowsPath(path).name


def _load_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    rows = {"image": list(pixels), "label": digits.target}
    # The source has no test split. This one is the same for every seed, so that results can be compared.
    table = Dataset.from_dict(rows, features=features)
    return dict(zip(("train", "test"), map(table.select, stratified_rows(digits.target, 360, 0))))


def _load_idx(folder):
    splits, used = {}, []
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        files = {}
        for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            # Kaggle's copy of MNIST has a dot, and folders of the files' names.
            names = (f"{prefix}-{part}", f"{prefix}-{part}".replace("-idx", ".idx"))
            paths = [folder / path for name in names for path in (name, f"{name}.gz", f"{name}/{name}")]
            files[part] = next(filter(Path.is_file, paths), None)
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
                "(N, height, width) and N labels."
            )
        features = Features({"image": Image(), "label": Value("int64")})
        splits[split] = Dataset.from_dict({"image": list(pixels), "label": classes}, features=features)
        used += [path for file in files.values() for path in (file, file.parent)]
    report_files(folder, [path for path in sorted(folder.iterdir()) if path not in used], "beside the IDX files")
    return splits


def _read_idx(path):
    """The array of an IDX file: two zero bytes, the type (8 is uint8), the number of dimensions, each of them as a
    big-endian 32-bit number, and the values."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like a file of unsigned bytes")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file: {error}.") from error
