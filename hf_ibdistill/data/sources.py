"""Sources: where images come from, and what each format looks like on disk."""

import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk

from .folders import open_image_folder, report_files, split_of, walk
from .splits import stratified_split


logger = logging.getLogger(__name__)


def open_source(source: str | os.PathLike, load_kwargs: Mapping) -> dict[str, Dataset]:
    """Open a source by its format; see [`~data.loading.load_image_dataset`].

    Returns:
        Split → table, with the columns and the names of splits that the source has.

    Raises:
        FileNotFoundError: `source` looks like a path and nothing is there.
        ValueError: the files are of another format, damaged or empty.
    """
    opened = _open(source, load_kwargs)
    if isinstance(opened, dict):
        return opened
    # A single table names its split; part of one is "train[:10%]".
    return {str(opened.split or "train").partition("[")[0]: opened}


def _open(source, load_kwargs):
    if load_kwargs.get("streaming"):
        raise ValueError("streaming=True is not supported: splits and classes need the whole table. Open it without.")
    path = Path(source).expanduser()
    if str(source) == "digits":
        if path.exists():
            logger.warning(
                '"digits" opens the bundled digits, not the folder of that name; ./digits opens the folder.'
            )
        return _load_digits()
    if path.is_dir():
        return _open_folder(path, load_kwargs)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is not a Parquet file; give a folder, a .parquet file or a Hub id.")
        return load_parquet({split_of_file(path) or "train": [path]}, load_kwargs)
    if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"There is no folder or file {source}.")
    return load_dataset(str(source), **load_kwargs)


def _open_folder(path, load_kwargs):
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return open_saved(path)
    for manifest in (*path.glob("recording.json"), *path.glob("*/recording.json")):
        raise ValueError(
            f"{manifest.parent} holds a recording that is not finished. Record again; it continues there."
        )
    if any("-images-idx3-ubyte" in file.name for file in path.iterdir()):
        return _load_idx(path)
    files = [Path(file) for file in sorted(walk(path))]
    parquet = [file for file in files if file.suffix.lower() == ".parquet" and file.name != "metadata.parquet"]
    if parquet:
        report_files(path, sorted({*files} - {*parquet}), "beside the Parquet files")
        return load_parquet(_split_files(path, parquet), load_kwargs)
    if load_kwargs:
        raise ValueError(f"{path} is a folder of images, to which {', '.join(load_kwargs)} does not apply.")
    return open_image_folder(path)


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
    except (OSError, ValueError, LookupError, TypeError) as error:
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


def _split_files(root, files):
    """Split → its Parquet files, by the folder directly below the root, or by file names such as
    `train-00000-of-00002.parquet`. Without such names, all files are training data."""
    splits = {}
    for file in files:
        above = file.relative_to(root).parts[:-1]
        splits.setdefault((above and split_of(above[0])) or split_of_file(file), []).append(file)
    unnamed = splits.pop(None, [])
    if unnamed and splits:
        raise ValueError(
            f"{root} has Parquet files with and without a split in their name: {unnamed[0].name} and "
            f"{next(iter(splits.values()))[0].name}. Name all of them like train-00000-of-00002.parquet."
        )
    return splits or {"train": unnamed}


def split_of_file(path: Path) -> str | None:
    """The split in the name of a file such as `train.parquet` or `test-00000-of-00002.parquet`, or `None`."""
    return split_of(re.sub(r"([-_.]?\d+(-of-\d+)?)?$", "", path.stem))


def load_parquet(splits: Mapping[str, Sequence[Path]], load_kwargs: Mapping):
    """Open Parquet files, split → files, by `datasets.load_dataset`."""
    # The library reads each path as a pattern.
    files = {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}
    return load_dataset("parquet", data_files=files, **load_kwargs)


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
    train, test = stratified_split(Dataset.from_dict(rows, features=features), 360, 0, digits.target)
    return {"train": train, "test": test}


def _load_idx(folder):
    splits, used = {}, []
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
                "(N, height, width) and N labels."
            )
        features = Features({"image": Image(), "label": Value("int64")})
        splits[split] = Dataset.from_dict({"image": list(pixels), "label": classes}, features=features)
        used += files.values()
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
