"""Recorded tables as Parquet files with their provenance and a card beside them, for sharing and for streaming."""

import json
import os
import shutil
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..data.columns import require_table
from ..data.sources import public_name
from ..logits.provenance import attach_record, read_records
from .cards import create_logits_card


PROVENANCE = "provenance.json"


def export_logits_table(
    dataset: Dataset,
    output_dir: str | os.PathLike,
    *,
    split: str = "train",
    rows_per_file: int = 10_000,
    repo_id: str | None = None,
) -> Path:
    """Write a recorded table as Parquet files, with its provenance as JSON and a card.

    To publish logits without the images, remove their column: `dataset.remove_columns("image")`. A user who has the images
    joins the two with [`attach_teacher_logits`].

    Args:
        dataset: a table that recording made.
        output_dir: a folder that does not exist yet, or an empty one.
        split: the split, which the file names contain.
        rows_per_file: rows in a file.
        repo_id: the Hub id under which it will be published, for the example in the card.

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: the table is empty or has not exactly one provenance record, `rows_per_file` is below 1, or the folder
            is not empty.
    """
    require_table(dataset, "dataset")
    if len(dataset) == 0 or rows_per_file < 1:
        raise ValueError(f"{len(dataset)} rows, rows_per_file={rows_per_file}: both must be at least 1.")
    output_dir, records = Path(output_dir), read_records(dataset)
    if len(records) != 1:
        raise ValueError(
            f"The table has {len(records)} provenance records; it needs exactly one. Export a table that one recording made."
        )
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} is not empty. Choose another folder.")
    beside = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "data").mkdir(parents=True)
    num_files = -(-len(dataset) // rows_per_file)
    for i in range(num_files):
        rows = range(i * rows_per_file, min((i + 1) * rows_per_file, len(dataset)))
        dataset.select(rows).to_parquet(beside / "data" / f"{split}-{i:05d}-of-{num_files:05d}.parquet")
    teachers = [
        {**teacher, "source": teacher["source"] and public_name(teacher["source"])}
        for teacher in records[0]["teachers"]
    ]
    (beside / PROVENANCE).write_text(json.dumps({**records[0], "teachers": teachers}, indent=2))
    create_logits_card(dataset, repo_id=repo_id).save(beside / "README.md")
    if output_dir.exists():
        output_dir.rmdir()
    os.replace(beside, output_dir)
    return output_dir


def open_logits_table(
    source: str | os.PathLike, *, split: str = "train", streaming: bool = False, **load_kwargs
) -> Dataset | IterableDataset:
    """Open what [`export_logits_table`] wrote, from a folder or the Hub, with its provenance.

    Args:
        source: the folder, or the id of a dataset on the Hub.
        split: the split to open.
        streaming: read the rows as they are needed, from files of any size, instead of preparing the table first.
        load_kwargs: passed to `datasets.load_dataset`, for example a `revision`.

    Raises:
        ValueError: there is no provenance beside the data.
    """
    try:
        if Path(source).is_dir():
            path = Path(source) / PROVENANCE
        else:
            keywords = {key: load_kwargs[key] for key in ("revision", "token") if key in load_kwargs}
            path = hf_hub_download(str(source), PROVENANCE, repo_type="dataset", **keywords)
        record = json.loads(Path(path).read_text())
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise ValueError(
            f"{source} has no {PROVENANCE}, which describes the teachers. Open a table that export_logits_table wrote."
        ) from error
    # Only the data folder, because the JSON beside it would be read as data.
    dataset = load_dataset(str(source), data_dir="data", split=split, streaming=streaming, **load_kwargs)
    attach_record(dataset, record)
    return dataset
