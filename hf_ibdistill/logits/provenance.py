"""Provenance: the record of what produced the logits columns, the checksums of their files, and the checks against both.

The record is JSON in `info.description` of the table, after the description of the images if they have one. Selecting,
shuffling, saving and loading preserve it, and `concatenate_datasets` joins the records.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from ..data.classes import check_class_names
from ..data.columns import IMAGE, in_arrow, require_table
from ..data.splits import spread
from ..files import CHECKSUMS, PART, in_threads, read_json, sha256
from ..images.decoding import decode_image, file_key
from ..images.views import ViewRecipe, row_key
from .encoding import (
    FILE_KEY,
    ROW_KEY,
    check_keys,
    column_name,
    describe_column,
    largest_class,
    missing_rows,
    recorded_teachers,
    unusable_rows,
)


_FORMAT = "hf_ibdistill/1"
_LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "hf_ibdistill")


def build_record(teachers: Sequence[dict], dataset: dict, views: ViewRecipe | None) -> dict:
    """The whole record: described teachers, dataset, view recipe and library versions."""
    return {
        "format": _FORMAT,
        "teachers": list(teachers),
        "dataset": dataset,
        "views": None if views is None else views.to_dict(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def attach_record(dataset: Dataset, record: dict) -> None:
    """Write the record into the table, in place, after the description that it has. It replaces other records, and stays
    with every table made from this one."""
    texts = [part for part in _split_description(dataset) if isinstance(part, str)]
    dataset.info.description = "\n\n".join([*texts, json.dumps(record, sort_keys=True)])


def read_records(dataset: Dataset) -> list[dict]:
    """The records of the table: an empty list if it has none, several if it joins different recordings.

    Raises:
        ValueError: a record is damaged.
    """
    records = []
    for part in _split_description(dataset):
        if isinstance(part, dict) and part not in records:
            records.append(check_record(part, "dataset.info.description"))
    return records


def described_teachers(dataset: Dataset) -> list[dict]:
    """The teachers in all records of the table, as [`Teacher.describe`] describes them."""
    return [teacher for record in read_records(dataset) for teacher in record["teachers"]]


def check_record(record: object, where: str) -> dict:
    """Refuse what is not a whole record.

    Args:
        record: what was read.
        where: the file or attribute, for the message.

    Raises:
        ValueError: a part is missing, or is of another type.
    """
    try:
        is_whole = record["format"] == _FORMAT and isinstance(record["dataset"], dict)
        is_whole &= all({"name", "label_names", "encoding", "weights_sha256"} <= {*t} for t in record["teachers"])
        if record["views"] is not None:
            ViewRecipe(**record["views"])
    except (LookupError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"{where}: the provenance record is damaged or not whole. Restore it from a copy, or record again."
        )
    return record


def only_record(dataset: Dataset) -> dict:
    """The provenance record of a table of one recording.

    Raises:
        ValueError: the table has no record, or several.
    """
    records = read_records(dataset)
    if len(records) != 1:
        columns = ", ".join(map(column_name, recorded_teachers(dataset))) or "none"
        raise ValueError(
            f"The table has {len(records)} provenance records for its logits columns ({columns}); it needs exactly one. "
            "Use a table that one recording made, or remove these columns and record again."
        )
    return records[0]


def _split_description(dataset) -> Iterator[str | dict]:
    """The records in the description, and the texts around them."""
    require_table(dataset, "dataset", streams=True)
    text, start, position = dataset.info.description or "", 0, 0
    decoder = json.JSONDecoder()
    while _FORMAT in text and (position := text.find("{", position)) >= 0:
        try:
            found, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            end = position + 1
        else:
            if found.get("format") == _FORMAT:
                yield from filter(None, [text[start:position].strip()])
                yield found
                start = end
        position = end
    yield from filter(None, [text[start:].strip()])


# Parts of 16 MiB that a quick check reads.
_QUICK_PARTS = 16


def damaged_files(dataset: Dataset, *, quickly: bool = False) -> list[Path]:
    """The files of a recorded table whose content is not what recording wrote.

    Args:
        dataset: a table, as recording made it or selected from one. Files without checksums pass.
        quickly: compare sizes and at most 256 MiB of the content, chosen at random.
    """
    damaged, parts = [], []
    files = sorted({Path(file["filename"]) for file in getattr(dataset, "cache_files", [])})
    for folder, paths in groupby(files, lambda path: path.parent):
        try:
            expected = read_json(folder / CHECKSUMS)
        except FileNotFoundError:
            continue
        except ValueError:
            damaged.append(folder / CHECKSUMS)
            continue
        for path in [path for path in paths if path.name in expected]:
            sums, size = expected[path.name], path.stat().st_size if path.exists() else -1
            if isinstance(sums, str) and size >= 0:
                # Of version 0.1.0: one checksum of the whole file.
                if not quickly or size <= _QUICK_PARTS * PART:
                    parts.append((path, None, sums))
            elif not isinstance(sums, dict) or size != sums.get("size") or len(sums["sha256"]) != -(-size // PART):
                damaged.append(path)
            else:
                parts += [(path, part, checksum) for part, checksum in enumerate(sums["sha256"])]
    if quickly and len(parts) > _QUICK_PARTS:
        # Others in every run. The generator of its own leaves the random numbers of the run as they are.
        parts = random.Random().sample(parts, _QUICK_PARTS)
    found = in_threads(lambda each: sha256(each[0], each[1]), parts)
    damaged += [path for (path, _, checksum), one in zip(parts, found) if one != checksum]
    return list(dict.fromkeys(damaged))


def check_files(dataset: Dataset, *, quickly: bool = False) -> None:
    """Refuse a table whose files are damaged; arguments are those of [`damaged_files`].

    Raises:
        ValueError: the content of a file is not what recording wrote.
    """
    damaged = damaged_files(dataset, quickly=quickly)
    if damaged:
        raise ValueError(
            f"{len(damaged)} files of the table are damaged: {', '.join(map(str, damaged[:3]))}. Restore them from a copy, or "
            "delete the folder and record again."
        )


def check_complete(dataset: Dataset) -> None:
    """Refuse a recorded table with rows that have no logits or no key of their image.

    Raises:
        ValueError: there are such rows, as after joining with an unrecorded table, or a key has another type.
    """
    check_keys(dataset)
    columns = [column_name(name) for name in recorded_teachers(dataset)]
    for column in [*columns, *{ROW_KEY}.intersection(dataset.column_names)]:
        missing = _rows_of_column(dataset, column, missing_rows)
        if missing:
            raise ValueError(
                f'The column "{column}" has no values in {len(missing)} rows (first {missing[:10]}). Record these rows, or '
                "remove them."
            )


def _rows_of_column(dataset, column, find: Callable[[pa.Array], np.ndarray]) -> list[int]:
    """The rows that `find` returns for each part of a column, counted from the first row of the table."""
    rows, start = [], 0
    for batch in in_arrow(dataset, [column]).iter(batch_size=1024):
        values = batch[column].combine_chunks()
        rows += (start + find(values)).tolist()
        start += len(values)
    return rows


# For the rows whose numbers are checked before training.
_SECONDS = 2.0
_BLOCKS, _BLOCK_ROWS, _BLOCK_VALUES = 64, 256, 1 << 22
# Rows that are decoded to find changed images.
_SAMPLE = 16


def check_images(
    dataset: Dataset, rows: Sequence[int] | None = None, keys: Mapping[str, Sequence[int | None]] | None = None
) -> None:
    """Refuse images of which neither the file nor the pixels have the recorded key. Only images of another file are
    decoded, and at most 16 of the rows without the key of a file.

    Args:
        dataset: the table with the images.
        rows: the rows to compare; `None` is 16 of them.
        keys: `row_key` and `file_key` of these rows; `None` takes them from the table.

    Raises:
        ValueError: images differ; the message has their number and the first rows.
    """
    rows = spread(range(len(dataset)), _SAMPLE) if rows is None else rows
    check_keys(dataset)
    if keys is None:
        names = [name for name in (ROW_KEY, FILE_KEY) if name in dataset.column_names]
        keys = in_arrow(dataset, names)[list(rows)].to_pydict() if names else {}
    recorded = list(zip(rows, *(keys.get(name, [None] * len(rows)) for name in (ROW_KEY, FILE_KEY)), strict=True))
    compared = [row for row in recorded if row[2] is not None]
    compared += spread([row for row in recorded if row[2] is None and row[1] is not None], _SAMPLE)
    if not compared or IMAGE not in dataset.column_names:
        return
    encoded = in_arrow(dataset, [IMAGE])
    mode, changed = dataset.features[IMAGE].mode, []
    for start in range(0, len(compared), 64):
        group = compared[start : start + 64]
        images = encoded[[row for row, _, _ in group]][IMAGE]
        for image, (row, *of_row) in zip(images, group):
            # Whoever reads a row reports an image that cannot be read.
            with suppress(ValueError, OSError):
                if not is_recorded(image.as_py(), mode, *of_row):
                    changed.append(row)
    if changed:
        raise ValueError(
            f"The images of {len(changed)} rows (first {sorted(changed)[:10]}) are not the ones that were recorded. Restore "
            "them, or record the changed images into another folder."
        )


def is_recorded(cell: object, mode: str | None, of_pixels: int | None, of_file: int | None) -> bool:
    """Whether the file or the pixels of an image have the recorded key; `ValueError` or `OSError` if it cannot be read."""
    return file_key(cell) == of_file or row_key(decode_image(cell, mode)) == of_pixels


def stored_views(dataset: Dataset) -> ViewRecipe | None:
    """The recipe of the views whose logits the table holds; `None` if the logits belong to the images as they are.

    Raises:
        ValueError: parts of the table hold different views, or the columns do not have the views of the record.
    """
    recipes = [record["views"] for record in read_records(dataset)]
    if any(recipe != recipes[0] for recipe in recipes):
        raise ValueError(f"The table joins recordings of different views: {recipes}. Train on one of them.")
    recipe = ViewRecipe(**recipes[0]) if recipes and recipes[0] is not None else None
    for name in recorded_teachers(dataset):
        num_views = describe_column(dataset.features[column_name(name)])[1]
        expected = None if recipe is None else recipe.num_views
        if num_views != expected:
            raise ValueError(
                f'The column "{column_name(name)}" holds {num_views or "no"} views a row; the provenance has '
                f"{expected or 'none'}. If to_iterable_dataset lost them, call attach_record after it."
            )
    return recipe


def record_differences(expected: dict, found: dict) -> list[str]:
    """What differs between two records, or two manifests of a recording, one line for each difference. Library versions
    may differ."""
    names, found_names = ([teacher["name"] for teacher in record["teachers"]] for record in (expected, found))
    pairs = [("teachers:", names, found_names)]
    for teacher, other in zip(expected["teachers"], found["teachers"]):
        title = f'teacher "{teacher["name"]}"'
        pairs += [(f"{title}: {key}", teacher.get(key), other.get(key)) for key in teacher_differences(teacher, other)]
    for part in ("dataset", "views", "layout"):
        ours, theirs = (dict(record.get(part) or {}) for record in (expected, found))
        pairs += [(f"{part}: {key}", ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs})]
    return [f"{name} {other} instead of {one}" for name, one, other in pairs if one != other]


def teacher_differences(teacher: dict, other: dict) -> list[str]:
    """The parts of two described teachers that differ and change the columns."""
    # Older records have no "bf16"; their teachers ran in float32.
    parts = {"weights_sha256": None, "image_processor": None, "label_names": None, "encoding": None, "bf16": False}
    parts["classes"] = None  # unless they were matched by hand
    return [key for key, default in parts.items() if teacher.get(key, default) != other.get(key, default)]


def check_columns(dataset: Dataset, teacher_names: Sequence[str], label_names: Sequence[str]) -> None:
    """Check before training that the table holds the logits of these teachers over these classes. Numbers are checked in
    16,384 rows chosen at random, or as many as two seconds allow; all others, and those of a stream, when they are read.

    Raises:
        ValueError: a column is missing, has another number of classes, or numbers that are not finite; its teacher has
            other classes; it joins different teachers; its views do not fit the provenance of the table; or images differ
            from the recorded ones ([`check_images`]).
    """
    recorded = [column_name(name) for name in recorded_teachers(dataset)]
    for name in teacher_names:
        column = column_name(name)
        if column not in dataset.column_names:
            raise ValueError(
                f'The student has the teacher "{name}", but the table has no column "{column}" (logits columns: '
                f"{', '.join(recorded) or 'none'}). Record it with record_teacher_logits, or pass teachers={{...}} to run it "
                "in training."
            )
        _check_column(dataset, column, len(label_names))
    stored_views(dataset)
    for teacher in described_teachers(dataset):
        if teacher["name"] in teacher_names:
            check_class_names(teacher["label_names"], label_names, f'the teacher "{teacher["name"]}"')
    check_same_teachers(dataset)
    if not isinstance(dataset, IterableDataset):
        check_images(dataset)


def check_same_teachers(dataset: Dataset | IterableDataset) -> None:
    """Refuse a table that joins the logits of different teachers in one column.

    Raises:
        ValueError: two of its records describe different teachers by one name.
    """
    found = {}
    for teacher in described_teachers(dataset):
        name = teacher["name"]
        differing = teacher_differences(found.setdefault(name, teacher), teacher)
        if differing and column_name(name) in dataset.column_names:
            raise ValueError(
                f'The table joins recordings of different teachers named "{name}" ({", ".join(differing)} differ). Use one of '
                "them, or rename a column before joining."
            )


def _check_column(dataset, column, num_classes):
    needed = f"logits of the student's {num_classes} classes are needed"
    try:
        encoding, num_views, column_classes = describe_column(dataset.features[column])
    except ValueError as error:
        raise ValueError(f'The column "{column}" holds {error}; {needed}.') from error
    if encoding.top_k is None and column_classes != num_classes:
        raise ValueError(f'The column "{column}" holds logits of {column_classes} classes; {needed}.')
    if isinstance(dataset, IterableDataset):
        return

    # The generator of its own leaves the random numbers of the run as they are.
    size = max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // (num_classes * (num_views or 1))))
    starts, rows_of_block = range(0, len(dataset), size), in_arrow(dataset, [column])
    starts = random.Random().sample(starts, min(len(starts), _BLOCKS))
    end, bad, checked = time.monotonic() + _SECONDS, [], 0
    for start in starts:
        values = rows_of_block[start : start + size][column].combine_chunks()
        if encoding.top_k is not None and len(values):
            try:
                largest = largest_class(values, num_classes)
            except ValueError as error:
                raise ValueError(f'The column "{column}": {error} {needed}.') from error
            if largest >= num_classes and not len(missing_rows(values)):
                raise ValueError(f'The column "{column}" names class {largest}; {needed}.')
        bad += (start + unusable_rows(values, num_classes)).tolist()
        checked += len(values)
        if time.monotonic() > end:
            break
    if bad:
        sample = "" if checked == len(dataset) else f" of a sample of {checked}"
        raise ValueError(
            f'The column "{column}" has missing, NaN or infinite logits in {len(bad)} rows{sample} (first '
            f"{sorted(bad)[:10]}). Record them again, or remove these rows."
        )
