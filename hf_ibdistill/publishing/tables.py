"""Recorded tables as Parquet files with their provenance and a card beside them, for sharing and for streaming."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, IterableDataset, load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from ..checks import check_numbers
from ..data.columns import require_table
from ..data.sources import load_parquet, open_address, open_saved
from ..files import is_address, output_folder, read_json, user_path, write_text
from ..logits.encoding import column_name, recorded_teachers
from ..logits.provenance import attach_record, check_complete, check_files, check_record, only_record
from .cards import create_logits_card, teacher_source


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
        ValueError: the table is empty, is damaged, has rows without logits or not exactly one provenance record,
            `rows_per_file` is below 1, `split` cannot name one, or the folder is not empty.
    """
    require_table(dataset, "dataset")
    check_numbers(1, whole=True, rows_per_file=rows_per_file)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty; it needs at least one row.")
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f'split="{split}" cannot name a split. Use letters, digits and "_".')
    output_dir, record = output_folder(output_dir), only_record(dataset)
    check_files(dataset)
    check_complete(dataset)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} is not empty. Choose another folder.")
    beside = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "data").mkdir(parents=True)
    num_files = -(-len(dataset) // rows_per_file)
    for i in range(num_files):
        rows = range(i * rows_per_file, min((i + 1) * rows_per_file, len(dataset)))
        _write_parquet(dataset.select(rows), beside / "data" / f"{split}-{i:05d}-of-{num_files:05d}.parquet")
    teachers = [{**teacher, "source": teacher_source(teacher)} for teacher in record["teachers"]]
    write_text(beside / PROVENANCE, json.dumps({**record, "teachers": teachers}, indent=2))
    create_logits_card(dataset, repo_id=repo_id).save(beside / "README.md")
    if output_dir.exists():
        output_dir.rmdir()
    os.replace(beside, output_dir)
    return output_dir


def _write_parquet(dataset: Dataset, path: Path) -> None:
    """Write what `Dataset.to_parquet` writes in fewer bytes: it compresses with snappy. zstd does better, above all on logits
    whose first and second bytes are stored apart. Encoded images cannot be compressed further."""
    schema, empty = dataset.features.arrow_schema, io.BytesIO()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(empty).schema
    leaves = [columns.column(i).path for i in range(len(columns))]
    logits = tuple(f"{column_name(name)}." for name in recorded_teachers(dataset))
    images = tuple(f"{name}." for name, feature in dataset.features.items() if isinstance(feature, Image))
    how = {
        "compression": {leaf: "none" if leaf.startswith(images) else "zstd" for leaf in leaves},
        "compression_level": {leaf: 6 for leaf in leaves if not leaf.startswith(images)},
        "use_byte_stream_split": [leaf for leaf in leaves if leaf.startswith(logits)],
        "use_dictionary": [leaf for leaf in leaves if not leaf.startswith((*logits, *images))],
    }
    with pq.ParquetWriter(path, schema, write_page_index=True, **how) as writer:
        for rows in dataset.with_format("arrow").iter(batch_size=1000):
            writer.write_table(rows.cast(schema))


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
        ValueError: there is no provenance beside the data, or a damaged one, no data, or no such split.
    """
    source = user_path(source, "source")
    is_folder = Path(source).is_dir()
    try:
        if is_folder:
            path = Path(source) / PROVENANCE
        else:
            keywords = {key: load_kwargs[key] for key in ("revision", "token") if key in load_kwargs}
            path = hf_hub_download(str(source), PROVENANCE, repo_type="dataset", **keywords)
        record = check_record(read_json(path), str(path))
    except (FileNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{source} has no {PROVENANCE}, which describes the teachers. Open a table that export_logits_table wrote."
        ) from error
    how = {"split": split, "streaming": streaming, **load_kwargs}
    if is_folder:
        splits: dict[str, list[Path]] = {}
        for file in sorted(Path(source, "data").glob("*.parquet")):
            splits.setdefault(file.name.partition("-")[0], []).append(file)
        if not splits:
            raise ValueError(f"{source} has no Parquet files in its folder data. Export or download it again.")
        dataset = load_parquet(splits, how)
    else:
        # Only the data folder, because the JSON beside it would be read as data.
        dataset = load_dataset(str(source), data_dir="data", **how)
    attach_record(dataset, record)
    return dataset


def open_tables(source: str | os.PathLike) -> dict[str, Dataset]:
    """Split → table of a recorded table in a folder or at an address, an exported one, or a published one, of which the training
    split is opened. A table without splits is "train".

    Raises:
        ValueError: there is no such table, or a file is missing or damaged.
    """
    source = user_path(source, "source")
    if is_address(source) or (Path(source).is_dir() and not Path(source, PROVENANCE).is_file()):
        tables = open_address(source) if is_address(source) else open_saved(source)
        return dict(tables) if isinstance(tables, DatasetDict) else {"train": tables}
    files = sorted(Path(source, "data").glob("*.parquet"))
    names = dict.fromkeys(file.name.partition("-")[0] for file in files) or ["train"]
    return {name: open_logits_table(source, split=name) for name in names}
