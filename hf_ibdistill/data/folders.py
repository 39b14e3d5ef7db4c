"""Read a folder of images: which folders are splits, which are classes, and which files are images.

The rules, which docs/data.md explains:

1. A folder directly below the root is a *split* if its name is one of `SPLIT_NAMES`, in any case, and it holds folders.
2. Every other folder directly below the root, or below a split, is a *class*. Images at any depth below it belong to it.
3. Links are followed. Names that begin with a dot are skipped.
4. What is not read is reported with the number of files, or refused.
"""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image


logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout", "hold-out", "hold_out"), "test"),
}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files of the operating system, which nobody means as data.
_SKIPPED = {"thumbs.db", "desktop.ini", "__macosx"}


def split_of(name: str) -> str | None:
    """The split that a folder of this name holds, or `None`."""
    return SPLIT_NAMES.get(unicodedata.normalize("NFC", name).lower())


def open_image_folder(root: Path) -> dict[str, Dataset]:
    """Open a folder of class folders, or of images with a metadata file, with or without split folders above them.

    Args:
        root: the folder.

    Returns:
        Split → table with the columns `image` and `label`, or those of the metadata file. The classes of all splits have
        the same ids: names in alphabetical order, numbers in numerical order.

    Raises:
        ValueError: the tree fits no rule; the message describes what was found.
    """
    folders, files = _entries(root)
    splits = {path: split_of(path.name) for path in folders if split_of(path.name) and _is_split(path)}
    if not splits:
        if _metadata(root) is not None:
            return {"train": _open_metadata(root)}
        flat = [path.name for path in folders if split_of(path.name)]
        if flat and len(flat) == len(folders):
            raise ValueError(
                f"{root} has the split folders {', '.join(flat)}, but these hold no class folders. Put each image into "
                "a folder with the name of its class, for example train/cat/1.jpg."
            )
        return _open_classes({"train": (root, folders)}, files, root)
    names = list(splits.values())
    twice = [path.name for path, split in splits.items() if names.count(split) > 1]
    if twice:
        raise ValueError(f"{root} has several folders for one split: {', '.join(twice)}. Join or rename them.")
    for path in folders:
        if path not in splits:
            count = sum(1 for _ in walk(path))
            is_split = split_of(path.name) is not None
            if is_split and split_of(path.name) == "train":
                raise ValueError(f"{path} holds {count} files, but no class folders.")
            reason = "it holds no class folders" if is_split else "its name is not that of a split"
            logger.warning(
                '%s: the folder "%s" with %d files is left out, because %s.', root, path.name, count, reason
            )
    if any(_metadata(path) is not None for path in splits):
        report_files(root, files)
        return {split: _open_metadata(path) for path, split in splits.items()}
    return _open_classes({split: (path, None) for path, split in splits.items()}, files, root)


def _is_split(path):
    return bool(_entries(path)[0]) or _metadata(path) is not None


def _open_classes(splits, root_files, root):
    paths = {}
    report_files(root, root_files)
    for split, (folder, class_folders) in splits.items():
        if class_folders is None:
            class_folders, loose = _entries(folder)
            report_files(folder, loose)
        paths[split] = _read_classes(class_folders)
    names = sort_classes({name for classes in paths.values() for name in classes})
    if not names:
        raise ValueError(f"{root} holds no class folders: {_describe(root)}. {_ADVICE}")
    if len(names) == 1:
        raise ValueError(
            f'{root} has one class folder only, "{names[0]}"; a classifier needs two. If the class folders are inside it, '
            f"give {Path(root) / names[0]}. {_ADVICE}"
        )
    ids = {name: i for i, name in enumerate(names)}
    tables = {}
    for split, classes in paths.items():
        rows = [(path, ids[name]) for name in sorted(classes) for path in classes[name]]
        if not rows:
            raise ValueError(f'The split "{split}" of {root} is empty; every split needs at least one row.')
        labels = pa.array([label for _, label in rows], pa.int64())
        table = pa.table({"image": _image_array([path for path, _ in rows]), "label": labels})
        tables[split] = _to_dataset(table, label=ClassLabel(names=names))
    return tables


_ADVICE = (
    "Images belong into folders with the names of their classes: cat/1.jpg, dog/2.jpg, with or without train/ above."
)


def _read_classes(folders) -> dict[str, list[str]]:
    """Class → its image files, sorted."""
    classes: dict[str, list[str]] = {}
    for folder in folders:
        images, others = [], Counter()
        for path in walk(folder):
            if _is_image(path):
                images.append(path)
            else:
                others[os.path.splitext(path)[1].lower() or "no extension"] += 1
        left_out = ", ".join(f"{count} with {kind}" for kind, count in others.most_common())
        if not images:
            content = f"its files are no images that Pillow opens ({left_out})" if others else "it is empty"
            raise ValueError(
                f"The class folder {folder} has no image: {content}. Remove or convert them. For .heic, install and "
                "register pillow-heif."
            )
        if others:
            logger.warning("%s: %d files that are no images are left out (%s).", folder, others.total(), left_out)
        # The same name, composed on one system and decomposed on another, is one class.
        classes.setdefault(unicodedata.normalize("NFC", folder.name), []).extend(sorted(images))
    return classes


