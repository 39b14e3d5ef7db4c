"""The folder of a recording: begin or continue it, write and check its shards, and make them one table.

A shard is a run of consecutive rows, and a data file of the finished table. It is written under a temporary name and renamed
when it is complete, so an interrupted recording keeps every finished shard and continues with the next.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, NamedSplit
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout

from ..data.sources import open_saved
from ..files import (
    CHECKSUMS,
    checksums,
    explain_full_disk,
    flush,
    in_threads,
    read_json,
    sha256,
    write_text,
    write_whole,
)
from ..logits.encoding import FILE_KEY, ROW_KEY
from ..logits.provenance import attach_record, check_record, read_records, record_differences


logger = logging.getLogger(__name__)

_MANIFEST = "recording.json"
_LOCK, _HOLDER = "recording.lock", "recording.holder"
_FULL_DISK = "Finished shards are kept. Free space and call again."


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from recording into the folder. The operating system releases the lock of a process that dies.

    Raises:
        ValueError: another process is recording into the folder, or a folder has the name of a file of the recording.
    """
    for path in (folder / _LOCK, folder / _HOLDER, folder / _MANIFEST, *folder.glob("data-*.arrow*")):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, but recording needs a file of this name. Move it away.")
    if (folder / "state.json").exists() or _holds_something_else(folder):
        yield  # Nothing is going to be written.
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is being recorded by {_read_holder(holder) or 'another process'}. Wait until it has finished, or stop "
            f"it and call again. If it is gone, as may happen on a network disk, delete {folder / _LOCK}."
        ) from None
    try:
        other = _read_holder(holder)
        if other is not None:
            logger.warning("%s: %s stopped before it had finished. Its recording is continued.", folder, other)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        write_text(holder, f"process {os.getpid()} on {platform.node()} since {since}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        # The file of the lock stays until the recording is finished, so that all processes lock the same file.
        lock.release()


def _read_holder(holder) -> str | None:
    # A power failure may have damaged it.
    return holder.read_text(encoding="utf-8", errors="replace") if holder.exists() else None


def _holds_something_else(folder):
    """Whether there are files, but no recording. One that is killed before its manifest exists leaves parts of it."""
    entries = folder.iterdir() if folder.exists() and not (folder / _MANIFEST).exists() else []
    return any(entry.name not in (_LOCK, _HOLDER) and entry.suffix != ".partial" for entry in entries)


def open_folder(folder: Path, record: dict, layout: dict) -> bool:
    """Begin or continue a recording in the folder.

    Args:
        folder: the folder of the table.
        record: the provenance of what is to be recorded.
        layout: the settings that decide which rows share a batch and a shard.

    Returns:
        Whether the recording is finished already.

    Raises:
        ValueError: the folder holds another table, another recording, a damaged one or other files.
    """
    manifest = folder / _MANIFEST
    is_finished = (folder / "state.json").exists()
    if is_finished:
        records = read_records(open_saved(folder))
        if len(records) != 1:
            raise ValueError(f"{folder} holds another table. Choose an empty folder.")
        differences = record_differences(record, records[0])
    elif manifest.exists():
        found = read_json(manifest)
        old = check_record(found.get("record"), str(manifest))
        differences = record_differences({**record, "layout": layout}, {**old, "layout": found.get("layout")})
    elif _holds_something_else(folder):
        raise ValueError(f"{folder} is not empty and holds no recording. Choose an empty folder.")
    else:
        write_text(manifest, json.dumps({"record": record, "layout": layout}, indent=2))
        return False
    if differences:
        raise ValueError(
            f"{folder} holds {'a finished' if is_finished else 'an interrupted'} recording that differs: "
            f"{'; '.join(differences)}. Use the settings that it began with, choose another folder, or delete this one."
        )
    if is_finished:
        _remove_scaffolding(folder)
    return is_finished


def check_folder_of_splits(folder: Path) -> None:
    """Refuse a folder in which splits, each in its own folder, would hide a recording of one table.

    Raises:
        ValueError: the folder holds such a recording, finished or not.
    """
    if (folder / "state.json").exists() or (folder / _MANIFEST).exists():
        raise ValueError(f"{folder} holds a recording of one table, without splits. Choose an empty folder.")


def shard_path(folder: Path, first_row: int, part: int | None = None) -> Path:
    """The file of the shard that begins at this row, of a part of a stream if several processes share it."""
    return folder / f"data-{'' if part is None else f'{part:05d}-'}{first_row:012d}.arrow"


def write_shard(path: Path, features: Features, tables: Iterable[pa.Table], note: dict) -> None:
    """Write a shard, and a note beside it. The shard gets its name last.

    Args:
        path: made by [`shard_path`].
        features: the columns.
        tables: the rows.
        note: what else to remember, for JSON: `rows`, the first row and the one after the last; and `skipped`, the rows
            between them that are left out. It may be filled while `tables` is read.

    Raises:
        OSError: the disk is full; finished shards are kept.
    """

    def write(temporary):
        # `datasets` would write record batches of 100 images, and every table made from this one counts record batches.
        with ArrowWriter(features=features, path=str(temporary), writer_batch_size=_BATCH_ROWS) as writer:
            for table in _join(tables):
                writer.write_table(table)
            writer.finalize()

    def write_note(temporary):
        write_text(_note_path(path), json.dumps({**note, **checksums(temporary)}))

    with explain_full_disk(path.parent, _FULL_DISK):
        write_whole(path, write, before_rename=write_note)


# The size of a record batch. It is held in memory.
_BATCH_ROWS, _BATCH_BYTES = 10_000, 1 << 26


def _join(tables) -> Iterator[pa.Table]:
    """Larger tables of the same rows."""
    held = None
    for table in tables:
        if held is None:
            # In one piece of memory. Small tables that stay between the large arrays that they come from would keep the C
            # library from using that memory again: 40 kB a row of ten views and 1,000 classes.
            held = pa.BufferOutputStream()
            writer, num_rows = pa.ipc.new_stream(held, table.schema), 0
        writer.write_table(table)
        num_rows += len(table)
        if num_rows >= _BATCH_ROWS or held.tell() >= _BATCH_BYTES:
            yield _read(held, writer)
            held = None
    if held is not None:
        yield _read(held, writer)


def _read(held, writer):
    writer.close()
    return pa.ipc.open_stream(held.getvalue()).read_all()


def read_note(path: Path) -> dict | None:
    """The note beside a shard; `None` unless the shard exists, is the one that the note is about and has the content that was
    written."""
    try:
        note = read_json(_note_path(path))
        is_whole = path.is_file() and {key: note[key] for key in ("size", "sha256")} == checksums(path)
        # A shard and its note may be copies of others.
        return note if is_whole and shard_path(path.parent, note["rows"][0], note.get("part")) == path else None
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return None


def shard_keys(path: Path, note: dict) -> tuple[list[int], dict[str, list[int]]]:
    """The row numbers in a whole shard, and the keys of these rows."""
    rows = sorted({*range(*note["rows"])} - {*note["skipped"]})
    keys = Dataset.from_file(str(path)).select_columns([ROW_KEY, FILE_KEY])
    return rows, keys[:]


def old_shards(folder: Path) -> Iterator[tuple[Path, list[int], pa.Table]]:
    """The whole shards of an earlier version: path, row numbers, and the columns with keys and logits. Each is removed once
    the next is asked for."""
    for path in sorted((folder / "shards").glob("*.arrow")):
        checksum = path.with_name(f"{path.name}.sha256")
        if checksum.is_file() and checksum.read_bytes() == sha256(path).encode():
            shard = Dataset.from_file(str(path)).with_format("arrow")[:]
            yield path, shard["__row__"].to_pylist(), shard.remove_column(shard.schema.get_field_index("__row__"))
        path.unlink()
    shutil.rmtree(folder / "shards", ignore_errors=True)


def finish(folder: Path, info: DatasetInfo, split: NamedSplit | None, record: dict, shards: Sequence[Path]) -> None:
    """Make the shards the data files of one table. `state.json` arrives last and marks it as finished.

    Args:
        folder: the folder of the recording.
        info: that of the recorded dataset.
        split: its name.
        record: the provenance.
        shards: all shards in the order of their rows.

    Raises:
        OSError: the disk is full, or it changed what was written; whole shards are kept.
    """
    notes = dict(zip(shards, in_threads(read_note, shards)))
    damaged = [path for path, note in notes.items() if note is None]
    if damaged:
        raise OSError(
            f"{len(damaged)} of {len(shards)} shards are damaged: {', '.join(map(str, damaged[:3]))}. Call again: these are "
            "recorded again, and the others are kept."
        )
    skipped = _skipped_rows(notes.values())
    if skipped:
        logger.warning("%d rows were left out because their images cannot be decoded: %s.", len(skipped), skipped)
        record = {**record, "skipped_rows": skipped}
    filled = [path for path, note in notes.items() if len(note["skipped"]) < note["rows"][1] - note["rows"][0]]
    sums = {path.name: {key: notes[path][key] for key in ("size", "sha256")} for path in filled}
    with explain_full_disk(folder, _FULL_DISK):
        write_text(folder / CHECKSUMS, json.dumps(sums, indent=2))
        _write_description(folder, info, split, record, filled, sums)
    # Shards without rows, and those behind the end of a stream that has become shorter.
    for path in {*folder.glob("data-*.arrow")} - {*filled}:
        path.unlink()
    _remove_scaffolding(folder)


def _skipped_rows(notes) -> list[int]:
    """The numbers of the rows that were left out, counted over all parts of a stream, which follow one another."""
    skipped, first, part, end = [], 0, None, 0
    for note in notes:
        if note.get("part") != part:
            # Each process counts the rows of its part.
            first, part = first + end, note.get("part")
        end = note["rows"][1]
        skipped += [first + row for row in note["skipped"]]
    return skipped


def _write_description(folder, info, split, record, shards, sums) -> None:
    """Write the two files that make `datasets.load_from_disk` read the shards as one table, as `save_to_disk` writes them."""
    first = Dataset.from_file(str(shards[0]), split=split)
    info.features = first.features
    first.info.update(info)
    attach_record(first, record)
    first.info.write_to_directory(str(folder))
    flush(folder / "dataset_info.json")
    state = {
        "_data_files": [{"filename": path.name} for path in shards],
        "_fingerprint": hashlib.sha256(json.dumps([record, sums]).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None if split is None else str(split),
    }
    write_text(folder / "state.json", json.dumps(state, indent=2))


def _remove_scaffolding(folder):
    """Remove what only an unfinished recording needs, and what killed processes left of it."""
    left = (
        folder / _MANIFEST,
        folder / _HOLDER,
        folder / _LOCK,
        *folder.glob("*.partial"),
        *folder.glob("*.arrow.json"),
    )
    # A folder that must not be written to has none of them.
    for path in left:
        if path.exists():
            # Windows removes the file of a lock when it is released, and not before.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _note_path(shard):
    return shard.with_name(f"{shard.name}.json")
