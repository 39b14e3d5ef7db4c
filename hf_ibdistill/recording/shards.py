"""The folder of a recording: begin or continue it, name and check its shards, and join them into the finished table.

A shard is a run of consecutive rows. It is written under a temporary name and renamed when it is complete, so an
interrupted recording keeps every finished shard and continues with the next.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets, load_from_disk

from ..files import explain_full_disk, sha256, write_text, write_whole
from ..logits.provenance import attach_record, read_records, record_differences


logger = logging.getLogger(__name__)

ROW = "__row__"
_MANIFEST = "recording.json"
_CHECKSUMS = "checksums.json"
_FULL_DISK = "Finished shards are kept. Free space and call again."


def open_folder(folder: Path, record: dict, layout: dict) -> bool:
    """Begin or continue a recording in the folder.

    Args:
        folder: the folder of the table.
        record: the provenance of what is to be recorded.
        layout: the settings that decide which rows share a batch and a shard.

    Returns:
        Whether the recording is finished already.

    Raises:
        ValueError: the folder holds another table, another recording or other files.
    """
    path = folder / _MANIFEST
    if (folder / "state.json").exists():
        records = read_records(load_from_disk(str(folder)))
        if len(records) != 1:
            raise ValueError(f"{folder} holds another table. Choose an empty folder.")
        differences = record_differences(record, records[0])
        if differences:
            raise ValueError(
                f"{folder} holds a finished recording that differs: {'; '.join(differences)}. "
                "Choose another folder, or delete this one."
            )
        _remove_scaffolding(folder)
        return True
    if path.exists():
        found = json.loads(path.read_text())
        differences = record_differences(record, found["record"])
        differences += [
            f"{key} {found['layout'].get(key)} instead of {value}"
            for key, value in layout.items()
            if found["layout"].get(key) != value
        ]
        if differences:
            raise ValueError(
                f"{folder} holds an interrupted recording that differs: {'; '.join(differences)}. "
                "Continue it with the settings that it began with, choose another folder, or delete this one."
            )
        return False
    # A recording that is killed before its manifest exists leaves only parts of the manifest.
    if folder.exists() and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no recording. Choose an empty folder.")
    write_text(path, json.dumps({"record": record, "layout": layout}, indent=2))
    return False


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
    """Whether the shard exists and has the content that was written."""
    return path.exists() and _checksum_path(path).exists() and _checksum_path(path).read_text() == sha256(path)


def damaged_files(dataset: Dataset) -> list[str]:
    """The files of a finished table that are missing or have another content than recording wrote."""
    damaged = []
    for folder in sorted({Path(file["filename"]).parent for file in dataset.cache_files}):
        if (folder / _CHECKSUMS).exists():
            for name, checksum in json.loads((folder / _CHECKSUMS).read_text()).items():
                if not (folder / name).exists() or sha256(folder / name) != checksum:
                    damaged.append(name)
    return damaged


def assemble(dataset: Dataset, record: dict, shards: list[Path], folder: Path) -> None:
    """Join the images and the logits of all shards into one table in the folder. `state.json` arrives last and marks the
    table as finished.

    Raises:
        OSError: the disk is full; the shards are kept.
    """
    with explain_full_disk(folder, _FULL_DISK):
        _assemble(dataset, record, shards, folder)


def _assemble(dataset, record, shards, folder):
    logits = concatenate_datasets([Dataset.from_file(str(path)) for path in shards])
    rows = logits.select_columns([ROW]).with_format("arrow")[:][ROW].to_numpy()
    if len(rows) < len(dataset):
        skipped = np.setdiff1d(np.arange(len(dataset)), rows)
        logger.warning(
            "%d rows were left out because their images cannot be decoded: %s.", len(skipped), skipped.tolist()
        )
        dataset = dataset.select(rows)
    logits = logits.remove_columns(ROW)
    replaced = [name for name in logits.column_names if name in dataset.column_names]
    table = concatenate_datasets([dataset.remove_columns(replaced), logits], axis=1)
    attach_record(table, record)
    finished = folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    try:
        table.save_to_disk(str(finished))
        checksums = {path.name: sha256(path) for path in sorted(finished.glob("*.arrow"))}
        (finished / _CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for path in sorted(finished.iterdir(), key=lambda path: path.name == "state.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
    _remove_scaffolding(folder)


def _remove_scaffolding(folder):
    """Remove what only an unfinished recording needs, and what killed processes left of it."""
    for name in ("shards", "finished"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / _MANIFEST, *folder.glob("*.partial")):
        path.unlink(missing_ok=True)


def _checksum_path(shard):
    return shard.with_name(f"{shard.name}.sha256")