def sort_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in alphabetical order; names that are numbers in numerical order."""
    names = sorted(names)
    is_numbered = all(name.isdecimal() and name.isascii() for name in names)
    return sorted(names, key=int) if is_numbered else names


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files directly inside, sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_hidden(entry.name):
                (folders if entry.is_dir() else files).append(Path(entry.path))
    return sorted(folders), sorted(files)


def walk(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every file at any depth, through links, without hidden ones.

    Raises:
        ValueError: a link points to a folder above it, or nowhere.
    """
    # Only a link can lead back up; resolving each folder would cost more than reading it.
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to a folder above it; remove it.")
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from walk(entry.path, (*above, real))
            elif entry.is_file():
                yield entry.path
            elif entry.is_symlink():
                raise ValueError(f"{entry.path} is a link that points nowhere; remove or repair it.")


def _is_hidden(name):
    return name.startswith(".") or name.lower() in _SKIPPED


_IMAGE_EXTENSIONS: set[str] = set()
# Types that are never images, so that they need not be opened to find out.
_OTHER_EXTENSIONS = {
    ".txt",
    ".json",
    ".xml",
    ".csv",
    ".md",
    ".npy",
    ".zip",
    ".tar",
    ".gz",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
}


def _is_image(path: str) -> bool:
    """Whether Pillow opens the file: by its extension, or of an unknown one by its content."""
    if not _IMAGE_EXTENSIONS:
        known = PIL.Image.registered_extensions()
        _IMAGE_EXTENSIONS.update(name for name, kind in known.items() if kind in PIL.Image.OPEN)
        _IMAGE_EXTENSIONS.difference_update(_OTHER_EXTENSIONS)
    extension = os.path.splitext(path)[1].lower()
    if extension in _IMAGE_EXTENSIONS:
        return True
    if extension in _OTHER_EXTENSIONS:
        return False
    try:
        with PIL.Image.open(path):
            return True
    except PIL.Image.DecompressionBombError:
        return True  # decoding refuses it with its row
    except OSError:
        return False


def report_files(folder: Path, files: Sequence[Path], where: str = "beside the folders") -> None:
    """Report files that are not read."""
    files = [path for path in files if not _is_hidden(path.name)]
    if files:
        first = ", ".join(path.name for path in files[:3]) + (", …" if len(files) > 3 else "")
        logger.warning("%s: %d files %s are left out (%s).", folder, len(files), where, first)


def _describe(folder) -> str:
    """What a folder holds, in a few words."""
    folders, files = _entries(folder)
    kinds = Counter(path.suffix.lower() or "no extension" for path in files)
    parts = [f"{count} files with {kind}" for kind, count in kinds.most_common(5)]
    if folders:
        parts.append(f"{len(folders)} folders ({', '.join(path.name for path in folders[:5])})")
    if {".zip", ".tar", ".gz"} & kinds.keys():
        parts.append("unpack the archive first")
    return ", ".join(parts) or "nothing"


def _metadata(folder: Path) -> Path | None:
    found = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has several metadata files: {', '.join(path.name for path in found)}. Keep one.")
    return found[0] if found else None


def _open_metadata(folder: Path) -> Dataset:
    """The table of a metadata file, whose column `file_name` names the images beside it."""
    path = _metadata(folder)
    if path is None:
        raise ValueError(f"{folder} has no metadata file ({', '.join(_METADATA)}), but another split has one.")
    read = {".csv": pyarrow.csv.read_csv, ".jsonl": pyarrow.json.read_json, ".parquet": pq.read_table}[path.suffix]
    try:
        rows = read(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(rows) == 0 or "file_name" not in rows.column_names:
        raise ValueError(f'{path} needs a row for each image and a column "file_name".')
    if "image" in rows.column_names:
        raise ValueError(f'{path} has a column "image", which the images themselves need. Rename it.')
    paths = [str(folder / str(name)) for name in rows["file_name"].to_pylist()]
    missing = [image for image in paths if not os.path.isfile(image)]
    if missing:
        raise ValueError(f"{path} names {len(missing)} files that do not exist, for example {missing[0]}.")
    named = {os.path.realpath(image) for image in (*paths, path)}
    others = sum(os.path.realpath(image) not in named for image in walk(folder))
    if others:
        logger.warning("%s: %d files that %s does not name are left out.", folder, others, path.name)
    return _to_dataset(rows.drop_columns("file_name").add_column(0, "image", _image_array(paths)))


def _image_array(paths: list[str]) -> pa.Array:
    return Image().cast_storage(pa.array(paths, pa.string()))


def _to_dataset(table: pa.Table, **features) -> Dataset:
    schema = Features.from_arrow_schema(table.drop_columns(["image", *features]).schema)
    features = Features({"image": Image(), **schema, **features})
    return Dataset(table.cast(features.arrow_schema), info=DatasetInfo(features=features))
