"""The folder of a recording: begin or continue it, name and check its shards, and join them into the finished table.

A shard is a run of consecutive rows. It is written under a temporary name and renamed when it is complete, so an
interrupted recording keeps every finished shard and continues with the next.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout

from ..data.sources import open_saved
from ..files import checksums, explain_full_disk, flush, read_json, sha256, write_text, write_whole
from ..logits.encoding import FILE_KEY, ROW_KEY
from ..logits.provenance import CHECKSUMS, attach_record, check_record, read_records, record_differences


logger = logging.getLogger(__name__)

ROW = "__row__"
_MANIFEST = "recording.json"
_ROWS = "rows.arrow"
_LOCK, _HOLDER = "recording.lock", "recording.holder"
_FULL_DISK = "Finished shards are kept. Free space and call again."


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from recording into the folder. The operating system releases the lock of a process that dies.

    Raises:
        ValueError: another process is recording into the folder, or a folder has the name of a file of the recording.
    """
    for path in (folder / _LOCK, folder / _HOLDER, folder / _MANIFEST, *folder.glob("shards/*")):
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


def shard_path(folder: Path, rows: range) -> Path:
    """The file of the shard with these rows."""
    return folder / "shards" / f"{rows.start:012d}-{rows.stop:012d}.arrow"


def write_shard(path: Path, write: Callable[[Path], object]) -> None:
    """Write a shard and its checksum. The shard gets its name last.

    Raises:
        OSError: the disk is full; finished shards are kept.
    """
    with explain_full_disk(path.parent.parent, _FULL_DISK):
        write_whole(path, write, before_rename=lambda temporary: write_text(_checksum_path(path), sha256(temporary)))


def shard_is_whole(path: Path) -> bool:
    """Whether the shard exists and has the content that was written, of the rows in its name."""
    checksum = _checksum_path(path)
    if not path.is_file() or not checksum.is_file() or checksum.read_bytes() != sha256(path).encode():
        return False
    start, stop = map(int, path.stem.split("-"))
    return set(shard_keys([path], [ROW])[ROW]) <= set(range(start, stop))


def shard_keys(paths: Iterable[Path], names: Sequence[str] = (ROW, ROW_KEY, FILE_KEY)) -> dict[str, list[int | None]]:
    """The row numbers and keys in whole shards, one after another; a key that a shard does not have is `None`."""
    keys = {name: [] for name in names}
    for path in paths:
        with pa.memory_map(str(path)) as source:
            shard = pa.ipc.open_stream(source).read_all()
            for name, values in keys.items():
                values += shard[name].to_pylist() if name in shard.column_names else [None] * len(shard)
    return keys


def assemble(dataset: Dataset, record: dict, shards: list[Path], folder: Path) -> None:
    """Join the images and the logits of all shards into one table. `state.json` arrives last and marks it as finished.

    Raises:
        OSError: the disk is full, or it changed what was written; whole shards are kept.
    """
    finished = folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    try:
        with explain_full_disk(folder, _FULL_DISK):
            _write_table(dataset, record, shards, finished)
            sums = {path.name: checksums(path) for path in sorted(finished.glob("*.arrow"))}
            write_text(finished / CHECKSUMS, json.dumps(sums, indent=2))
            for path in sorted(finished.iterdir(), key=lambda path: path.name == "state.json"):
                flush(path)
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
        (folder / _ROWS).unlink(missing_ok=True)
    _remove_scaffolding(folder)


def _write_table(dataset, record, shards, finished):
    # Its own function, so that the files are closed when it returns: Windows neither moves nor removes open ones.
    damaged = [path for path in shards if not shard_is_whole(path)]
    if damaged:
        raise OSError(
            f"{len(damaged)} of {len(shards)} shards are damaged: {', '.join(map(str, damaged[:3]))}. Call again: these are "
            "recorded again, and the others are kept."
        )
    logits = concatenate_datasets([Dataset.from_file(str(path)) for path in shards])
    rows = logits.select_columns([ROW]).with_format("arrow")[:][ROW].to_numpy()
    if len(rows) < len(dataset):
        skipped = np.setdiff1d(np.arange(len(dataset)), rows)
        logger.warning(
            "%d rows were left out because their images cannot be decoded: %s.", len(skipped), skipped.tolist()
        )
        dataset = dataset.select(rows)
        record = {**record, "skipped_rows": skipped.tolist()}
    if dataset._indices is not None:
        # Joining columns copies selected rows, by default beside the files of the user.
        dataset = dataset.flatten_indices(cache_file_name=str(finished.with_name(_ROWS)))
    logits = logits.remove_columns(ROW)
    replaced = [name for name in logits.column_names if name in dataset.column_names]
    table = concatenate_datasets([dataset.remove_columns(replaced), logits], axis=1)
    attach_record(table, record)
    table.save_to_disk(str(finished))
    # The shards are the only copy of the logits until the table is known to have them.
    written = open_saved(finished).select_columns(logits.column_names)
    if not written.data.table.equals(logits.data.table):
        raise OSError(
            f"{finished} does not hold what was written to it. Check the disk and call again; shards are kept."
        )


def _remove_scaffolding(folder):
    """Remove what only an unfinished recording needs, and what killed processes left of it."""
    for name in ("shards", "finished"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # A folder that must not be written to has none of them.
    for path in (folder / _MANIFEST, folder / _HOLDER, folder / _LOCK, *folder.glob("*.partial")):
        if path.exists():
            # Windows removes the file of a lock when it is released, and not before.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)


def _checksum_path(shard):
    return shard.with_name(f"{shard.name}.sha256")
