"""Read a folder of images: which folders are splits, which are classes, and which files are images.

The rules, which docs/data.md explains:

1. A folder directly below the root is a *split* if its name is one of `SPLIT_NAMES`, in any case, and it holds folders.
2. Every other folder directly below the root, or below a split, is a *class*. Images at any depth below it belong to it.
3. Links are followed. Names that begin with a dot are skipped.
4. What is not read is reported with the number of files, or refused.
"""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
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
# Of folders and splits; no class has such a name.
UNLABELLED_NAMES = ("unlabelled", "unlabeled", "unsupervised")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files of the operating system, which nobody means as data.
_SKIPPED = {"thumbs.db", "desktop.ini", "__macosx"}


def split_of(name: str) -> str | None:
    """The split that a folder of this name holds, or `None`."""
    return SPLIT_NAMES.get(unicodedata.normalize("NFC", name).lower())


def split_in(*names: str) -> set[str]:
    """The splits whose names are words of these names, such as `mnist_test`, `test-00000-of-00002` or `testImages`."""
    found = set()
    for name in names:
        words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
        for word in (*words, *map("".join, zip(words, words[1:]))):
            found.add(split_of(word) or split_of(re.sub("(data|set|images)$", "", word.lower())))
    return found - {None}


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
            return _divide_by_folder(_open_metadata({"train": root})["train"], root)
        flat = [path.name for path in folders if split_of(path.name)]
        if flat and len(flat) == len(folders):
            raise ValueError(
                f"{root} has the split folders {', '.join(flat)}, but these hold no class folders. Put each image into "
                "a folder with the name of its class, for example train/cat/1.jpg."
            )
        named = [path.name for path in folders if split_in(path.name) and _is_split(path)]
        if len(named) == len(folders) and len(split_in(*named)) > 1:
            raise ValueError(
                f"{root} has the folders {', '.join(named)}, which look like splits and hold folders. Rename them train and "
                "test, directly above the class folders."
            )
        if folders and all(
            len({split_of(path.name) for path in _entries(folder)[0]} - {None}) > 1 for folder in folders
        ):
            raise ValueError(
                f"{root} has split folders inside its class folders, for example in {folders[0].name}. Put the split above "
                "the class, for example train/cat/1.jpg."
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
        return _open_metadata({split: path for path, split in splits.items()})
    return _open_classes({split: (path, None) for path, split in splits.items()}, files, root)


def open_images(root: Path) -> Dataset:
    """All images below a folder, at any depth, in the column `image`.

    Raises:
        ValueError: there is no image, or the folder has a validation or test split.
    """
    evaluated = [path.name for path in _entries(root)[0] if split_of(path.name) not in (None, "train")]
    if evaluated:
        raise ValueError(
            f"{root} has the split folders {', '.join(evaluated)}, which may hold images to measure on. Give the folder of "
            "the images to learn from."
        )
    images, others = find_images(root)
    if not images:
        raise ValueError(f"{root} holds no image that Pillow opens: {_describe(root)}.")
    if others:
        logger.warning("%s: %d files that are no images are left out (%s).", root, others.total(), _count(others))
    return _to_dataset(pa.table({"image": _image_array(images)}))


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
    for name in names:
        if name.lower() in UNLABELLED_NAMES:
            raise ValueError(
                f'{root} has a class folder "{name}". Move it out of the classes, and give it as unlabelled={name}.'
            )
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
        images, others = find_images(folder)
        if not images:
            content = f"its files are no images that Pillow opens ({_count(others)})" if others else "it is empty"
            raise ValueError(
                f"The class folder {folder} has no image: {content}. Remove or convert them. For .heic, install and "
                "register pillow-heif."
            )
        if others:
            logger.warning(
                "%s: %d files that are no images are left out (%s).", folder, others.total(), _count(others)
            )
        # The same name, composed on one system and decomposed on another, is one class.
        classes.setdefault(unicodedata.normalize("NFC", folder.name), []).extend(images)
    return classes


def find_images(folder) -> tuple[list[str], Counter]:
    """The image files below a folder, sorted, and the number of other files by their extension."""
    images, others = [], Counter()
    for path in walk(folder):
        if _is_image(path):
            images.append(path)
        else:
            others[os.path.splitext(path)[1].lower() or "no extension"] += 1
    return sorted(images), others


def _count(kinds: Counter) -> str:
    return ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common())


def sort_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in alphabetical order; names that are numbers in numerical order."""
    names = sorted(names)
    is_numbered = all(name.isdecimal() and name.isascii() for name in names)
    return sorted(names, key=int) if is_numbered else names


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files directly inside, sorted, without hidden ones."""
    folders, files = [], []
    for entry, is_folder in _scan(folder):
        (folders if is_folder else files).append(Path(entry.path))
    return sorted(folders), sorted(files)


def _scan(folder):
    """Every entry directly inside that is not hidden, and whether it is a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_hidden(entry.name):
                check_name(entry.path)
                try:
                    yield entry, entry.is_dir()
                except OSError as error:
                    raise ValueError(f"{entry.path} cannot be read; remove or repair it: {error.strerror}.") from error


def check_name(path: str) -> None:
    """Refuse a path that no table can store.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The name {ascii(path)} is not UTF-8. Rename it.") from error


def walk(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every file at any depth, through links, without hidden ones.

    Raises:
        ValueError: a link points to a folder above it, to itself or nowhere, or a name is not UTF-8.
    """
    # Only a link can lead back up; resolving each folder would cost more than reading it.
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to a folder above it; remove it.")
    for entry, is_folder in _scan(folder):
        if is_folder:
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


def _open_metadata(folders: dict[str, Path]) -> dict[str, Dataset]:
    """Split → the table of the metadata file in its folder, whose column `file_name` names the images beside it."""
    tables = {split: _read_metadata(folder) for split, folder in folders.items()}
    texts = {split: table for split, (path, table) in tables.items() if path.suffix == ".csv"}
    typed = {**{split: table for split, (_, table) in tables.items()}, **_find_numbers(texts)}
    return {split: _open_rows(folders[split], tables[split][0], table) for split, table in typed.items()}


def _read_metadata(folder):
    """The metadata file and its table. In CSV, all columns are text, because a guess may differ between splits."""
    path = _metadata(folder)
    if path is None:
        raise ValueError(f"{folder} has no metadata file ({', '.join(_METADATA)}), but another split has one.")
    try:
        if path.suffix == ".csv":
            names = pyarrow.csv.open_csv(path).schema.names
            types = dict.fromkeys(names, pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
            rows = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            rows = {".jsonl": pyarrow.json.read_json, ".parquet": pq.read_table}[path.suffix](path)
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = rows.column_names
    if len({name.strip() for name in names} & {*names}) != len(names) or "file_name" not in names:
        raise ValueError(
            f'{path} has the columns {names}. It needs "file_name", commas between columns, and each name once, without '
            "spaces around it."
        )
    if len(rows) == 0 or rows["file_name"].null_count:
        raise ValueError(f'{path} needs a row for each image, and a "file_name" in each row.')
    if "image" in names:
        raise ValueError(f'{path} has a column "image", which the images themselves need. Rename it.')
    return path, rows


# "01" is none, because it and "1" may be two classes; a float has 15 exact digits.
_NUMBERS = {
    r"^(0|-?[1-9]\d{0,17})$": pa.int64(),
    r"^-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d+)?$": pa.float64(),
}


def _find_numbers(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables of text with numbers in the columns that hold only numbers in every table."""
    missing = pa.array(pyarrow.csv.ConvertOptions().null_values)
    for name in {name for table in tables.values() for name in table.column_names} - {"file_name"}:
        columns = {split: table[name] for split, table in tables.items() if name in table.column_names}
        text = pa.chunked_array([chunk for column in columns.values() for chunk in column.chunks], pa.string())
        text = text.filter(pc.invert(pc.is_in(text, missing)))
        kinds = (kind for form, kind in _NUMBERS.items() if pc.all(pc.match_substring_regex(text, form)).as_py())
        if kind := next(kinds, None):
            for split, column in columns.items():
                numbers = pc.if_else(pc.is_in(column, missing), None, column).cast(kind)
                place = tables[split].column_names.index(name)
                tables[split] = tables[split].set_column(place, name, numbers)
    return tables


def _open_rows(folder, path, rows):
    paths = [str(folder / str(name)) for name in rows["file_name"].to_pylist()]
    missing = [image for image in paths if not os.path.isfile(image)]
    if missing:
        raise ValueError(f"{path} names {len(missing)} files that do not exist, for example {missing[0]}.")
    named = {os.path.realpath(image) for image in (*paths, path)}
    others = sum(os.path.realpath(image) not in named for image in walk(folder))
    if others:
        logger.warning("%s: %d files that %s does not name are left out.", folder, others, path.name)
    return _to_dataset(rows.drop_columns("file_name").add_column(0, "image", _image_array(paths)))


def _divide_by_folder(rows, root):
    """Split → rows of a metadata file, by the split words in the folders of the image files."""
    paths = pc.struct_field(rows.data["image"], "path").to_pylist()
    return divide_rows(rows, [split_in(*Path(os.path.relpath(path, root)).parts[:-1]) for path in paths], root)


def divide_rows(rows: Dataset, found: Sequence[set[str]], source: object) -> dict[str, Dataset]:
    """Split → rows, by the splits that are found for each row. Without any, all rows are training data.

    Raises:
        ValueError: a row has several splits, or has none and another row has one.
    """
    places: dict = {}
    for row, splits in enumerate(found):
        places.setdefault(tuple(sorted(splits)), []).append(row)
    if len(places) == 1 and () in places:
        return {"train": rows}
    wrong = [splits for splits in places if len(splits) != 1]
    if wrong:
        raise ValueError(
            f"{source}: row {places[wrong[0]][0]} belongs to {' and '.join(wrong[0]) or 'no split'}, others to "
            f"{', '.join(sorted({name for splits in places for name in splits}))}. Give each row one split."
        )
    return {splits[0]: rows.select(numbers) if len(places) > 1 else rows for splits, numbers in places.items()}


def _image_array(paths: list[str]) -> pa.Array:
    return Image().cast_storage(pa.array(paths, pa.string()))


def _to_dataset(table: pa.Table, **features) -> Dataset:
    schema = Features.from_arrow_schema(table.drop_columns(["image", *features]).schema)
    features = Features({"image": Image(), **schema, **features})
    return Dataset(table.cast(features.arrow_schema), info=DatasetInfo(features=features))
